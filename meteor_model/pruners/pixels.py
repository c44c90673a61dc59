"""PixelPrune (arXiv 2604.00886): patches that their neighbours foretell are dropped before the tower's first block.

A patch is foretold by its left neighbour; by the upper one where the patch to the upper left equals the left one and
not the upper one, for then an edge runs upright between the columns (the predictor of JPEG-LS, on patches). In the
first row the left neighbour foretells, in the first column the upper one, and the first patch is always kept.

What is ours: every image keeps the same number, those patches that differ most from what was foretold (largest
difference of a channel of a pixel), where the published rule keeps all that differ by more than tau, and neighbours are
compared as they are; patches are a tower's own, on the pixels that it sees, so that a resized page has fewer exact
copies; a convolutional tower cannot lose pixels and drops the same cells of its output.

Legend: M images, N cells of the grid, r x c rows and columns, R a tower's resolution, F values of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meteor_model.pruners.encode_criteria import ENCODE_CRITERIA, Boundary


def patches_of(pixels_MCRR: Tensor, grid: tuple[int, int]) -> Tensor:
    """(M, r, c, F) fp32. ValueError where the image is not whole patches."""
    rows, columns = grid
    height, width = pixels_MCRR.shape[-2:]
    if height % rows or width % columns:
        raise ValueError(
            f"pruning.encode.criterion 'pixel_prediction' looks at whole patches: {height} x {width} pixels are not "
            f"{rows} x {columns} of them"
        )
    cells = pixels_MCRR.float().unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3)


def surprise(pixels_MCRR: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far each patch is from what its neighbours foretell, (M, N) fp32; infinity for the first."""
    g_MrcF = patches_of(pixels_MCRR, grid)

    def differ(first: Tensor, second: Tensor) -> Tensor:
        return (first - second).abs().amax(dim=-1)

    found_Mrc = g_MrcF.new_full(g_MrcF.shape[:3], torch.inf)
    found_Mrc[:, 0, 1:] = differ(g_MrcF[:, 0, 1:], g_MrcF[:, 0, :-1])
    found_Mrc[:, 1:, 0] = differ(g_MrcF[:, 1:, 0], g_MrcF[:, :-1, 0])
    here, left, above, corner = g_MrcF[:, 1:, 1:], g_MrcF[:, 1:, :-1], g_MrcF[:, :-1, 1:], g_MrcF[:, :-1, :-1]
    upright = (differ(corner, left) == 0) & (differ(corner, above) > 0)
    found_Mrc[:, 1:, 1:] = torch.where(upright, differ(here, above), differ(here, left))
    return found_Mrc.flatten(1)


@ENCODE_CRITERIA.register("pixel_prediction", before=True)
def pixel_prediction(boundary: Boundary) -> Tensor:
    """PixelPrune (arXiv 2604.00886): patches that their neighbours do not foretell, before the first block."""
    assert boundary.pixels_MCRR is not None, "encode_pruned gives it"
    return surprise(boundary.pixels_MCRR, boundary.grid).gather(1, boundary.positions_MN)
