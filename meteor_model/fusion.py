"""Stage 2 and what surrounds it: projectors into the LLM's width, and the two ways to join encoders.

    post_projection  METEOR: one projector per encoder, the tokens are pooled, and those that another encoder already
                     says are dropped
    channel_concat   EAGLE's layout, the dense baseline: every map is brought to one grid, the maps are joined on the
                     channels and go through one projector

Legend: M images, N tokens of one encoder, K tokens kept of the pool, G side of the common grid, D encoder width, C LLM
width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meteor_model.pruning import gather_tokens, mutual_redundancy, refuse_nan
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


def fuse_cooperatively(projected: Sequence[Tensor], keep: int, choose: Choose = best_scored) -> tuple[Tensor, Tensor]:
    """Pool the tokens of all encoders and drop those that the other encoders already say.

    Source: METEOR (arXiv 2507.20842), cooperative fusion pruning: the tokens with the lowest mutual redundancy stay.

    Args:
        projected: one (M, N_l, C) per encoder.
        keep: K, tokens to keep of the pool; all of them changes nothing.
        choose: decides by the scores which tokens stay.

    Returns:
        (M, K, C) in encoder order, then raster order; and the kept indices (M, K) into the pool, ascending.

    Raises:
        ValueError: when `keep` exceeds the pool, or a score is NaN.
    """
    pool_MNC = torch.cat(list(projected), dim=1)
    images, total = pool_MNC.shape[:2]
    places_MN = torch.arange(total, device=pool_MNC.device).expand(images, -1)
    if keep == total:
        return pool_MNC, places_MN
    with torch.no_grad():  # selection has no gradient; what is kept carries its own
        scores_MN = -mutual_redundancy(projected)
        refuse_nan(scores_MN)
        keep_MK = choose(0, scores_MN, places_MN, keep)
    return gather_tokens(pool_MNC, keep_MK), keep_MK


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
