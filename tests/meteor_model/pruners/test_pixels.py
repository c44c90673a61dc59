"""PixelPrune against a slow, literal reading, and in front of a real tower.

Legend: M images, N cells, K cells kept.
"""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor

from meteor_model.encode import encode_pruned
from meteor_model.encoders import VisionEncoder
from meteor_model.flops import count_flops, flop_counter
from meteor_model.pruners.named import with_pruner
from meteor_model.pruners.pixels import surprise
from meteor_model.pruners.select import gather_tokens, select_top
from tests.meteor_model.builders import DENSE, model, pixels
from tests.meteor_model.pruners.build import pruned_model

GRID = (5, 6)


def page(images: int = 3, patch: int = 4) -> Tensor:
    """A page: white, bars and columns of one colour, some noise; (M, 3, rows * patch, columns * patch)."""
    generator = torch.Generator().manual_seed(5)
    cells_MCrc = torch.ones(images, 3, *GRID)
    cells_MCrc[:, :, 1, :] = 0.25
    cells_MCrc[1, :, :, 3:] = torch.tensor([0.5, 0.1, 0.9])[:, None, None]
    cells_MCrc[2] = torch.randint(0, 2, (3, *GRID), generator=generator).float()
    drawn = cells_MCrc.repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    drawn[:, :, 2 * patch : 3 * patch, patch : 2 * patch] = torch.rand(images, 3, patch, patch, generator=generator)
    return drawn


def surprise_literally(image_CRR: Tensor) -> list[float]:
    rows, columns = GRID
    patch = image_CRR.shape[1] // rows

    def cell(r: int, c: int) -> Tensor:
        return image_CRR[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]

    found = []
    for r in range(rows):
        for c in range(columns):
            if r == c == 0:
                found.append(float("inf"))
                continue
            if c == 0:
                told = cell(r - 1, 0)
            elif r == 0:
                told = cell(0, c - 1)
            else:
                corner, left, above = cell(r - 1, c - 1), cell(r, c - 1), cell(r - 1, c)
                upright = torch.equal(corner, left) and not torch.equal(corner, above)
                told = above if upright else left
            found.append(float((cell(r, c) - told).abs().max()))
    return found


def test_surprise_is_its_literal_reading() -> None:
    images = page()
    found = surprise(images, GRID).tolist()
    assert found == [surprise_literally(image) for image in images]
    # The first page is foretold but for its corner, its bar, what follows, and the noise with its neighbours.
    assert sum(value > 0 for value in found[0]) == 6


def test_copies_go_first_and_what_is_kept_is_exact() -> None:
    kept = select_top(surprise(page(), GRID), 6)[0].tolist()
    assert kept == [index for index, value in enumerate(surprise_literally(page()[0])) if value > 0]


def test_an_image_that_is_not_whole_patches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"20 x 21 pixels are not 5 x 6 of them"):
        surprise(torch.zeros(1, 3, 20, 21), GRID)


@torch.no_grad()
def test_patches_are_gone_before_the_first_block() -> None:
    net = pruned_model("pixelprune", 8)
    for name, encoder in net.encoders.items():
        tower, (budget,) = cast(VisionEncoder, encoder), net.config.encode_budgets[name]
        seen = tower.normalize(pixels(2), torch.float32)
        found, (kept_MK,) = encode_pruned(tower, seen, (budget,), 1, None, criterion="pixel_prediction")
        assert kept_MK.tolist() == select_top(surprise(seen, tower.grid), budget).tolist()
        cells_MN = torch.arange(tower.grid[0] * tower.grid[1]).expand(2, -1)
        hidden = tower.embed(seen)
        if not tower.prunes_between_blocks:
            for index in range(len(tower.blocks)):
                hidden = tower.run_block(index, hidden, cells_MN)
            expected = gather_tokens(tower.finish(hidden, cells_MN), kept_MK)
        else:
            prefix = tower.num_prefix_tokens
            hidden = torch.cat([hidden[:, :prefix], gather_tokens(hidden[:, prefix:], kept_MK)], dim=1)
            for index in range(len(tower.blocks)):
                hidden = tower.run_block(index, hidden, kept_MK)
            expected = tower.finish(hidden, kept_MK)[:, prefix:]
        assert torch.equal(found.hidden, expected)
    assert sum(net.config.encode_budgets[name][0] for name in net.encoders) == 8


@torch.no_grad()
def test_a_tower_s_flops_are_those_of_the_patches_that_stay() -> None:
    net = model(DENSE)
    net.config = with_pruner(net.config, "pixelprune", 48)
    report, dense = count_flops(net.config), count_flops(model(DENSE).config)
    with flop_counter() as vision:
        net.encode_images(pixels(1))
    assert vision.get_total_flops() == report.encoding + report.projection + report.fusion
    assert report.encoders[0].tower < dense.encoders[0].tower / 2
