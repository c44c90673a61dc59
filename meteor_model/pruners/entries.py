"""How a pruner gets its name, and what entries are made of: prunings of one stage, layers of a model of 32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meteor_model.configuration_meteor import DecodePruning, FusePruning, MeteorConfig, PruningConfig

PUBLISHED_LAYERS = 32
Configure = Callable[..., MeteorConfig]


@dataclass(frozen=True)
class Pruner:
    """One entry.

    Attributes:
        name: of the pruner.
        configure: (configuration with nothing pruned, keep, **settings) -> the configuration that prunes.
        acts: where: "nowhere", "pixels", "projected tokens", "language model".
        needs: what it looks at.
        source: the paper, or "trivial".
    """

    name: str
    configure: Configure
    acts: str
    needs: str
    source: str

    @property
    def about(self) -> str:
        """The first line of its docstring."""
        return (self.configure.__doc__ or "").partition("\n")[0]


PRUNERS: dict[str, Pruner] = {}


def pruner(name: str, acts: str, needs: str, source: str) -> Callable[[Configure], Configure]:
    """Decorator: enter a pruner. Raises ValueError for a name that is taken."""
    if name in PRUNERS:
        raise ValueError(f"pruner {name!r} is registered already")

    def enter(configure: Configure) -> Configure:
        PRUNERS[name] = Pruner(name, configure, acts, needs, source)
        return configure

    return enter


def pruned_pool(dense: MeteorConfig, criterion: str, keep: int, **options: float) -> MeteorConfig:
    """Stage 2 alone, by this criterion."""
    off = dense.pruning
    fuse = FusePruning(keep=keep, criterion=criterion, options=options)
    return dense.with_pruning(PruningConfig(off.encode, fuse, off.decode))


def pruned_layers(dense: MeteorConfig, layers: tuple[int, ...], keep: tuple[int, ...], **decode: Any) -> MeteorConfig:
    """Stage 3 alone: after each of `layers` so many tokens an image stay."""
    settings = DecodePruning(
        layer=layers[0],
        target_mean=float(keep[0]),
        budget="fixed",
        later_layers=layers[1:],
        later_keep=keep[1:],
        **decode,
    )
    return dense.with_pruning(PruningConfig(dense.pruning.encode, dense.pruning.fuse, settings))


def scaled_layers(config: MeteorConfig, published: tuple[int, ...]) -> tuple[int, ...]:
    """Layers of a model of 32, in this one: at the same share of its depth, at least one apart.

    Raises:
        ValueError: where the language model has too few layers.
    """
    depth, layers = config.text_config.num_hidden_layers, list[int]()
    for layer in published:
        least = layers[-1] + 1 if layers else 1
        layers.append(max(round(layer * depth / PUBLISHED_LAYERS), least))
    if layers[-1] >= depth:
        raise ValueError(f"{len(published)} prunings need more than the language model's {depth} layers")
    return tuple(layers)


def layers_of(config: MeteorConfig, given: tuple[int, ...] | None, published: tuple[int, ...]) -> tuple[int, ...]:
    """The layers that were given, or the published ones of 32 scaled."""
    return scaled_layers(config, published) if given is None else tuple(given)


def in_shares(dense: MeteorConfig, keep: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Tokens after each pruning, in the proportion of `shares`, `keep` after the last; no more than there are."""
    return tuple(min(round(keep * share / shares[-1]), dense.tokens_per_image) for share in shares)
