"""The ledger against plain Python sets, its bytes, and its errors."""

import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data.ledger import Consumption, Ledger, LedgerError
from pipelines.data.sample_id import SampleId, SampleIds

Place = tuple[int, int, int, int]
SIZES = [[3, 0, 5, 1], [2, 4]]
EPOCHS = 2
ALL: list[Place] = [
    (dataset, epoch, shard, index)
    for dataset, shards in enumerate(SIZES)
    for epoch in range(EPOCHS)
    for shard, samples in enumerate(shards)
    for index in range(samples)
]


def ids(places: Iterable[Place]) -> SampleIds:
    return SampleIds.of(SampleId(*place) for place in places)


def filled(batches: list[tuple[list[Place], bool]]) -> Ledger:
    ledger = Ledger(SIZES)
    for places, dropped in batches:
        ledger.add(ids(places), dropped=dropped)
    return ledger


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[list[Place], bool]]:
    """Distinct samples in any order, in batches that are trained or dropped."""
    order = draw(st.permutations(ALL))[: draw(st.integers(0, len(ALL)))]
    cuts = sorted(draw(st.lists(st.integers(0, len(order)), max_size=4)))
    edges = [0, *cuts, len(order)]
    return [(order[lo:hi], draw(st.booleans())) for lo, hi in pairwise(edges)]


@settings(deadline=None)
@given(histories())
def test_counts_and_members_equal_plain_sets(history: list[tuple[list[Place], bool]]) -> None:
    ledger = filled(history)
    trained = {place for places, dropped in history if not dropped for place in places}
    dropped = {place for places, faulty in history if faulty for place in places}
    assert (ledger.trained, ledger.dropped, ledger.consumed) == (
        len(trained),
        len(dropped),
        len(trained) + len(dropped),
    )
    keys = {place[:2] for place in trained | dropped}
    assert ledger.counts == {
        key: Consumption(sum(p[:2] == key for p in trained), sum(p[:2] == key for p in dropped)) for key in keys
    }
    assert list(ledger.dropped_samples()) == [SampleId(*place) for place in sorted(dropped)]
    assert ledger.difference(Ledger(SIZES), limit=99) == ([SampleId(*p) for p in sorted(trained | dropped)], [])


@settings(deadline=None)
@given(histories(), histories())
def test_equality_and_difference_are_those_of_sets(
    first: list[tuple[list[Place], bool]], second: list[tuple[list[Place], bool]]
) -> None:
    one, two = ({place for places, _ in history for place in places} for history in (first, second))
    ledger, other = filled(first), filled(second)
    assert (ledger == other) == (one == two)
    expected = ([SampleId(*p) for p in sorted(one - two)], [SampleId(*p) for p in sorted(two - one)])
    assert ledger.difference(other, limit=99) == expected
    assert ledger.difference(other, limit=1) == (expected[0][:1], expected[1][:1])
    if one == two:
        ledger.require_equal(other, "step 1")
        return
    with pytest.raises(
        LedgerError, match=f"the ledger of step 1 holds {len(one)} samples, the plan says {len(two)}"
    ) as e:
        ledger.require_equal(other, "step 1")
    for samples, words in zip(expected, ("consumed, but not planned", "planned, but not consumed"), strict=True):
        assert (f"{words}: ({samples[0]})" in str(e.value)) if samples else (words not in str(e.value))


@settings(deadline=None)
@given(histories(), st.data())
def test_what_is_there_already_is_refused_by_name_and_nothing_is_added(
    history: list[tuple[list[Place], bool]], data: st.DataObject
) -> None:
    ledger = filled(history)
    there = {place for places, _ in history for place in places}
    batch = data.draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=12))
    seen, first = set(there), None
    for place in batch:
        if place in seen:
            first = place
            break
        seen.add(place)
    before = ledger.to_bytes()
    if first is None:
        ledger.add(ids(batch))
        assert ledger.consumed == len(there) + len(batch)
        return
    with pytest.raises(LedgerError, match=f"sample \\({SampleId(*first)}\\) is consumed already"):
        ledger.add(ids(batch))
    assert ledger.to_bytes() == before


@settings(deadline=None)
@given(histories())
def test_bytes_hold_everything_and_are_the_same_for_every_order(history: list[tuple[list[Place], bool]]) -> None:
    ledger = filled(history)
    data = ledger.to_bytes()
    again = Ledger.from_bytes(data, SIZES)
    assert again == ledger
    assert again.counts == ledger.counts
    assert list(again.dropped_samples()) == list(ledger.dropped_samples())
    assert again.to_bytes() == data
    assert filled([(places[::-1], dropped) for places, dropped in history[::-1]]).to_bytes() == data
    rest = [place for place in ALL if place not in {place for places, _ in history for place in places}]
    again.add(ids(rest))
    assert again.consumed == len(ALL)


@settings(deadline=None)
@given(histories(), st.integers(0, 3))
def test_whole_shards_are_their_samples(history: list[tuple[list[Place], bool]], shard: int) -> None:
    by_shard, by_sample = filled(history), filled(history)
    samples = [place for place in ALL if place[:3] == (0, 1, shard)]
    if any(place in samples for places, _ in history for place in places):
        before = by_shard.to_bytes()
        with pytest.raises(LedgerError, match=f"shard {shard} of dataset 0, epoch 1 is consumed already"):
            by_shard.add_shards(0, 1, [shard])
        assert by_shard.to_bytes() == before
        return
    by_shard.add_shards(0, 1, [shard])
    by_sample.add(ids(samples))
    assert by_shard.to_bytes() == by_sample.to_bytes()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((2, 0, 0, 0), "there are 2 datasets"),
        ((-1, -1, -1, -1), "dataset -1, epoch -1, shard -1, index -1"),
        ((0, -1, 0, 0), "epoch -1"),
        ((0, 0, 4, 0), "shard 4"),
        ((1, 0, -1, 0), "shard -1"),
        ((0, 0, 1, 0), "this shard has 0 samples"),
        ((1, 1, 1, 4), "this shard has 4 samples"),
        ((1, 1, 1, -1), "index -1"),
    ],
)
def test_a_sample_outside_the_data_is_named(place: Place, message: str) -> None:
    ledger = Ledger(SIZES)
    with pytest.raises(LedgerError, match=message):
        ledger.add(ids([(0, 0, 0, 0), place]))
    assert ledger.consumed == 0
    with pytest.raises(LedgerError, match="outside the data"):
        Ledger().add(ids([place]))
    with pytest.raises(ValueError, match="shapes"):
        SampleIds(*(np.zeros(size, dtype=np.int64) for size in (1, 1, 2, 1)))


def test_whole_shards_outside_the_data_or_twice_are_named() -> None:
    ledger = Ledger(SIZES)
    for arguments, message in [
        ((2, 0, [0]), "dataset 2, epoch 0 is outside"),
        ((0, -1, [0]), "epoch -1 is outside"),
        ((0, 0, [0, 4]), "shard 4 is outside dataset 0 of 4 shards"),
        ((1, 0, [1, 0, 1]), "shard 1 of dataset 1, epoch 0 is consumed already"),
    ]:
        with pytest.raises(LedgerError, match=message):
            ledger.add_shards(*arguments)
    ledger.add_shards(0, 0, [1])
    assert ledger == Ledger(SIZES)
    assert ledger.counts == {}


def test_an_empty_ledger_is_empty() -> None:
    ledger = Ledger()
    ledger.add(ids([]))
    assert (ledger.trained, ledger.dropped, ledger.consumed, ledger.counts) == (0, 0, 0, {})
    assert Ledger.from_bytes(ledger.to_bytes(), []) == ledger
    assert Ledger(SIZES) != ledger, "about other data"
    with pytest.raises(LedgerError, match="about different data"):
        Ledger(SIZES).difference(ledger)
    assert ledger != "text"


def test_damaged_bytes_are_refused() -> None:
    ledger = filled([(ALL[:7], False), (ALL[9:10], True)])
    data = ledger.to_bytes()
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 0x10
        with pytest.raises(LedgerError):
            Ledger.from_bytes(bytes(broken), SIZES)
    for length in range(len(data)):
        with pytest.raises(LedgerError, match=r"start again under another --run\.name"):
            Ledger.from_bytes(data[:length], SIZES)
    with pytest.raises(LedgerError, match="version 2, this code reads 1"):
        Ledger.from_bytes(data[:8] + b"\2" + data[9:], SIZES)
    with pytest.raises(LedgerError, match="a manifest changed since the run began"):
        Ledger.from_bytes(data, [SIZES[0], [2, 5]])


def test_half_a_million_samples_take_well_under_a_second() -> None:
    sizes = [[1000] * 2000, [300] * 1000]
    generator = np.random.default_rng(0)
    shards = generator.choice(2000, 470, replace=False)
    number = (shards[:, None] * 1000 + np.arange(1000)).ravel()[:468_000]
    other = np.arange(32_000)
    dataset = np.repeat([0, 1], [len(number), len(other)])
    rows = [
        dataset,
        np.zeros_like(dataset),
        *(np.concatenate(p) for p in zip(divmod(number, 1000), divmod(other, 300), strict=True)),
    ]
    order = generator.permutation(len(dataset))
    ledger = Ledger(sizes)
    started = time.process_time()
    ledger.add(SampleIds(*rows).take(order))
    assert time.process_time() - started < 1
    assert ledger.consumed == 500_000
    assert len(ledger.to_bytes()) < 2000


def test_the_controller_imports_it_without_ray_and_torch() -> None:
    code = (
        "import sys, pipelines.data.ledger, pipelines.data.order; print({'ray', 'torch', 'pyarrow'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
