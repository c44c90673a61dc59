"""Criteria of stage 1: which tokens of one encoder stay at a boundary between segments, and how encoders share totals.

A criterion is given a `Boundary` and returns scores (M, N) fp32, high = keep. A budget rule gives each encoder its
weight; shares are whole numbers by `allocate_budgets`.

Legend: M images, N tokens present, D encoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from meteor_model.pruners.places import even_scores, random_scores
from meteor_model.pruners.registry import Registry
from meteor_model.pruners.tower_scores import mean_similarity


class Boundary(NamedTuple):
    """What a criterion of stage 1 is given.

    Attributes:
        hidden_MND: the patch tokens that leave the segment.
        positions_MN: int64 ascending, their places in the full grid (row * columns + column).
        grid: rows and columns of the full grid.
        segment: counted from 0.
        keep: tokens that will stay.
        attention: scores (M, N) of these tokens by attention in the segment's last block (from CLS, or received), when
            called; None where the criterion does not attend in this segment or the tower is convolutional.
        pixels_MCRR: the normalised pixels that the tower sees.
    """

    hidden_MND: Tensor
    positions_MN: Tensor
    grid: tuple[int, int]
    segment: int
    keep: int
    attention: Callable[[], Tensor] | None
    pixels_MCRR: Tensor | None = None


EncodeCriterion = Callable[..., Tensor]
#: `attends`: in which segments the criterion asks for attention: "never", in the "deep" ones, "always"; `before`:
#: whether tokens are dropped before a segment and not after it, by the pixels alone.
ENCODE_CRITERIA: Registry[EncodeCriterion] = Registry("pruning.encode.criterion", attends="never", before=False)


@ENCODE_CRITERIA.register("meteor", attends="deep")
def meteor(boundary: Boundary) -> Tensor:
    """METEOR (arXiv 2507.20842): unlike the mean token in shallow segments, attended to in deep ones.

    A convolutional tower has no attention: its output is scored as a shallow segment's.
    """
    return least_like_the_mean(boundary) if boundary.attention is None else boundary.attention()


@ENCODE_CRITERIA.register("mean_similarity")
def least_like_the_mean(boundary: Boundary) -> Tensor:
    """METEOR's shallow criterion at every boundary: the tokens least like the mean token stay."""
    return -mean_similarity(boundary.hidden_MND)


@ENCODE_CRITERIA.register("attention", attends="always")
def attention(boundary: Boundary) -> Tensor:
    """METEOR's deep criterion at every boundary; a convolutional tower is scored by similarity to the mean."""
    return meteor(boundary)


@ENCODE_CRITERIA.register("random")
def random(boundary: Boundary, *, seed: float = 0) -> Tensor:
    """Cells drawn at random, the same ones in every image and at every boundary (those that stay stay)."""
    rows, columns = boundary.grid
    return random_scores(rows * columns, int(seed), boundary.hidden_MND.device)[boundary.positions_MN]


@ENCODE_CRITERIA.register("stride")
def stride(boundary: Boundary) -> Tensor:
    """Tokens at even distances of what is present, in raster order."""
    images, tokens = boundary.positions_MN.shape
    return even_scores(tokens, boundary.keep, boundary.hidden_MND.device).expand(images, -1)


EncodeBudget = Callable[[Sequence[float], Sequence[int]], Sequence[float]]
#: `usefulness`: whether weights are multiplied by `pruning.encode.usefulness`, where 0 is not run at all.
ENCODE_BUDGETS: Registry[EncodeBudget] = Registry("pruning.encode.budget", usefulness=False)


@ENCODE_BUDGETS.register("rank")
def by_rank(ranks: Sequence[float], capacities: Sequence[int]) -> Sequence[float]:
    """METEOR (arXiv 2507.20842): in proportion to the expected rank of the feature map (to rank ** rank_exponent)."""
    return ranks


@ENCODE_BUDGETS.register("rank_usefulness", usefulness=True)
def by_rank_and_usefulness(ranks: Sequence[float], capacities: Sequence[int]) -> Sequence[float]:
    """In proportion to rank ** rank_exponent times the usefulness of the encoder; one of usefulness 0 is not run.

    A high rank says that a map is rich, not that its answers need it: masking one encoder at a time finds some that add
    nothing or harm (arXiv 2507.03262). Ours: the product, and that what harms counts as 0.
    """
    return ranks


@ENCODE_BUDGETS.register("tokens")
def by_tokens(ranks: Sequence[float], capacities: Sequence[int]) -> Sequence[float]:
    """In proportion to the tokens present (to tokens ** rank_exponent): every encoder keeps the same share."""
    return [float(tokens) for tokens in capacities]
