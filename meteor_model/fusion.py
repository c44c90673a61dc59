"""Stage 2 and what surrounds it: projectors into the LLM's width, and the two ways to join encoders.

    post_projection  METEOR: one projector per encoder, the tokens are pooled, and those that another encoder already
                     says are dropped (or those that another criterion of stage 2 names)
    channel_concat   EAGLE's layout, the dense baseline: every map is brought to one grid, the maps are joined on the
                     channels and go through one projector; a criterion of stage 2 may prune what comes out

Legend: M images, N tokens of one encoder, K tokens kept of the pool, G side of the common grid, D encoder width, C LLM
width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meteor_model.pruners.builtin import FUSE_CRITERIA
from meteor_model.pruners.fuse_criteria import Pool, floored
from meteor_model.pruners.fuse_published import merge_into_nearest
from meteor_model.pruners.select import gather_tokens, refuse_nan
from meteor_model.pruning_config import FusePruning
from meteor_model.replay import Choose, best_scored


class MeteorProjector(nn.Module):
    """The way into the LLM: Linear, GELU, Linear; (M, N, D) -> (M, N, C)."""

    def __init__(self, embed_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.input = nn.Linear(embed_dim, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_MND: Tensor) -> Tensor:
        """Tokens (M, N, D) of an encoder in the LLM's width, (M, N, C)."""
        projected: Tensor = self.output(F.gelu(self.input(hidden_MND)))
        return projected


def prune_pool(pool: Pool, settings: FusePruning, choose: Choose = best_scored) -> tuple[Tensor, Tensor]:
    """Keep `pool.keep` of the pooled tokens.

    Source of the default criterion: METEOR (arXiv 2507.20842), cooperative fusion pruning: the tokens that the other
    encoders do not say already stay.

    Args:
        pool: the projected tokens of all encoders; keeping all of them changes nothing.
        settings: criterion and its options.
        choose: decides by the scores which tokens stay.

    Returns:
        (M, K, C) in encoder order, then raster order; and the kept indices (M, K) into the pool, ascending.

    Raises:
        ValueError: when `pool.keep` exceeds the pool, or a score is NaN.
    """
    pool_MNC = pool.tokens_MNC
    images, total = pool_MNC.shape[:2]
    places_MN = torch.arange(total, device=pool_MNC.device).expand(images, -1)
    if pool.keep == total:
        return pool_MNC, places_MN
    criterion = FUSE_CRITERIA[settings.criterion]
    with torch.no_grad():  # selection has no gradient; what is kept carries its own
        scores_MN = criterion.run(pool, **settings.options)
        refuse_nan(scores_MN)
        if pool.floors and not criterion.facts["floors"]:
            scores_MN = floored(scores_MN, [tokens.shape[1] for tokens in pool.tokens], pool.floors)
        keep_MK = choose(0, scores_MN, places_MN, pool.keep)
    merge = merge_into_nearest if settings.merge == "nearest" else criterion.facts["merge"]
    if merge is not None:
        return merge(pool, keep_MK, **settings.options), keep_MK
    return gather_tokens(pool_MNC, keep_MK), keep_MK


def pooled_attention(attention: Sequence[Tensor | None], grids: Sequence[tuple[int, int]], side: int | None) -> Tensor:
    """The encoders' attention to their own tokens, for the tokens of the pool or of one joint map. (M, N) fp32.

    Every encoder's is divided by its mean, so that they can be compared. An encoder without attention (a convolutional
    one) counts as 1 everywhere in a pool, and not at all in a joint map.

    Args:
        attention: one (M, rows * columns) per encoder, or None; at least one is there.
        grids: rows and columns of each.
        side: of the joint grid, to which each is resized as the maps are; None for a pool.
    """
    known = next(item for item in attention if item is not None)
    scaled = []
    for item_MN, (rows, columns) in zip(attention, grids, strict=True):
        if item_MN is None:
            if side is None:
                scaled.append(known.new_ones(len(known), rows * columns))
            continue
        even_MN = item_MN / item_MN.mean(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        if side is not None and (rows, columns) != (side, side):
            map_M1rc = even_MN.unflatten(1, (rows, columns))[:, None]
            even_MN = F.interpolate(map_M1rc, size=(side, side), mode="bilinear", align_corners=True).flatten(1)
        scaled.append(even_MN)
    return torch.cat(scaled, dim=1) if side is None else torch.stack(scaled).mean(dim=0)


def concat_channels(
    maps: Sequence[Tensor], grids: Sequence[tuple[int, int]], folds: Sequence[int], side: int
) -> Tensor:
    """Bring every encoder's full map to one `side` x `side` grid and join them on the channels.

    A map is folded first (`fold` x `fold` cells become the channels of one), then resized bilinearly with aligned
    corners where its grid is not the common one. Source: the public code of EAGLE (github.com/NVlabs/EAGLE).

    Args:
        maps: one (M, rows * columns, D) per encoder, raster order.
        grids: rows and columns of each map.
        folds: cells per side that are folded into one; 1 folds nothing.
        side: G.

    Returns:
        (M, G * G, sum of D * fold^2), raster order.

    Raises:
        ValueError: when a map does not have the tokens of its grid.
    """
    joined = []
    for hidden_MND, (rows, columns), fold in zip(maps, grids, folds, strict=True):
        if hidden_MND.shape[1] != rows * columns:
            raise ValueError(
                f"channel_concat needs full maps: {hidden_MND.shape[1]} tokens came from a {rows} x {columns} grid"
            )
        map_MDrc = hidden_MND.transpose(1, 2).unflatten(2, (rows, columns))
        if fold > 1:
            map_MDrc = F.pixel_unshuffle(map_MDrc, fold)
        if map_MDrc.shape[-2:] != (side, side):
            resized = F.interpolate(map_MDrc.float(), size=(side, side), mode="bilinear", align_corners=True)
            map_MDrc = resized.to(hidden_MND.dtype)
        joined.append(map_MDrc.flatten(2).transpose(1, 2))
    return torch.cat(joined, dim=-1)


def concat_width(widths: Sequence[int], folds: Sequence[int]) -> int:
    """Channels that `concat_channels` gives for encoders of these widths."""
    return sum(width * fold * fold for width, fold in zip(widths, folds, strict=True))
