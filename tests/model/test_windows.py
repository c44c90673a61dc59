"""Window attention on kept tokens, and the towers that have it: EVA-02, its detector layout, SAM.

Oracles: a loop over samples and windows; full attention with everything outside a window masked; the library's own
modules on all tokens with the dropped ones masked out as keys.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meteor_model.encoders.windows import (
    Sink,
    attend_in_windows,
    blocked,
    from_windows,
    local_cells,
    pair_bias,
    partition,
    to_windows,
    unpartition,
    window_extent,
    window_layout,
)

#: name -> grid, window, kept cells of each image (equally many): even, very uneven, windows left empty, N = 1.
KEEPS: dict[str, tuple[tuple[int, int], int, list[list[int]]]] = {
    "all cells": ((4, 4), 2, [list(range(16)), list(range(16))]),
    "uneven": ((4, 4), 2, [[0, 1, 4, 5, 10], [2, 8, 11, 14, 15]]),
    "one image loses a window": ((4, 4), 2, [[0, 2, 8, 10], [0, 1, 4, 8]]),
    "one token": ((4, 4), 2, [[15], [6]]),
    "windows that stick out": ((5, 5), 2, [[0, 4, 9, 20, 24, 12], [1, 2, 3, 4, 23, 24]]),
    "window larger than the grid": ((3, 3), 4, [[0, 4, 8], [1, 2, 3]]),
}


@pytest.fixture(params=sorted(KEEPS))
def case(request: pytest.FixtureRequest) -> tuple[tuple[int, int], int, Tensor]:
    grid, window, cells = KEEPS[request.param]
    return grid, window, torch.tensor(cells)


def qkv(positions_MN: Tensor, seed: int = 0, heads: int = 2, width: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (positions_MN.shape[0], heads, positions_MN.shape[1], width)
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def same_window(positions_MN: Tensor, columns: int, window: int) -> Tensor:
    """(M, N, N) bool, pair by pair."""
    images, present = positions_MN.shape
    same = torch.zeros(images, present, present, dtype=torch.bool)
    for image in range(images):
        for i in range(present):
            for j in range(present):
                a, b = int(positions_MN[image, i]), int(positions_MN[image, j])
                same[image, i, j] = (a // columns // window, a % columns // window) == (
                    b // columns // window,
                    b % columns // window,
                )
    return same


def test_layout_groups_each_token_with_its_window(case: tuple[tuple[int, int], int, Tensor]) -> None:
    grid, window, positions = case
    layout = window_layout(positions, grid, window)
    windows_across = -(-grid[1] // window)
    for image, cells in enumerate(positions.tolist()):
        members: dict[int, list[int]] = {}
        for token, cell in enumerate(cells):
            members.setdefault(cell // grid[1] // window * windows_across + cell % grid[1] // window, []).append(token)
        for index, filled in enumerate(layout.filled_MWn[image]):
            slots = layout.token_MS[image].unflatten(0, layout.filled_MWn.shape[1:])[index]
            assert slots[filled].tolist() == members.get(index, [])
    most = max(int(row.sum()) for row in layout.filled_MWn.flatten(0, 1))
    assert layout.filled_MWn.shape[2] == most, "no more slots than the fullest window needs"
    tokens = torch.randn(*positions.shape, 3)[:, None]
    assert torch.equal(from_windows(to_windows(tokens, layout), layout), tokens[:, 0])


@pytest.mark.parametrize("biased", [False, True])
def test_window_attention_equals_masked_full_attention(case: tuple[tuple[int, int], int, Tensor], biased: bool) -> None:
    """Forward and gradient, with and without relative positions."""
    grid, window, positions = case
    layout = window_layout(positions, grid, window)
    query, key, value = qkv(positions)
    terms = [x.requires_grad_() for x in torch.randn(2, *query.shape[:3], window, dtype=torch.float64)]
    rows, columns = local_cells(positions, grid[1], window)

    bias = None
    if biased:
        cells = [to_windows(x[:, None, :, None], layout)[:, 0, :, 0] for x in (rows, columns)]
        bias = pair_bias(*(to_windows(term, layout) for term in terms), *cells)
    ours = attend_in_windows(query, key, value, layout, bias_GHnn=bias)

    logits = query @ key.transpose(2, 3) / query.shape[3] ** 0.5
    if biased:
        logits = logits + torch.stack(
            [
                torch.stack(
                    [terms[0][m, :, :, rows[m, j]] + terms[1][m, :, :, columns[m, j]] for j in range(len(rows[m]))], 2
                )
                for m in range(len(positions))
            ]
        )
    logits = logits.masked_fill(~same_window(positions, grid[1], window)[:, None], float("-inf"))
    literal = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours, literal)

    inputs = [query, key, value, *(terms if biased else [])]
    weight = torch.randn_like(literal)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((literal * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_a_sink_stands_for_any_number_of_equal_cells(case: tuple[tuple[int, int], int, Tensor]) -> None:
    """Against a loop over samples and windows that attends to every zero cell one by one."""
    grid, window, positions = case
    query, key, value = qkv(positions)
    heads, width = query.shape[1], query.shape[3]
    sink_key, sink_value = torch.randn(2, heads, width, dtype=torch.float64)
    rows, columns = window_extent(positions, grid, window)
    count = window**2 - rows * columns
    logit = count.clamp(min=1).double().log().masked_fill(count == 0, blocked(torch.float64))
    layout = window_layout(positions, grid, window)
    ours = attend_in_windows(query, key, value, layout, sink=Sink(sink_key, sink_value, logit[:, None]))
    same = same_window(positions, grid[1], window)
    for image in range(len(positions)):
        for token in range(positions.shape[1]):
            members = same[image, token].nonzero()[:, 0]
            extra = int(count[image, token])
            keys = torch.cat([key[image][:, members], sink_key[:, None].expand(-1, extra, -1)], dim=1)
            values = torch.cat([value[image][:, members], sink_value[:, None].expand(-1, extra, -1)], dim=1)
            weights = (torch.einsum("hd,hkd->hk", query[image, :, token], keys) / width**0.5).softmax(-1)
            expected = torch.einsum("hk,hkd->hd", weights, values).flatten()
            torch.testing.assert_close(ours[image, token], expected)


def test_partition_by_reshape_is_the_layout_of_all_cells() -> None:
    hidden = torch.randn(2, 25, 3)
    windows = partition(hidden, (5, 5), 2)
    assert windows.shape == (2 * 9, 4, 3)
    grid = F.pad(hidden.unflatten(1, (5, 5)), (0, 0, 0, 1, 0, 1))
    assert torch.equal(windows[9 + 5], grid[1, 2:4, 4:6].flatten(0, 1))
    assert torch.equal(unpartition(windows, (5, 5), 2), hidden)
