"""Batches, image shuffling, states and root causes, each without a cluster."""

import dataclasses
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray.exceptions
import ray.train
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from meteor_model.processing_meteor import collate
from pipelines.batches import BatchReader, Counts, StreamOrderError, make_micro_batch
from pipelines.checkpoint import CheckpointError, CheckpointRef, DroppedSample, TrainState, latest_checkpoint
from pipelines.failures import TrainingError, root_cause
from pipelines.heldout import shuffle_images
from pipelines.training import check_resumable
from tests.training.rows import FAULTY_ROW, IMAGE_SIZE, PAD, make_row
from tests.training.stand_in import SAMPLES, SETTINGS, TOTAL, make_job

COLLATE = partial(collate, pad_token_id=PAD, image_size=IMAGE_SIZE)


def rows(first: int, count: int) -> list[dict[str, object]]:
    return [make_row(row, TOTAL, SAMPLES, (FAULTY_ROW,)) for row in range(first, first + count)]


def test_micro_batch_counts_samples_tokens_and_faults() -> None:
    members = rows(20, 4)
    batch = make_micro_batch(members, COLLATE, PAD)
    samples = [row for row in members if not row["reason"]]
    assert batch.seen == 3
    assert [(sample.row, sample.key, sample.reason) for sample in batch.dropped] == [(21, "key21", "undecodable_image")]
    assert batch.supervised == sum(label != -100 for row in samples for label in row["labels"][1:])  # type: ignore[index]
    assert batch.tokens == sum(len(row["input_ids"]) for row in samples) == int(batch.inputs["attention_mask"].sum())  # type: ignore[arg-type]
    assert len(batch.inputs["pixel_values"]) == sum(batch.num_images)
    pixels = b"".join(row["images"] for row in samples)  # type: ignore[misc]
    assert batch.inputs["pixel_values"].numpy().tobytes() == pixels


def test_micro_batch_without_samples_is_one_token_that_no_loss_counts() -> None:
    batch = make_micro_batch(rows(SAMPLES, 3), COLLATE, PAD)
    assert (batch.seen, batch.supervised, batch.tokens, batch.dropped) == (0, 0, 0, ())
    assert batch.inputs["input_ids"].tolist() == [[PAD]]
    assert batch.inputs["labels"].tolist() == [[-100]]
    assert len(batch.inputs["pixel_values"]) == 0


def test_reader_takes_every_worldth_micro_batch_and_refuses_others() -> None:
    reader = BatchReader(COLLATE, PAD, micro_batch=4, rank=1, world=2)
    batches = list(reader.read(iter([rows(20, 4), rows(28, 4)]), first_row=16))
    assert [batch.seen for batch in batches] == [3, 4]
    with pytest.raises(StreamOrderError, match="expected rows 20 to 23 and got"):
        list(reader.read(iter([rows(24, 4)]), first_row=16))


def test_counts_add_up() -> None:
    batches = [make_micro_batch(rows(first, 4), COLLATE, PAD) for first in (16, 20)]
    counts = Counts.of(batches)
    assert (counts.seen, counts.dropped["undecodable_image"]) == (7, 1)
    assert counts.supervised == batches[0].supervised + batches[1].supervised


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_shuffled_images_come_from_another_sample_with_as_many(num_images: list[int]) -> None:
    owner = [sample for sample, count in enumerate(num_images) for _ in range(count)]
    order = [place for count in num_images for place in range(count)]
    pixels = torch.tensor(list(zip(owner, order, strict=True)), dtype=torch.int64).view(-1, 2, 1, 1)
    shuffled, changed = shuffle_images(pixels, num_images)
    expected_changed = 0
    for sample, count in enumerate(num_images):
        start = sum(num_images[:sample])
        givers = {int(image) for image in shuffled[start : start + count, 0, 0, 0]}
        alone = num_images.count(count) == 1
        if count:
            assert len(givers) == 1
            giver = givers.pop()
            assert num_images[giver] == count
            assert (giver == sample) == alone
            expected_changed += not alone
            assert shuffled[start : start + count, 1, 0, 0].tolist() == list(range(count))
    assert changed == expected_changed
    used = [tuple(image) for image in shuffled.flatten(1).tolist()]
    assert sorted(used) == sorted(tuple(image) for image in pixels.flatten(1).tolist())


def state(**changes: object) -> TrainState:
    return dataclasses.replace(TrainState("abc", world_size=2, total_steps=6), **changes)  # type: ignore[arg-type]


@given(st.lists(st.floats(allow_nan=False), max_size=30))
def test_state_keeps_every_bit(losses: list[float]) -> None:
    drop = DroppedSample(21, 0, 2, 1, "key21", "too_long", "600 tokens")
    before = state(step=len(losses), losses=tuple(losses), dropped={"too_long": 1}, dropped_samples=(drop,))
    assert TrainState.from_json(before.to_json(), "here") == before
    expected = math.nan if not losses else sum(losses[:10]) / len(losses[:10])
    np.testing.assert_equal(before.loss_first, expected)


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1, "dropped_samples": []}', '{"version": 99}'])
def test_damaged_state_names_its_place(text: str) -> None:
    with pytest.raises(CheckpointError, match="some/place"):
        TrainState.from_json(text, "some/place")


def test_no_checkpoint_before_the_first(tmp_path: Path) -> None:
    assert latest_checkpoint(str(tmp_path), "a") is None


def test_damaged_snapshot_names_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a" / "train"
    folder.mkdir(parents=True)
    (folder / "checkpoint_manager_snapshot.json").write_text('{"latest_checkpoint_res')
    with pytest.raises(CheckpointError, match=r"checkpoint_manager_snapshot.json is damaged"):
        latest_checkpoint(str(tmp_path), "a")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recipe_hash": "xyz"}, "recipe xyz, now it is abc"),
        ({"total_steps": 9}, "started for 9 steps, now the plan has 6"),
        ({"world_size": 4}, "checkpoint of 4 workers at step 0, and workers is 2"),
    ],
)
def test_resuming_differently_is_refused(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    job = make_job(tmp_path, "a", SETTINGS)
    check_resumable(job, CheckpointRef("here", state()))
    with pytest.raises(CheckpointError, match=named):
        check_resumable(job, CheckpointRef("here", state(**changes)))


def test_root_cause_is_the_project_s_own_error() -> None:
    own = StreamOrderError("row 7 instead of 3")
    collateral = RuntimeError("Connection closed by peer")
    task = ray.exceptions.RayTaskError("f", "traceback", own)
    failures: dict[int, Exception] = {0: collateral, 1: task.as_instanceof_cause()}
    assert root_cause(ray.train.WorkerGroupError("...", failures), "run 'a'") is own
    failed = root_cause(ray.train.WorkerGroupError("...", {0: collateral, 1: KeyError("x")}), "run 'a'")
    assert isinstance(failed, TrainingError)
    assert "worker 1 failed with KeyError" in str(failed)
    assert root_cause(ray.train.ControllerError(own), "run 'a'") is own


def test_root_cause_has_its_own_message_only() -> None:
    advice = "Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, ..."
    raised = ray.train.WorkerGroupError("...", {0: ValueError(f"shard 3 is truncated\n{advice}")})
    assert str(root_cause(raised, "run 'a'")) == "shard 3 is truncated"


def test_pixel_bytes_are_not_shared(tmp_path: Path) -> None:
    member = next(row for row in rows(0, 8) if row["num_images"])
    batch = make_micro_batch([member], COLLATE, PAD)
    pixels: Tensor = batch.inputs["pixel_values"]
    pixels.zero_()
    assert any(member["images"])  # type: ignore[call-overload]
