"""Window attention on kept tokens.

Oracles: full attention with everything outside a window masked; a loop over samples and windows.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meteor_model.encoders.windows import (
    BUCKETS,
    Memo,
    Relative,
    Sink,
    attend_in_windows,
    blocked,
    from_slots,
    local_cells,
    partition,
    to_slots,
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
    shape = (*positions_MN.shape, heads, width)
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
    members: dict[tuple[int, int], list[int]] = {}
    for image, cells in enumerate(positions.tolist()):
        for token, cell in enumerate(cells):
            key = (image, cell // grid[1] // window * windows_across + cell % grid[1] // window)
            members.setdefault(key, []).append(image * positions.shape[1] + token)
    found, step = [], window * window / BUCKETS
    tokens, seen = layout.token_F, layout.seen_F
    for windows, slots, has_empty in layout.buckets:
        counts = []
        for _ in range(windows):
            found.append(tokens[:slots][seen[:slots]].tolist())
            counts.append(len(found[-1]))
            tokens, seen = tokens[slots:], seen[slots:]
        assert max(counts) == slots, "no more slots than the fullest window of the bucket needs"
        assert has_empty == (min(counts) < slots)
        assert slots - min(counts) < step
    assert len(tokens) == 0
    assert sorted(found) == sorted(members.values()), "every window that has tokens, and no other"
    values = torch.randn(*positions.shape, 3)
    assert torch.equal(from_slots(to_slots(values, layout), layout), values)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "static bound"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "relative positions"])
def test_window_attention_equals_masked_full_attention(
    case: tuple[tuple[int, int], int, Tensor], biased: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and gradient; in the layout of a compiled call, too, where empty windows have slots."""
    grid, window, positions = case
    if compiled:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    layout = window_layout(positions, grid, window)
    query, key, value = qkv(positions)
    rows, columns = local_cells(positions, grid[1], window)
    terms = [torch.randn(*query.shape[:3], window, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ours = attend_in_windows(query, key, value, layout, Relative(terms[0], terms[1], rows, columns) if biased else None)

    logits = torch.einsum("mqhd,mkhd->mhqk", query, key) / query.shape[3] ** 0.5
    if biased:
        added = [
            torch.stack([terms[0][m, :, :, rows[m, j]] + terms[1][m, :, :, columns[m, j]] for j in range(len(rows[m]))])
            for m in range(len(positions))
        ]
        logits = logits + torch.stack(added).permute(0, 3, 2, 1)
    logits = logits.masked_fill(~same_window(positions, grid[1], window)[:, None], float("-inf"))
    literal = torch.einsum("mhqk,mkhd->mqhd", logits.softmax(-1), value).flatten(2)
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
    heads, width = query.shape[2:]
    sink_key, sink_value = torch.randn(2, heads, width, dtype=torch.float64)
    rows, columns = window_extent(positions, grid, window)
    count = window**2 - rows * columns
    logit = count.clamp(min=1).double().log().masked_fill(count == 0, blocked(torch.float64))
    layout = window_layout(positions, grid, window)
    ours = attend_in_windows(query, key, value, layout, sink=Sink(sink_key, sink_value, logit[..., None]))
    same = same_window(positions, grid[1], window)
    for image in range(len(positions)):
        for token in range(positions.shape[1]):
            members = same[image, token].nonzero()[:, 0]
            extra = int(count[image, token])
            keys = torch.cat([key[image, members], sink_key.expand(extra, -1, -1)])
            values = torch.cat([value[image, members], sink_value.expand(extra, -1, -1)])
            weights = (torch.einsum("hd,khd->hk", query[image, token], keys) / width**0.5).softmax(-1)
            expected = torch.einsum("hk,khd->hd", weights, values).flatten()
            torch.testing.assert_close(ours[image, token], expected)


def test_extent_counts_the_cells_of_a_window_that_are_in_the_grid() -> None:
    rows, columns = window_extent(torch.arange(25)[None], (5, 5), 2)
    assert rows.view(5, 5)[:, 0].tolist() == [2, 2, 2, 2, 1]
    assert columns.view(5, 5)[0].tolist() == [2, 2, 2, 2, 1]


def test_partition_by_reshape_is_the_layout_of_all_cells() -> None:
    hidden = torch.randn(2, 25, 3)
    windows = partition(hidden, (5, 5), 2)
    assert windows.shape == (2 * 9, 4, 3)
    grid = F.pad(hidden.unflatten(1, (5, 5)), (0, 0, 0, 1, 0, 1))
    assert torch.equal(windows[9 + 5], grid[1, 2:4, 4:6].flatten(0, 1))
    assert torch.equal(unpartition(windows, (5, 5), 2), hidden)


def test_a_memo_computes_once_for_the_same_tensor_and_is_not_copied() -> None:
    memo, calls = Memo[int](), []

    def count(positions: Tensor) -> int:
        calls.append(positions)
        return len(calls)

    first, equal = torch.arange(3), torch.arange(3)
    assert [memo(first, count), memo(first, count), memo(equal, count), memo(first, count)] == [1, 1, 2, 3]
    assert copy.deepcopy(memo)(first, count) == 4
