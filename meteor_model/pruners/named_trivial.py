"""The trivial rows, without which no comparison of pruners says anything."""

from __future__ import annotations

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.pruners.entries import layers_of, pruned_layers, pruned_pool, pruner
from meteor_model.pruners.smaller_image import resized


@pruner("none", "nowhere", "nothing", "trivial")
def none(dense: MeteorConfig, keep: int) -> MeteorConfig:
    """Nothing is pruned; `keep` must be all the tokens there are."""
    if keep != dense.tokens_per_image:
        raise ValueError(f"pruner 'none' keeps all {dense.tokens_per_image} visual tokens, not {keep}")
    return dense


@pruner("random", "projected tokens", "nothing", "trivial")
def random(dense: MeteorConfig, keep: int, *, seed: int = 0) -> MeteorConfig:
    """Projected tokens drawn at random, the same places in every image."""
    return pruned_pool(dense, "random", keep, seed=seed)


@pruner("stride", "projected tokens", "nothing", "trivial")
def stride(dense: MeteorConfig, keep: int) -> MeteorConfig:
    """Projected tokens at even distances on the grid."""
    return pruned_pool(dense, "stride", keep)


@pruner("average_pooling", "projected tokens", "nothing", "trivial")
def average_pooling(dense: MeteorConfig, keep: int) -> MeteorConfig:
    """Projected tokens averaged over near equal rectangles of the grid."""
    return pruned_pool(dense, "average_pooling", keep)


@pruner("smaller_image", "pixels", "positions that can be interpolated", "trivial")
def smaller_image(dense: MeteorConfig, keep: int) -> MeteorConfig:
    """Every tower sees a smaller image, so that exactly `keep` tokens come out.

    Towers keep their weights: positions are interpolated as their library does it. Ours: the grids of all towers shrink
    by one factor (a joint grid by its own), so only some numbers can be met; others are refused with the nearest two.
    """
    return resized(dense, keep)


@pruner("random_in_llm", "language model", "nothing", "trivial")
def random_in_llm(dense: MeteorConfig, keep: int, *, layer: int | None = None, seed: int = 0) -> MeteorConfig:
    """Visual tokens drawn at random after layer 2: FastV's cost without FastV's choice."""
    layers = layers_of(dense, None if layer is None else (layer,), (2,))
    return pruned_layers(dense, layers, (keep,), criterion="random", options={"seed": seed})
