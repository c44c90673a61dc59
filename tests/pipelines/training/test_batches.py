"""From rows to micro-batches: what they count, who of the workers runs them, and how they are cut."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meteor_model.collate import collate
from meteor_model.packing import collate_packed
from pipelines.config.settings import SettingsError
from pipelines.data.schema import Row
from pipelines.training.batches import BatchReader, Counts, Packing, Share, StreamOrderError, make_micro_batch
from tests.pipelines.training.rows import FAULTY_ROW, IMAGE_SIZE, PAD, make_row
from tests.pipelines.training.stand_in import SAMPLES, TOTAL

COLLATE = partial(collate, pad_token_id=PAD, image_size=IMAGE_SIZE)
PACKING = Packing(partial(collate_packed, pad_token_id=PAD, image_size=IMAGE_SIZE), 40)


def rows(first: int, count: int) -> list[Row]:
    return [make_row(row, TOTAL, SAMPLES, (FAULTY_ROW,)) for row in range(first, first + count)]


def test_micro_batch_counts_samples_tokens_and_faults() -> None:
    members = rows(20, 4)
    batch = make_micro_batch(members, COLLATE, PAD)
    samples = [row for row in members if row.usable]
    assert batch.seen == 3
    assert [(one.row, one.sample.key, one.reason) for one in batch.dropped] == [(21, "key21", "undecodable_image")]
    assert batch.supervised == sum(label != -100 for row in samples for label in row.labels[1:])
    assert batch.tokens == sum(len(row.input_ids) for row in samples) == int(batch.inputs["attention_mask"].sum())
    assert len(batch.inputs["pixel_values"]) == sum(batch.num_images)
    pixels = b"".join(row.images for row in samples)
    assert batch.inputs["pixel_values"].numpy().tobytes() == pixels


def test_micro_batch_without_samples_is_one_token_that_no_loss_counts() -> None:
    batch = make_micro_batch(rows(SAMPLES, 3), COLLATE, PAD)
    assert (batch.seen, batch.supervised, batch.tokens, batch.dropped) == (0, 0, 0, ())
    assert batch.inputs["input_ids"].tolist() == [[PAD]]
    assert batch.inputs["labels"].tolist() == [[-100]]
    assert len(batch.inputs["pixel_values"]) == 0


@settings(deadline=None)
@given(st.integers(1, 24), st.data())
def test_the_workers_share_every_micro_batch_of_a_step(per_step: int, data: st.DataObject) -> None:
    world = data.draw(st.integers(1, per_step))
    shares = [Share(rank, world, per_step) for rank in range(world)]
    for step in range(4):
        numbers = [list(share.of_step(step)) for share in shares]
        everyone = sorted(number for mine in numbers for number in mine)
        assert everyone == list(range(step * per_step, (step + 1) * per_step))
        assert all(1 <= len(mine) <= shares[0].forwards for mine in numbers)
    for rank, share in enumerate(shares):  # the order in which Ray's split hands them out
        assert [number for step in range(4) for number in share.of_step(step)] == list(range(rank, 4 * per_step, world))


def test_more_workers_than_micro_batches_are_refused() -> None:
    with pytest.raises(SettingsError, match="5 workers share 4 micro-batches"):
        Share(0, 5, 4)


def micro_rows(world: int, rank: int, first_row: int, stop_row: int) -> Iterator[list[Row]]:
    return iter([rows(first, 4) for first in range(first_row, stop_row, 4)][rank::world])


@pytest.mark.parametrize("batching", [{}, {"by_length": True}, {"packing": PACKING}])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_world_reads_the_same_samples_in_a_step(world: int, batching: dict[str, Any]) -> None:
    found: list[set[str]] = [set() for _ in range(5)]
    for rank in range(world):
        reader = BatchReader(COLLATE, PAD, 4, Share(rank, world, 4), **batching)
        steps = list(reader.read(micro_rows(world, rank, 16, TOTAL), 16, TOTAL))
        assert [len(batches) for batches in steps] == [-(-4 // world)] * 5
        for keys, batches in zip(found, steps, strict=True):
            keys |= {sample.key for batch in batches for sample in batch.samples}
            keys |= {dropped.sample.key for batch in batches for dropped in batch.dropped}
    assert found == [{f"key{row}" for row in range(first, min(first + 16, SAMPLES))} for first in range(16, TOTAL, 16)]


def test_reader_refuses_other_rows_and_a_stream_that_ends() -> None:
    reader = BatchReader(COLLATE, PAD, 4, Share(1, 2, 4))
    with pytest.raises(StreamOrderError, match="worker 1 of 2 expected rows 20 to 23 and got"):
        list(reader.read(iter([rows(24, 4)]), 16, TOTAL))
    with pytest.raises(StreamOrderError, match="expected rows 28 to 31, and the data stream ended"):
        list(reader.read(iter([rows(20, 4)]), 16, TOTAL))


@settings(deadline=None)
@given(st.integers(1, 4).flatmap(lambda count: st.lists(st.integers(1, 60), min_size=4 * count, max_size=4 * count)))
def test_batches_by_length_never_pad_more(lengths: list[int]) -> None:
    members = [
        replace(make_row(0, 1, 1, ()), row=row, input_ids=[2] * length, labels=[2] * length, num_images=0)
        for row, length in enumerate(lengths)
    ]
    plain = BatchReader(COLLATE, PAD, 4, Share(0, 1, 4)).batches(members)
    sorted_ = BatchReader(COLLATE, PAD, 4, Share(0, 1, 4), by_length=True).batches(members)
    assert sum(batch.cells for batch in sorted_) <= sum(batch.cells for batch in plain)
    assert sum(batch.tokens for batch in sorted_) == sum(lengths)
    longest = [batch.inputs["input_ids"].shape[1] for batch in sorted_]
    assert longest == sorted(longest, reverse=True)
    assert Counts.of(sorted_).supervised == Counts.of(plain).supervised


def test_counts_add_up() -> None:
    batches = [make_micro_batch(rows(first, 4), COLLATE, PAD) for first in (16, 20)]
    assert Counts.of(batches).cells == sum(batch.inputs["input_ids"].numel() for batch in batches)
    counts = Counts.of(batches)
    assert (counts.seen, counts.dropped["undecodable_image"]) == (7, 1)
    assert counts.supervised == batches[0].supervised + batches[1].supervised


def test_pixel_bytes_are_not_shared(tmp_path: Path) -> None:
    member = next(row for row in rows(0, 8) if row.num_images)
    batch = make_micro_batch([member], COLLATE, PAD)
    pixels: Tensor = batch.inputs["pixel_values"]
    pixels.zero_()
    assert any(member.images)
