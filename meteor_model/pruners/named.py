"""Every pruner by name, METEOR's, published and trivial ones: each turns a model's configuration into one that prunes.

`with_pruner(config, "fastv", keep=256)` is that configuration. It is a `MeteorConfig` like any other, so that whatever
knows configurations (generate, evaluation, serving, sweeps, a registered version) runs the pruner. A pruner begins from
the model with nothing pruned; `keep` is what an image keeps at the end (of `autoprune`, in the
mean of the layers).

Layers are given for the 32 layers that the papers use and are scaled to the language model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meteor_model.checks import nearest, whole_number
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.pruners import named_meteor, named_published, named_trivial
from meteor_model.pruners.entries import PRUNERS, Pruner
from meteor_model.pruners.smaller_image import reachable

__all__ = ["ENTERED", "PRUNERS", "REFUSED", "numbers_of", "unpruned", "with_pruner"]

#: Modules whose import enters pruners.
ENTERED = (named_trivial, named_meteor, named_published)
for _module in ENTERED:  # in this order, whatever was imported first
    for _name in [name for name, item in PRUNERS.items() if item.configure.__module__ == _module.__name__]:
        PRUNERS[_name] = PRUNERS.pop(_name)

#: Pruners that share what they keep among the towers, each of which keeps one.
LEAST_ONE_A_TOWER = ("pixelprune",)

#: Published rules that cannot run here, and why.
REFUSED: dict[str, str] = {
    "resampler": "its learned queries are a module that has to be trained and saved with the model: a criterion has no "
    "weights",
    "oc_vtp": "its pruner is a network of its own that has to be trained first: not built yet",
    "comp": "it prunes parameters and tokens together while a model is fine-tuned: not built yet",
}


def with_pruner(config: MeteorConfig, name: str, keep: int, **settings: Any) -> MeteorConfig:
    """The model of `config` under a pruner that leaves `keep` visual tokens an image.

    Args:
        config: any model; how it is pruned now is not looked at.
        name: of `PRUNERS`.
        keep: visual tokens of an image in the last layer of the language model.
        settings: the pruner's own.

    Raises:
        ValueError: for an unknown pruner or setting, or what the model does not allow.
    """
    chosen = _known(name)
    dense = unpruned(config)
    most = dense.tokens_per_image
    whole_number("keep", keep, least=1)
    if keep > most:
        raise ValueError(f"pruner {name!r} cannot keep {keep} of the {most} visual tokens of an image")
    try:
        return chosen.configure(dense, keep, **settings)
    except TypeError as error:
        raise ValueError(f"pruner {name!r} does not take these settings: {error}") from None


def numbers_of(config: MeteorConfig, name: str) -> Sequence[int]:
    """The numbers of tokens that a pruner can keep of an image of this model, ascending. ValueError if unknown."""
    dense = unpruned(config)
    if name == "none":
        return [dense.tokens_per_image]
    if name == "smaller_image":
        return reachable(dense)
    _known(name)
    if name in LEAST_ONE_A_TOWER:
        return range(len(dense.encoders), dense.tokens_per_image + 1)
    return range(1, dense.tokens_per_image + 1)


def _known(name: str) -> Pruner:
    if name in REFUSED:
        raise ValueError(f"pruner {name!r} cannot run here: {REFUSED[name]}")
    if name not in PRUNERS:
        raise ValueError(f"pruner {name!r} is unknown; known: {', '.join(PRUNERS)}{nearest(name, PRUNERS)}")
    return PRUNERS[name]


def unpruned(config: MeteorConfig) -> MeteorConfig:
    """The same model with nothing pruned."""
    off = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))
    return config.with_pruning(off)
