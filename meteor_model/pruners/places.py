"""Scores that look at places only: at random, at even distances, and cells of a grid for stride and pooling.

Legend: N tokens, K tokens kept, r x c rows and columns of a grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meteor_model.pruners.tower_scores import evenly_spaced


def random_scores(count: int, seed: int, device: torch.device) -> Tensor:
    """Pseudo-random scores (N,) fp32: of a place and the seed alone, so the same in every batch and on every device.

    The finaliser of MurmurHash3 (Appleby, public domain), in 32-bit arithmetic; its upper 24 bits.
    """
    low = 0xFFFFFFFF
    hash_N = (torch.arange(count, device=device) + 0x9E3779B9 * (seed + 1)) & low
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hash_N = ((hash_N ^ (hash_N >> shift)) * factor) & low
    return ((hash_N ^ (hash_N >> 16)) >> 8).float()


def even_scores(count: int, keep: int, device: torch.device) -> Tensor:
    """Scores (N,) fp32 whose `keep` largest are at even distances: the middle of each of `keep` equal parts."""
    scores_N = torch.zeros(count, device=device)
    return scores_N if keep == 0 else scores_N.index_fill(0, evenly_spaced(count, keep, device), 1.0)


def grid_cells(grid: tuple[int, int], keep: int) -> tuple[list[int], list[int]]:
    """Cut a grid into exactly `keep` rectangles of near equal size.

    Bands of rows are cut first, as many as give nearly square rectangles; then each band into its share of columns.
    Where `keep` divides the grid evenly these are the windows of pooling; `keep` = r * c gives single tokens.

    Returns:
        for each token in raster order, the rectangle that it is in (ascending by band, then column); and the token in
        the middle of each rectangle.
    """
    rows, columns = grid
    bands = min(rows, max(round((keep * rows / columns) ** 0.5), -(-keep // columns), 1), keep)
    owner, middles, first = [0] * (rows * columns), [], 0
    for band in range(bands):
        top, bottom = band * rows // bands, (band + 1) * rows // bands
        parts = (band + 1) * keep // bands - band * keep // bands
        for part in range(parts):
            left, right = part * columns // parts, (part + 1) * columns // parts
            for row in range(top, bottom):
                for column in range(left, right):
                    owner[row * columns + column] = first + part
            middles.append((top + bottom) // 2 * columns + (left + right) // 2)
        first += parts
    return owner, middles
