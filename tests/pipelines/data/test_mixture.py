"""The order over several datasets: properties that must hold for every mixture, against a literal enumeration."""

import heapq
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from math import lcm
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config.settings import DataSettings, SettingsError
from pipelines.data import mixture
from pipelines.data.ledger import Ledger
from pipelines.data.mixture import BLOCK, ITEM_WINDOWS, Item, Merge, MixturePlan, make_plan, read_amplification
from pipelines.data.order import StreamPlan
from pipelines.data.sample_id import SampleId, SampleIds
from pipelines.data.shards import ShardInfo, save_manifest
from tests.pipelines.data.elsewhere import printed_elsewhere

Row = tuple[int, int, int, int]
VOID: Row = (-1, -1, -1, -1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small plans then have many blocks and items; what needs the real size sets it back."""
    monkeypatch.setattr(mixture, "BLOCK", 8)
    monkeypatch.setattr(mixture, "ITEM_WINDOWS", 2)


def rows_of(source: MixturePlan | StreamPlan | Item, rows: list[int] | None = None) -> list[Row]:
    found = source.sample_ids() if rows is None else source.locate(np.array(rows, dtype=np.int64))  # type: ignore[union-attr]
    return list(zip(*(column.tolist() for column in found.columns), strict=True))


def every(plan: MixturePlan | StreamPlan) -> list[Row]:
    return rows_of(plan, list(range(plan.total_rows)))


def merged_evenly(quotas: tuple[int, ...]) -> list[int]:
    """Step 2 in plain fractions: the dataset of every row."""
    keys = [(Fraction(2 * i + 1, 2 * quota), d) for d, quota in enumerate(quotas) for i in range(quota)]
    return [dataset for _, dataset in sorted(keys)]


def enumerate_rows(plan: MixturePlan) -> list[Row]:
    """Every row of the plan by the four sentences of the module's description."""
    even, rows = merged_evenly(plan.quotas), []
    streams = [iter(rows_of(stream, list(range(stream.total_samples)))) for stream in plan.streams]
    for number, first in enumerate(range(0, len(even), mixture.BLOCK)):
        block = sorted(even[first : first + mixture.BLOCK])
        bits = np.random.Philox(key=np.array([plan.seed, 2**64 - 1], dtype=np.uint64), counter=[0, 0, number, 0])
        keys = [int(bits.random_raw()) for _ in block]
        rows += [next(streams[block[i]]) for i in sorted(range(len(block)), key=lambda i: (keys[i], i))]
    return rows + [VOID] * (-len(rows) % plan.global_batch)


shards = st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any)
weights = st.sampled_from([0.25, 0.5, 1.0, 1.0, 1.3, 2.0, 3.0])


@st.composite
def mixtures(draw: st.DrawFn) -> MixturePlan:
    count = draw(st.integers(1, 4))
    sizes = [draw(shards) for _ in range(count)]
    epochs = draw(st.integers(1, 3))
    drawn = [draw(weights) for _ in sizes]
    # Too few samples for their weight are refused, see below.
    chosen = [w if round(Fraction(str(w)) * sum(s) * epochs) else 1.0 for w, s in zip(drawn, sizes, strict=True)]
    seed = draw(st.integers(0, 2**63 - 1))
    return MixturePlan(sizes, chosen, seed, epochs, draw(st.integers(1, 24)), draw(st.integers(1, 4)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_the_even_merge_is_a_sort_of_fractions(quotas: list[int]) -> None:
    merge = Merge(0, tuple(quotas), block_rows=8)
    even = merged_evenly(merge.quotas)
    for row in range(merge.total + 1):
        counts = Counter(even[:row])
        assert merge.evenly(row) == [counts[dataset] for dataset in range(len(quotas))]
        assert sum(merge.positions(row)) == row


def evenly_by_common_multiple(quotas: tuple[int, ...], row: int) -> list[int]:
    """The first release's way: keys as integers over the quotas' common multiple, the smallest taken one by one."""
    common = lcm(*quotas)
    units = [common // quota for quota in quotas]
    below = max(0, common * (2 * row - len(units) - 2) // sum(quotas))
    counts = [((below - 1) // unit + 1) // 2 for unit in units]
    next_keys = [((2 * counts[dataset] + 1) * unit, dataset) for dataset, unit in enumerate(units)]
    heapq.heapify(next_keys)
    for _ in range(row - sum(counts)):
        key, dataset = next_keys[0]
        counts[dataset] += 1
        heapq.heapreplace(next_keys, (key + 2 * units[dataset], dataset))
    return counts


big_quotas = st.one_of(st.integers(1, 2**42), st.integers(2**40 - 3, 2**40 + 3), st.sampled_from([1, 3, 10**6]))


@settings(deadline=None)
@given(st.lists(big_quotas, min_size=1, max_size=8), st.integers(1, 3), st.data())
def test_large_quotas_are_merged_by_exact_fractions(quotas: list[int], block_rows: int, data: st.DataObject) -> None:
    """Keys that are one float and two fractions, as in the middle of two quotas of 2**40 - 1 and 2**40 + 1."""
    merge = Merge(5, tuple(quotas), block_rows)
    near = st.one_of(st.integers(0, merge.total), st.integers(max(0, merge.total // 2 - 20), merge.total // 2))
    row = data.draw(near)
    assert merge.evenly(row) == evenly_by_common_multiple(merge.quotas, row)
    rows = data.draw(st.integers(0, min(40, merge.total - row)))
    blocks = range(row // block_rows, -(-(row + rows) // block_rows))
    wanted = [dataset for number in blocks for dataset in merge.block(number)[1].tolist()]
    found = [dataset for piece in merge.datasets(row, rows) for dataset in piece.tolist()]
    assert found == wanted[row % block_rows :][:rows]


def test_the_first_rows_of_200_datasets_are_there_before_the_item_is_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item of so many datasets holds millions of rows; laying all of them out first took 70 s."""
    monkeypatch.setattr(mixture, "BLOCK", BLOCK)
    monkeypatch.setattr(mixture, "ITEM_WINDOWS", ITEM_WINDOWS)
    generator = np.random.default_rng(0)
    sizes = [generator.integers(5000, 10_000, generator.integers(20, 400)) for _ in range(200)]
    plan = MixturePlan(sizes, generator.uniform(0.3, 3, 200).round(2).tolist(), 7, 2, 256, 4)
    item = next(plan.work(0))
    assert item.rows > 10**7
    laid_out: list[int] = []
    merged = Merge._blocks

    def counted(merge: Merge, number: int, stop: int) -> Any:
        laid_out.append(stop - number)
        return merged(merge, number, stop)

    monkeypatch.setattr(Merge, "_blocks", counted)
    pieces = item.datasets()
    first = next(pieces)
    assert sum(laid_out) * BLOCK == len(first) <= item.rows / 50
    assert first.tolist() == np.concatenate([plan.merge.block(n)[1] for n in range(laid_out[0])]).tolist()
    numbers = plan.merge._key(plan.merge.quotas[0] - 1, plan.merge.quotas[0])
    assert numbers.bit_length() < 128, "comparing keys does not become slower with the number of datasets"


@settings(deadline=None)
@given(mixtures())
def test_random_access_and_work_items_equal_the_enumeration(plan: MixturePlan) -> None:
    rows = enumerate_rows(plan)
    assert len(rows) == plan.total_rows == plan.steps * plan.global_batch
    assert plan.total_rows == plan.steps * plan.global_batch
    backwards = list(range(plan.total_rows))[::-1]
    assert rows_of(plan, backwards) == rows[::-1]
    items = list(plan.work(0))
    assert [row for item in items for row in rows_of(item)] == rows
    assert [dataset for item in items for piece in item.datasets() for dataset in piece.tolist()] == [
        row[0] for row in rows
    ]


@settings(deadline=None)
@given(mixtures())
def test_every_sample_once_per_pass_and_passes_follow_each_other(plan: MixturePlan) -> None:
    rows = [row for row in every(plan) if row != VOID]
    assert len(set(rows)) == len(rows) == plan.total_samples
    for dataset, (sizes, weight) in enumerate(zip(plan.sizes, plan.weights, strict=True)):
        samples = {(shard, index) for shard, size in enumerate(sizes) for index in range(size)}
        mine = [row[1:] for row in rows if row[0] == dataset]
        assert len(mine) == round(Fraction(str(weight)) * len(samples) * plan.epochs) == plan.quotas[dataset]
        passes = [row[0] for row in mine]
        assert passes == sorted(passes)
        for number in range(passes[-1] + 1):
            of_pass = {row[1:] for row in mine if row[0] == number}
            assert of_pass == samples if number < passes[-1] else of_pass <= samples
        times = Counter(row[1:] for row in mine)
        exact = Fraction(len(mine), len(samples))
        assert {times[sample] for sample in samples} <= {int(exact), -int(-exact // 1)}


@settings(deadline=None)
@given(mixtures(), st.data())
def test_any_range_of_rows_is_that_slice_of_the_stream(plan: MixturePlan, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, plan.total_rows))
    stop = data.draw(st.one_of(st.none(), st.integers(start, plan.total_rows)))
    items = list(plan.work(start, stop))
    assert [row for item in items for row in rows_of(item)] == enumerate_rows(plan)[start:stop]
    assert [item.first_row for item in items] == [start, *(item.first_row + item.rows for item in items)][: len(items)]
    for item in items:
        assert item.is_void == (not item.parts)
        assert [part.dataset for part in item.parts] == sorted(part.dataset for part in item.parts)
        for part in item.parts:
            assert [plan.sizes[part.dataset][shard] for shard in part.shards] == list(part.samples)


@settings(deadline=None)
@given(mixtures(), st.data())
def test_the_consumed_samples_are_those_of_the_first_rows(plan: MixturePlan, data: st.DataObject) -> None:
    rows = data.draw(st.integers(0, plan.total_rows))
    ledger = Ledger(plan.sizes)
    ledger.add(SampleIds.of(SampleId(*row) for row in every(plan)[:rows] if row != VOID))
    assert plan.consumed(rows).to_bytes() == ledger.to_bytes()
    with pytest.raises(ValueError, match="no part of this stream"):
        plan.consumed(plan.total_rows + 1)


@given(mixtures())
@settings(deadline=None, max_examples=50)
def test_a_step_has_the_same_samples_for_every_world_size(drawn: MixturePlan) -> None:
    micro_batch = 2
    plan = MixturePlan(drawn.sizes, drawn.weights, drawn.seed, drawn.epochs, global_batch=24, window_shards=2)
    everything = every(plan)
    for step in range(plan.steps):
        sets = []
        for world in (1, 2, 3, 4, 6):
            firsts = [
                step * plan.global_batch + (micro_step * world + rank) * micro_batch
                for rank in range(world)
                for micro_step in range(plan.global_batch // (micro_batch * world))
            ]
            sets.append(sorted(row for first in firsts for row in everything[first : first + micro_batch]))
        assert all(one == sets[0] for one in sets)


@settings(deadline=None)
@given(shards, st.integers(0, 2**63 - 1), st.integers(1, 3), st.integers(1, 24), st.integers(1, 4))
def test_one_dataset_of_weight_one_is_the_plain_stream(
    sizes: list[int], seed: int, epochs: int, global_batch: int, window_shards: int
) -> None:
    plain = StreamPlan(sizes, seed, epochs, global_batch, window_shards)
    mixed = MixturePlan([sizes], [1.0], seed, epochs, global_batch, window_shards)
    assert every(mixed) == every(plain)
    assert list(mixed.work(0)) == list(plain.work(0))
    assert isinstance(make_plan([sizes], [1], seed, epochs, global_batch, window_shards), StreamPlan)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.integers(0, 2**63 - 1), st.data())
def test_the_share_in_every_prefix_is_within_the_stated_bound(
    quotas: list[int], seed: int, data: st.DataObject
) -> None:
    merge = Merge(seed, tuple(quotas), BLOCK)
    for row in data.draw(st.lists(st.integers(0, merge.total), min_size=1, max_size=20)):
        for quota, count in zip(quotas, merge.positions(row), strict=True):
            assert abs(count - Fraction(row * quota, merge.total)) <= BLOCK / 4 + len(quotas) / 2 + 1
        for quota, count in zip(quotas, merge.evenly(row), strict=True):
            assert abs(count - Fraction(row * quota, merge.total)) <= len(quotas) / 2 + 1


@settings(deadline=None)
@given(mixtures())
def test_no_more_is_read_twice_than_stated(plan: MixturePlan) -> None:
    items = list(plan.work(0))
    assert read_amplification(items) <= 1 + 1 / mixture.ITEM_WINDOWS + _unused(plan)
    windows = Counter((part.dataset, part.epoch, part.window) for item in items for part in item.parts)
    borders = sum(not item.is_void for item in items) - 1
    assert sum(windows.values()) - len(windows) <= borders * len(plan.sizes)
    for item in items:
        of_item = [(part.dataset, part.epoch, part.window) for part in item.parts]
        assert len(set(of_item)) == len(of_item), "an item reads a window once"


def _unused(plan: MixturePlan) -> float:
    """What a fractional weight leaves of the last window of its last pass, over all samples."""
    left = 0
    for stream, quota in zip(plan.streams, plan.quotas, strict=True):
        last = next(stream.work(quota - 1, quota))
        whole = sum(last.samples)
        left += whole - last.hi
    return left / plan.total_samples


def test_read_amplification_at_real_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "BLOCK", BLOCK)
    monkeypatch.setattr(mixture, "ITEM_WINDOWS", ITEM_WINDOWS)
    generator = np.random.default_rng(0)
    sizes = [generator.integers(5000, 10_000, count) for count in (400, 100, 12)]
    plan = MixturePlan(sizes, [1.0, 0.5, 3.0], seed=1, epochs=2, global_batch=512, window_shards=4)
    factor = read_amplification(plan.work(0))
    assert 1 < factor < 1.12, "measured: 1.092"
    assert [stream.window_shards for stream in plan.streams] == [4, 1, 1], "they last about equally many rows"
    late = plan.item_rows * 3 + 17
    assert read_amplification(plan.work(late)) < 1.12 + plan.item_rows / ITEM_WINDOWS / (plan.total_rows - late)


def test_blocks_keep_datasets_out_of_step_with_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two datasets of equal share would alternate: every second worker would see one of them alone."""
    monkeypatch.setattr(mixture, "BLOCK", BLOCK)
    plan = MixturePlan([[4000], [4000]], [1.0, 1.0], seed=3, epochs=1, global_batch=8, window_shards=1)
    assert merged_evenly((4, 4)) == [0, 1] * 4
    datasets = plan.locate(np.arange(8000)).dataset
    for world in (2, 4):
        shares = [datasets[rank::world].mean() for rank in range(world)]
        assert all(abs(share - 0.5) < 0.05 for share in shares), "6 standard deviations"


GOLDEN_ROWS: list[Row] = [
    (0, 0, 4, 7), (2, 0, 0, 0), (0, 0, 4, 6), (0, 0, 4, 0), (1, 1, 0, 4), (0, 0, 0, 1),
    (1, 2, 0, 1), (0, 1, 3, 0), (1, 4, 1, 0), (0, 1, 0, 1), VOID,
]  # fmt: skip
GOLDEN_SUM = 793249342


def golden_plan() -> MixturePlan:
    return MixturePlan([[5, 0, 7, 3, 9, 4], [6, 2], [11]], [1.0, 2.5, 0.5], 20250720842, 2, 10, 2)


def test_the_order_is_the_one_of_the_first_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint names its position by a row, so the order may never change: new orders need a new name."""
    monkeypatch.setattr(mixture, "BLOCK", BLOCK)
    monkeypatch.setattr(mixture, "ITEM_WINDOWS", ITEM_WINDOWS)
    plan = golden_plan()
    assert plan.quotas == (56, 40, 11)
    assert rows_of(plan, [0, 1, 2, 3, 20, 27, 50, 80, 105, 106, 107]) == GOLDEN_ROWS
    big = MixturePlan([[1000] * 50, [300] * 20], [1.0, 1.5], 7, 4, 512, 8)
    found = big.locate(np.arange(0, big.total_samples, 997))
    place = found.dataset * 50_000 + found.shard * 1000 + found.index
    assert int((place * (np.arange(len(place)) + 1)).sum()) == GOLDEN_SUM


def test_the_order_is_the_same_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "BLOCK", BLOCK)
    code = "from tests.pipelines.data.test_mixture import every, golden_plan; print(every(golden_plan()))"
    assert printed_elsewhere(code) == [str(every(golden_plan()))] * 2


def test_seeds_and_datasets_have_orders_of_their_own() -> None:
    same = [[50] * 4, [50] * 4]
    plan = MixturePlan(same, [1.0, 1.0], seed=1, epochs=1, global_batch=8, window_shards=2)
    other = MixturePlan(same, [1.0, 1.0], seed=2, epochs=1, global_batch=8, window_shards=2)
    orders = [[row[2:] for row in every(p) if row[0] == d] for p in (plan, other) for d in (0, 1)]
    assert all(one != two for at, one in enumerate(orders) for two in orders[:at])


def test_a_billion_samples_start_anywhere_at_once() -> None:
    sizes = [[10_000] * 80_000, [5000] * 40_000]
    plan = MixturePlan(sizes, [1.0, 1.5], seed=1, epochs=3, global_batch=4096, window_shards=4)
    late = plan.total_samples - 5
    item = next(plan.work(late))
    assert item.rows == 5
    assert rows_of(item) == rows_of(plan, list(range(late, late + 5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": []}, "0 datasets have 2 weights"),
        ({"weights": [1.0]}, "2 datasets have 1 weights"),
        ({"weights": [1.0, 0.0]}, "the weight of dataset 1 is 0.0; it must be above 0"),
        ({"weights": [-1.0, 1.0]}, "the weight of dataset 0 is -1.0"),
        ({"weights": [float("nan"), 1.0]}, "the weight of dataset 0 is nan"),
        ({"weights": [float("inf"), 1.0]}, "the weight of dataset 0 is inf"),
        ({"weights": [1.0, 0.1]}, "dataset 1 gives no sample: 5 samples \\* weight 0.1 \\* 1 epochs rounds to 0"),
        ({"sizes": [[3], [0]]}, "1 shards without a single sample"),
        ({"epochs": 0}, "epochs is 0"),
        ({"global_batch": 0}, "global_batch is 0"),
        ({"window_shards": 0}, "window_shards is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict, message: str) -> None:
    good: dict[str, Any] = {
        "sizes": [[3, 4], [5]],
        "weights": [1.0, 1.0],
        "seed": 0,
        "epochs": 1,
        "global_batch": 4,
        "window_shards": 2,
    }
    MixturePlan(**good)
    with pytest.raises(ValueError, match=message):
        MixturePlan(**{**good, **changes})


def test_rows_outside_the_stream_are_named() -> None:
    plan = MixturePlan([[3, 4], [5]], [1.0, 1.0], 0, 1, 4, 2)
    with pytest.raises(ValueError, match="row 12 is outside the stream of 12 rows"):
        plan.locate(np.array([0, 12]))
    assert list(plan.work(12)) == []
    for start, stop in [(13, None), (-1, None), (5, 4), (0, 13)]:
        with pytest.raises(ValueError, match="no part of this stream of 12 rows"):
            plan.work(start, stop)


def write_manifest(folder: Path, samples: int) -> None:
    infos = [ShardInfo(f"{split}-0.tar", split, samples, 1, "0" * 64, {"json": 1}) for split in ("train", "heldout")]
    save_manifest(str(folder), infos, {"source": "test"})


def test_a_run_is_refused_on_other_data_or_weights(tmp_path: Path) -> None:
    from pipelines.config.recipe import Recipe, RunSettings
    from pipelines.job.assemble import training_hash
    from pipelines.job.datasets import ensure_shards
    from pipelines.job.names import RunFacts, choose_run, store_facts

    folders = [tmp_path / name for name in ("first", "b", "a")]
    for folder in folders:
        write_manifest(folder, 7)
    first, b, a = map(str, folders)

    def recipe(mixture: dict[str, float]) -> Recipe:
        return Recipe(data=DataSettings(manifest=first, mixture=mixture), run=RunSettings(str(tmp_path), "r"))

    begun = recipe({b: 0.5, a: 2.0})
    manifests = ensure_shards(begun)
    assert [manifest.url for manifest in manifests] == [f"{one}/manifest.parquet" for one in (first, a, b)]
    assert begun.data.weights == (1.0, 2.0, 0.5)
    facts = RunFacts.begun(begun, "pretrain", manifests)
    store_facts(str(tmp_path), "r", facts)

    again = recipe({a: 2.0, b: 0.5})
    chosen = choose_run(again, "pretrain", ensure_shards(again))
    assert (chosen.name, chosen.facts, chosen.continued) == ("r", facts, True)
    assert training_hash(again, manifests) == training_hash(begun, manifests)
    with pytest.raises(SettingsError, match=f"data.mixture.{b}: 0.5 -> 0.75"):
        choose_run(recipe({b: 0.75, a: 2.0}), "pretrain", manifests)
    write_manifest(folders[1], 8)
    changed = ensure_shards(again)
    old, new = manifests[2].sha256, changed[2].sha256
    with pytest.raises(SettingsError, match=f"(?s)other data.*{b}/manifest.parquet: '{old}' -> '{new}'") as caught:
        choose_run(again, "pretrain", changed)
    assert f"{a}/" not in str(caught.value), "only what differs is named"
    assert training_hash(again, changed) != training_hash(begun, manifests)
    with pytest.raises(SettingsError, match="whose manifest is there already"):
        ensure_shards(recipe({f"{first}/manifest.parquet": 1.0}))


def test_settings_of_a_mixture_are_checked() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"manifest": "a", "weight": 0.0}, r"data\.weight is 0\.0; it must be above 0"),
        ({"manifest": "a", "mixture": {"b": -1.0}}, r"data\.mixture\.b is -1\.0"),
        ({"manifest": "a", "mixture": {"b": float("nan")}}, r"data\.mixture\.b is nan"),
        ({"manifest": "a", "mixture": {"a": 1.0}}, "holds 'a', which is data.manifest; raise data.weight"),
        ({"manifest": "a", "mixture": {"": 1.0}}, "holds"),
    ]
    for values, message in wrong:
        with pytest.raises(SettingsError, match=message):
            DataSettings(**values)


def test_the_command_line_takes_a_mixture() -> None:
    from jobs.pretrain import JOB

    arguments = [
        "--data.manifest",
        "s3://x/a",
        "--data.weight",
        "2",
        "--data.mixture",
        "s3://x/c",
        "0.5",
        "s3://x/b",
        "1",
    ]
    data = JOB.parse(arguments).settings.data
    assert data.others == (("s3://x/b", 1.0), ("s3://x/c", 0.5))
    assert data.weights == (2.0, 1.0, 0.5)


def test_item_borders_do_not_depend_on_the_start() -> None:
    plan = MixturePlan([[9] * 30, [7] * 30], [1.0, 1.0], 0, 1, 4, 2)
    borders = [item.first_row for item in plan.work(0)]
    assert len(borders) > 3
    assert {after - before for before, after in pairwise(borders)} == {plan.item_rows}
    assert [item.first_row for item in plan.work(borders[1] + 5)][1:] == borders[2:]
