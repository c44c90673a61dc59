"""The order of the stream: properties that must hold for every plan, against a literal enumeration of all rows."""

from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.ledger import Ledger
from pipelines.data.order import StreamPlan, WorkItem
from pipelines.data.sample_id import VOID_EPOCH, SampleIds
from tests.pipelines.data.elsewhere import printed_elsewhere

Row = tuple[int, int, int]


def enumerate_rows(plan: StreamPlan) -> list[Row]:
    """Every row of the plan by the four sentences of the module's description, in plain Python."""

    def permute(epoch: int, part: int, items: list) -> list:
        bits = np.random.Philox(key=np.array([plan.seed, epoch], dtype=np.uint64), counter=[0, 0, part, 0])
        keys = [int(bits.random_raw()) for _ in items]
        return [items[i] for i in sorted(range(len(items)), key=lambda i: (keys[i], i))]

    rows: list[Row] = []
    for epoch in range(plan.epochs):
        shards = permute(epoch, 0, list(range(len(plan.shard_samples))))
        for window, first in enumerate(range(0, len(shards), plan.window_shards)):
            samples = [
                (epoch, shard, index)
                for shard in shards[first : first + plan.window_shards]
                for index in range(plan.shard_samples[shard])
            ]
            rows += permute(epoch, window + 1, samples)
    while len(rows) % plan.global_batch:
        rows.append((VOID_EPOCH,) * 3)
    return rows


def rows_of(locations: SampleIds) -> list[Row]:
    """(epoch, shard, index) of every row; the dataset is 0 or, of void rows, -1."""
    dataset, *others = (column.tolist() for column in locations.columns)
    rows = list(zip(*others, strict=True))
    assert dataset == [-1 if row == (-1, -1, -1) else 0 for row in rows]
    return rows


def item_rows(item: WorkItem) -> list[Row]:
    return rows_of(item.sample_ids())


def located(plan: StreamPlan, rows: list[int]) -> list[Row]:
    return rows_of(plan.locate(np.array(rows, dtype=np.int64)))


plans = st.builds(
    StreamPlan,
    shard_samples=st.lists(st.integers(0, 7), min_size=1, max_size=9).filter(any),
    seed=st.integers(0, 2**63 - 1),
    epochs=st.integers(1, 3),
    global_batch=st.integers(1, 24),
    window_shards=st.integers(1, 10),
)


@settings(deadline=None)
@given(plans)
def test_random_access_and_work_items_equal_the_enumeration(plan: StreamPlan) -> None:
    rows = enumerate_rows(plan)
    assert len(rows) == plan.total_rows == plan.steps * plan.global_batch
    assert plan.total_rows == plan.steps * plan.global_batch
    assert 0 <= plan.total_rows - plan.total_samples < plan.global_batch
    backwards = list(range(plan.total_rows))[::-1]
    assert located(plan, backwards) == rows[::-1]
    assert [row for item in plan.work(0) for row in item_rows(item)] == rows


@settings(deadline=None)
@given(plans)
def test_every_sample_once_per_epoch(plan: StreamPlan) -> None:
    expected = {(shard, index) for shard, samples in enumerate(plan.shard_samples) for index in range(samples)}
    rows = located(plan, list(range(plan.total_rows)))
    for epoch in range(plan.epochs):
        of_epoch = rows[epoch * plan.epoch_samples : (epoch + 1) * plan.epoch_samples]
        assert {row[0] for row in of_epoch} == {epoch}
        assert len(of_epoch) == len(expected)
        assert {row[1:] for row in of_epoch} == expected
    assert rows[plan.total_samples :] == [(VOID_EPOCH,) * 3] * (plan.total_rows - plan.total_samples)


@settings(deadline=None)
@given(plans, st.data())
def test_any_range_of_rows_is_that_slice_of_the_stream(plan: StreamPlan, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.total_rows))
    stop = data.draw(st.one_of(st.none(), st.integers(start, plan.total_rows)))
    items = list(plan.work(start, stop))
    assert [row for item in items for row in item_rows(item)] == enumerate_rows(plan)[start:stop]
    ends = [item.first_row + item.rows for item in items]
    assert [item.first_row for item in items] == [start, *ends[:-1]][: len(items)]
    for item in items:
        assert item.is_void == (not item.shards)
        assert all(
            plan.shard_samples[shard] == samples > 0 for shard, samples in zip(item.shards, item.samples, strict=True)
        )
        assert len(item.shards) <= plan.window_shards
    windows = [(item.epoch, item.window) for item in items]
    assert len(set(windows)) == len(windows), "a window is read once"


@settings(deadline=None)
@given(plans, st.data())
def test_the_consumed_samples_are_those_of_the_first_rows(plan: StreamPlan, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, plan.total_rows))
    ledger = Ledger([plan.shard_samples])
    ledger.add(plan.locate(np.arange(rows)).take(slice(plan.total_samples)))
    planned = plan.consumed(rows)
    assert planned == ledger
    assert planned.to_bytes() == ledger.to_bytes()
    assert planned.trained == min(rows, plan.total_samples)
    for outside in (-1, plan.total_rows + 1):
        with pytest.raises(ValueError, match="no part of this stream"):
            plan.consumed(outside)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any), st.integers(0, 99), st.integers(1, 3))
@settings(deadline=None, max_examples=50)
def test_a_step_has_the_same_samples_for_every_world_size(sizes: list[int], seed: int, window_shards: int) -> None:
    micro_batch = 2
    plan = StreamPlan(sizes, seed, epochs=2, global_batch=24, window_shards=window_shards)
    for step in range(plan.steps):
        sets = []
        for world in (1, 2, 3, 4, 6):
            rows: list[int] = []
            for rank in range(world):
                for micro_step in range(plan.global_batch // (micro_batch * world)):
                    first = step * plan.global_batch + (micro_step * world + rank) * micro_batch
                    rows += range(first, first + micro_batch)
            assert len(rows) == plan.global_batch
            sets.append(sorted(located(plan, rows)))
        assert all(one == sets[0] for one in sets)


GOLDEN_SIZES = [5, 0, 7, 3, 9, 4]
GOLDEN_ROWS: list[Row] = [
    (0, 4, 7), (0, 4, 6), (0, 4, 0), (0, 4, 4), (0, 5, 3), (0, 2, 0), (1, 2, 6), (1, 2, 3), (1, 0, 1), (-1, -1, -1)
]  # fmt: skip
GOLDEN_SUM = 476662207


def golden_plan() -> StreamPlan:
    return StreamPlan(GOLDEN_SIZES, seed=20250720842, epochs=2, global_batch=10, window_shards=2)


def test_the_order_is_the_one_of_the_first_release() -> None:
    """A checkpoint names its position by a row, so the order may never change: new orders need a new name."""
    plan = golden_plan()
    assert located(plan, [0, 1, 2, 3, 20, 27, 28, 29, 55, 56]) == GOLDEN_ROWS
    big = StreamPlan([1000] * 50, seed=7, epochs=4, global_batch=512, window_shards=8)
    found = big.locate(np.arange(0, big.total_rows, 997))
    assert int(((found.shard * 1000 + found.index) * (np.arange(len(found.shard)) + 1)).sum()) == GOLDEN_SUM


def test_the_order_is_the_same_in_another_process() -> None:
    module = "tests.pipelines.data.test_order"
    code = f"from {module} import golden_plan, located; print(located(golden_plan(), list(range(60))))"
    assert printed_elsewhere(code) == [str(located(golden_plan(), list(range(60))))] * 2


def test_epochs_seeds_and_windows_have_orders_of_their_own() -> None:
    plan = StreamPlan([50] * 4, seed=1, epochs=2, global_batch=8, window_shards=2)
    rows = located(plan, list(range(400)))
    orders = [tuple(row[1:] for row in rows[:200]), tuple(row[1:] for row in rows[200:])]
    other_seed = StreamPlan([50] * 4, seed=2, epochs=2, global_batch=8, window_shards=2)
    orders.append(tuple(row[1:] for row in located(other_seed, list(range(200)))))
    orders.append(tuple((shard, index) for shard in range(4) for index in range(50)))
    assert len(set(orders)) == 4
    first, second = next(plan.work(0)), next(plan.work(100))
    assert [s % 50 for s in first.sample_ids().index] != [s % 50 for s in second.sample_ids().index]


def test_a_window_mixes_its_shards_evenly() -> None:
    plan = StreamPlan([1000] * 8, seed=3, epochs=1, global_batch=100, window_shards=8)
    shards = plan.locate(np.arange(plan.total_rows)).shard.reshape(8, 1000)
    counts = np.array([np.bincount(block, minlength=8) for block in shards])
    assert (abs(counts - 125) < 60).all(), "5.7 standard deviations"
    one_by_one = StreamPlan([1000] * 8, seed=3, epochs=1, global_batch=100, window_shards=1)
    assert all(len(set(block)) == 1 for block in one_by_one.locate(np.arange(8000)).shard.reshape(8, 1000).tolist())


def test_a_hundred_thousand_shards_cost_milliseconds_and_a_resume_no_more() -> None:
    plan = StreamPlan([10_000] * 100_000, seed=1, epochs=3, global_batch=4096, window_shards=4)
    late = plan.total_samples - 5
    item = next(plan.work(late))
    assert item.rows == 5
    last = plan.locate(np.array([late]))
    assert (int(last.epoch[0]), int(last.shard[0]), int(last.index[0])) == item_rows(item)[0]
    starts = [one.first_row for one in islice(plan.work(late - 200_000), 4)]
    assert all(after - before == 40_000 for before, after in pairwise(starts[1:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_samples": []}, "0 shards without a single sample"),
        ({"shard_samples": [0, 0]}, "2 shards without a single sample"),
        ({"shard_samples": [3, -1]}, "none of them negative"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"global_batch": 0}, "global_batch is 0"),
        ({"window_shards": 0}, "window_shards is 0"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict, message: str) -> None:
    good: dict[str, Any] = {"shard_samples": [3, 4], "seed": 0, "epochs": 1, "global_batch": 4, "window_shards": 2}
    StreamPlan(**good)
    with pytest.raises(ValueError, match=message):
        StreamPlan(**{**good, **changes})


def test_rows_outside_the_stream_are_named() -> None:
    plan = StreamPlan([3, 4], 0, 1, 4, 2)
    with pytest.raises(ValueError, match="row 8 is outside the stream of 8 rows"):
        plan.locate(np.array([0, 8]))
    with pytest.raises(ValueError, match="row -1"):
        plan.locate(np.array([-1]))
    assert list(plan.work(8)) == []
    for start, stop in [(9, None), (-1, None), (5, 4), (0, 9)]:
        with pytest.raises(ValueError, match="no part of this stream of 8 rows"):
            plan.work(start, stop)
