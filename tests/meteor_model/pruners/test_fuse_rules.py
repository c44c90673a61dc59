"""Criteria of stage 2 against slow, literal readings of their definitions.

Legend: M images, N tokens of the pool, K tokens kept, C width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meteor_model.fusion import pooled_attention, prune_pool
from meteor_model.pruners.fuse_criteria import FUSE_CRITERIA, Pool
from meteor_model.pruners.fuse_published import LAST_BUT_ONE, VSCAN_SHALLOW
from meteor_model.pruners.places import grid_cells, random_scores
from meteor_model.pruners.select import top_indices
from meteor_model.pruning_config import FusePruning
from tests.meteor_model.test_pruning import largest_tensor, randn

GRIDS = ((4, 4), (2, 3))
COUNT = 22


def pool_of(keep: int, images: int = 2, grids: tuple[tuple[int, int], ...] = GRIDS, width: int = 6) -> Pool:
    tokens = tuple(randn(images, rows * columns, width, seed=7 + i) + 0.3 for i, (rows, columns) in enumerate(grids))
    positions = tuple(torch.arange(item.shape[1]).expand(images, -1) for item in tokens)
    count = sum(item.shape[1] for item in tokens)
    attention = {look: randn(images, count, seed=20 + i).exp() for i, look in enumerate((LAST_BUT_ONE, VSCAN_SHALLOW))}
    return Pool(tokens, grids, positions, keep, attention, randn(images, width, seed=30))


def kept_by(name: str, pool: Pool, **options: float) -> list[list[int]]:
    scores_MN = FUSE_CRITERIA[name].run(pool, **options)
    return [sorted(row) for row in top_indices(scores_MN, pool.keep).tolist()]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))


# ------------------------------------------------------------------------------------------------- the readings, by row


def divprune(x: Tensor, keep: int, **_: Any) -> set[int]:
    n = len(x)
    distance = [[1 - cosine(x[i], x[j]) for j in range(n)] for i in range(n)]
    chosen = [max(range(n), key=lambda i: (min(distance[i][j] for j in range(n) if j != i), -i))]
    while len(chosen) < keep:
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(distance[i][j] for j in chosen), -i)))
    return set(chosen)


def greedy_determinant(kernel: Tensor, keep: int) -> set[int]:
    chosen: list[int] = []
    while len(chosen) < keep:
        rest = [i for i in range(len(kernel)) if i not in chosen]
        value = {i: float(torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])) for i in rest}
        chosen.append(max(rest, key=lambda i: (value[i], -i)))
    return set(chosen)


def cdpruner(x: Tensor, keep: int, text: Tensor, theta: float = 0.0, **_: Any) -> set[int]:
    relevance = torch.stack([(x[i].double() / x[i].double().norm()) @ text.double() for i in range(len(x))])
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    if theta:
        relevance = (theta * relevance / (2 * (1 - theta))).exp()
    similar = torch.tensor([[cosine(a, b) for b in x] for a in x], dtype=torch.float64)
    return greedy_determinant(relevance[:, None] * similar * relevance, keep)


def otprune(x: Tensor, keep: int, gamma: float = 0.01, **_: Any) -> set[int]:
    v = x.double() / x.double().std(dim=1, unbiased=False, keepdim=True)
    w = v @ v.T / x.shape[1]
    return greedy_determinant(torch.eye(len(x), dtype=torch.float64) + gamma * w @ w.T, keep)


def scope(x: Tensor, keep: int, attention: Tensor, alpha: float = 1.0, **_: Any) -> set[int]:
    n, chosen, covered = len(x), list[int](), [0.0] * len(x)
    while len(chosen) < keep:
        rest = [j for j in range(n) if j not in chosen]
        gain = {
            j: sum(max(0.0, cosine(x[i], x[j]) - covered[i]) for i in range(n)) * float(attention[j]) ** alpha
            for j in rest
        }
        chosen.append(max(rest, key=lambda j: (gain[j], -j)))
        covered = [max(covered[i], cosine(x[i], x[chosen[-1]])) for i in range(n)]
    return set(chosen)


def svd_prune(x: Tensor, keep: int, share: float = 0.9, **_: Any) -> set[int]:
    left, spectrum, _ = torch.linalg.svd(x.double(), full_matrices=False)
    held = (spectrum.square().cumsum(0) / spectrum.square().sum()).tolist()
    rank = next(i for i, value in enumerate(held, start=1) if value >= share)
    leverage = left[:, :rank].square().sum(dim=1).tolist()
    return set(sorted(range(len(x)), key=lambda i: (-leverage[i], i))[:keep])


def best(values: Tensor, among: list[int], count: int) -> list[int]:
    return sorted(among, key=lambda i: (-float(values[i]), i))[:count]


def visionzip(x: Tensor, keep: int, attention: Tensor, **_: Any) -> set[int]:
    dominant = min(max(round(keep * 54 / 64), 1), max(keep - 1, 1))
    first = best(attention, list(range(len(x))), dominant)
    rest = [i for i in range(len(x)) if i not in first]
    targets = keep - dominant
    return {*first, *rest[:: max(len(rest) // max(targets, 1), 1)][:targets]}


def vispruner(x: Tensor, keep: int, attention: Tensor, **_: Any) -> set[int]:
    first = best(attention, list(range(len(x))), max(round(keep / 2), 1))
    rest = [i for i in range(len(x)) if i not in first]
    while len(rest) > keep - len(first):
        even, odd = rest[::2], rest[1::2]
        like = {i: max((cosine(x[i], x[j]) for j in odd), default=0.0) for i in even}
        drop = min(8, len(rest) - (keep - len(first)), len(even))
        gone = sorted(even, key=lambda i: (-like[i], -i))[:drop]
        rest = [i for i in rest if i not in gone]
    return {*first, *rest}


READINGS: dict[str, Callable[..., set[int]]] = {
    "divprune": divprune,
    "cdpruner": cdpruner,
    "otprune": otprune,
    "scope": scope,
    "svd_prune": svd_prune,
    "visionzip": visionzip,
    "vispruner": vispruner,
}


@pytest.mark.parametrize("keep", [1, 2, 5, 13, COUNT])
@pytest.mark.parametrize("name", READINGS)
def test_a_rule_is_its_literal_reading(name: str, keep: int) -> None:
    # (Six channels: a determinant of more than six rows is rounding, and so is its order.)
    pool = pool_of(keep, width=24 if name in ("cdpruner", "otprune") else 6)
    if keep == COUNT and name == "visionzip":
        pool = pool._replace(keep=COUNT - 1)
    assert pool.attention is not None
    assert pool.text_MC is not None
    for image, found in enumerate(kept_by(name, pool)):
        attention = pool.attention[LAST_BUT_ONE][image]
        expected = READINGS[name](pool.tokens_MNC[image], pool.keep, attention=attention, text=pool.text_MC[image])
        assert found == sorted(expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cdpruner", {"theta": 0.5}),
        ("scope", {"alpha": 2.0}),
        ("svd_prune", {"share": 0.5}),
        ("otprune", {"gamma": 1.0}),
    ],
)
def test_options_are_those_of_the_definition(name: str, options: dict[str, float]) -> None:
    pool = pool_of(6, images=1, width=24)
    assert pool.attention is not None
    assert pool.text_MC is not None
    attention, text = pool.attention[LAST_BUT_ONE][0], pool.text_MC[0]
    expected = READINGS[name](pool.tokens_MNC[0], 6, attention=attention, text=text, **options)
    assert kept_by(name, pool, **options) == [sorted(expected)]


def test_vscan_takes_the_best_of_each_window_and_then_the_best() -> None:
    pool = pool_of(8, images=1, grids=((8, 6), (3, 3)))
    assert pool.attention is not None
    shallow, deep = pool.attention[VSCAN_SHALLOW][0], pool.attention[LAST_BUT_ONE][0]
    windows = [list(range(36)), list(range(36, 48)), list(range(48, 57))]  # 6 x 6, its remainder of 2 x 6, and 3 x 3
    local = [i for cells, share in zip(windows, (2, 1, 1), strict=True) for i in best(shallow, cells, share)]
    rest = [i for i in range(57) if i not in local]
    assert kept_by("vscan", pool) == [sorted([*local, *best(deep, rest, 4)])]


# --------------------------------------------------------------------------------------------------------- trivial rows


@given(st.integers(1, 9), st.integers(1, 9), st.data())
@settings(deadline=None, max_examples=150)
def test_a_grid_is_cut_into_exactly_as_many_rectangles(rows: int, columns: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, rows * columns))
    owner, middles = grid_cells((rows, columns), keep)
    assert sorted(set(owner)) == list(range(keep))
    assert [owner[middle] for middle in middles] == list(range(keep))
    assert middles == sorted(middles)
    for cell in range(keep):
        inside = [divmod(i, columns) for i in range(rows * columns) if owner[i] == cell]
        height, width = (len({place[axis] for place in inside}) for axis in (0, 1))
        assert len(inside) == height * width, "a rectangle"


def test_pooling_over_an_even_grid_is_average_pooling() -> None:
    pool = pool_of(4, grids=((4, 4),))
    pooled, keep = prune_pool(pool, FusePruning(keep=4, criterion="average_pooling"))
    maps = pool.tokens[0].transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(pooled, torch.nn.functional.avg_pool2d(maps, 2).flatten(2).transpose(1, 2))
    assert keep[0].tolist() == [5, 7, 13, 15]


def test_a_pruned_map_is_strided_and_pooled_in_raster_order() -> None:
    pool = pool_of(4, grids=((2, 3),))
    pool = pool._replace(grids=((4, 4),))
    strided, keep = prune_pool(pool, FusePruning(keep=2, criterion="stride"), top_indices_of(2))
    assert keep.shape == (2, 2)
    pooled, _ = prune_pool(pool._replace(keep=3), FusePruning(keep=3, criterion="average_pooling"))
    torch.testing.assert_close(pooled, pool.tokens[0].unflatten(1, (3, 2)).mean(dim=2))
    assert strided.shape == (2, 2, 6)


def top_indices_of(keep: int) -> Any:
    return lambda boundary, scores_MN, places_MN, budget: top_indices(scores_MN, keep)


def test_random_places_do_not_depend_on_how_many_there_are() -> None:
    few, many = random_scores(10, 3, torch.device("cpu")), random_scores(400, 3, torch.device("cpu"))
    assert torch.equal(few, many[:10])
    assert len(set(many.tolist())) == 400
    assert not torch.equal(few, random_scores(10, 4, torch.device("cpu")))
    assert 0.4 < float((many / 2**24).mean()) < 0.6


# --------------------------------------------------------------------------------------------------------------- merges


def test_visionzip_merges_what_is_left_into_its_targets() -> None:
    pool = pool_of(8, images=1)
    assert pool.attention is not None
    tokens, attention = pool.tokens_MNC[0], pool.attention[LAST_BUT_ONE][0]
    merged, keep = prune_pool(pool, FusePruning(keep=8, criterion="visionzip"))
    first = best(attention, list(range(COUNT)), 7)
    rest = [i for i in range(COUNT) if i not in first]
    target = rest[0]  # one of eight is merged into
    expected = {i: tokens[i] for i in first} | {target: tokens[rest].mean(dim=0)}
    for place, index in enumerate(keep[0].tolist()):
        torch.testing.assert_close(merged[0, place], expected[index])


def test_vscan_averages_every_dropped_token_into_its_nearest() -> None:
    pool = pool_of(6, images=1)
    merged, keep = prune_pool(pool, FusePruning(keep=6, criterion="vscan"))
    tokens, kept = pool.tokens_MNC[0], keep[0].tolist()
    members: dict[int, list[int]] = {index: [index] for index in kept}
    for i in range(COUNT):
        if i not in kept:
            members[max(kept, key=lambda j: cosine(tokens[i], tokens[j]))].append(i)
    for place, index in enumerate(kept):
        torch.testing.assert_close(merged[0, place], tokens[members[index]].mean(dim=0))


def test_attention_of_towers_is_comparable_and_follows_the_joint_grid() -> None:
    first, second = torch.tensor([[1.0, 3.0, 0.0, 4.0]]), None
    assert pooled_attention([first, second], [(2, 2), (1, 2)], None).tolist() == [[0.5, 1.5, 0.0, 2.0, 1.0, 1.0]]
    joint = pooled_attention([first, second], [(2, 2), (1, 2)], 3)
    assert joint.shape == (1, 9)
    assert joint[0, [0, 2, 6, 8]].tolist() == [0.5, 1.5, 0.0, 2.0]


# --------------------------------------------------------------------------------------------------------------- memory

#: They hold the similarities, or the singular vectors, of all tokens of an image.
WHOLE_MAP = {"scope", "svd_prune", "coverage", "coverage_text"}


@pytest.mark.parametrize("name", sorted(set(FUSE_CRITERIA) - WHOLE_MAP))
def test_no_map_of_all_tokens_exists(name: str) -> None:
    side, width = 32, 8
    pool = pool_of(12, images=1, grids=((side, side), (side, side)), width=width)
    count = 2 * side * side
    _, largest = largest_tensor(lambda: FUSE_CRITERIA[name].run(pool))
    assert largest <= max(256 * count, width * count), f"N x N is {count * count}"
    assert math.isfinite(float(FUSE_CRITERIA[name].run(pool).sum()))
