"""Batches, image shuffling, states and root causes, each without a cluster."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
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
from pipelines.checkpoint.checkpoint import (
    CheckpointError,
    CheckpointRef,
    DroppedSample,
    TrainState,
    latest_checkpoint,
    new_folder,
    sweep_uncommitted,
)
from pipelines.config.settings import SettingsError
from pipelines.data.tar_format import ShardError
from pipelines.io.storage import TransientStorageError
from pipelines.recovery.failures import TrainingError, root_cause
from pipelines.recovery.preemption import Preempted
from pipelines.recovery.restart_policy import RestartPolicy
from pipelines.training.batches import BatchReader, Counts, Share, StreamOrderError, make_micro_batch
from pipelines.training.heldout_loss import shuffle_images
from pipelines.training.trainer import check_resumable
from tests.pipelines.training.rows import FAULTY_ROW, IMAGE_SIZE, PAD, make_row
from tests.pipelines.training.stand_in import SAMPLES, SETTINGS, TOTAL, make_job

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


def micro_rows(world: int, rank: int, first_row: int, stop_row: int) -> Iterator[list[dict[str, object]]]:
    return iter([rows(first, 4) for first in range(first_row, stop_row, 4)][rank::world])


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_world_reads_the_same_samples_in_a_step(world: int, by_length: bool) -> None:
    found: list[set[str]] = [set() for _ in range(5)]
    for rank in range(world):
        reader = BatchReader(COLLATE, PAD, 4, Share(rank, world, 4), by_length)
        steps = list(reader.read(micro_rows(world, rank, 16, TOTAL), 16, TOTAL))
        assert [len(batches) for batches in steps] == [-(-4 // world)] * 5
        for keys, batches in zip(found, steps, strict=True):
            keys |= {sample.key for batch in batches for sample in batch.samples}
            keys |= {sample.key for batch in batches for sample in batch.dropped}
    assert found == [{f"key{row}" for row in range(first, min(first + 16, SAMPLES))} for first in range(16, TOTAL, 16)]


def test_reader_refuses_other_rows_and_a_stream_that_ends() -> None:
    reader = BatchReader(COLLATE, PAD, 4, Share(1, 2, 4))
    with pytest.raises(StreamOrderError, match="worker 1 of 2 expected rows 20 to 23 and got"):
        list(reader.read(iter([rows(24, 4)]), 16, TOTAL))
    with pytest.raises(StreamOrderError, match="expected rows 28 to 31, and the data stream ended"):
        list(reader.read(iter([rows(20, 4)]), 16, TOTAL))


@given(st.integers(1, 4).flatmap(lambda count: st.lists(st.integers(1, 60), min_size=4 * count, max_size=4 * count)))
def test_batches_by_length_never_pad_more(lengths: list[int]) -> None:
    members = [
        {**make_row(0, 1, 1, ()), "row": row, "input_ids": [2] * length, "labels": [2] * length, "num_images": 0}
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
    drop = DroppedSample(21, 0, 0, 2, 1, "key21", "too_long", "600 tokens")
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


def test_another_number_of_workers_is_no_reason_to_refuse(tmp_path: Path) -> None:
    check_resumable(make_job(tmp_path, "a", SETTINGS), CheckpointRef("here", state(world_size=4)))


def test_a_dead_worker_is_the_cause_of_what_its_absence_does_to_others() -> None:
    died = ray.exceptions.RayActorError(error_msg="The actor died.\n\tpid: 71\n\tip: 10.0.0.2\nIts worker died.")
    failures = {0: KeyError("collateral"), 1: died, 2: RuntimeError()}
    failed = root_cause(ray.train.WorkerGroupError("...", failures), "run 'a'")
    assert isinstance(failed, TrainingError)
    assert failed.summary.startswith("worker 1 died (pid 71 on 10.0.0.2): killed from outside")
    assert not failed.preempted


def test_a_preempted_worker_is_no_failure() -> None:
    failures = {0: RuntimeError("Connection closed"), 1: Preempted("ended by SIGTERM; saved")}
    failed = root_cause(ray.train.WorkerGroupError("...", failures), "run 'a'")
    assert isinstance(failed, TrainingError)
    assert failed.preempted


def test_faults_of_data_stop_at_once_and_others_after_too_many_in_a_row() -> None:
    policy = RestartPolicy(max_failures=2)
    killed = TrainingError("run 'a'", "worker 1 failed with RayActorError: killed")
    with pytest.raises(StreamOrderError):
        policy.after(StreamOrderError("row 7"), 4)
    assert policy.after(killed, -1).reason.endswith("restart 1 of at most 2 in a row, from the start")
    assert policy.after(killed, -1).pause_s == 2.0
    assert "restart 1 of" in policy.after(killed, 4).reason  # a checkpoint came in between
    for _ in range(5):
        assert policy.after(TrainingError("run 'a'", "gone", preempted=True), 4).pause_s == 0
    assert "restart 2 of" in policy.after(killed, 4).reason
    with pytest.raises(TrainingError, match="Start the same command again"):
        policy.after(killed, 4)


def test_a_failed_job_says_what_is_kept(tmp_path: Path) -> None:
    from pipelines.job.run import what_is_kept

    assert what_is_kept(str(tmp_path), "a").startswith(
        f"kept: run a with no step, in {tmp_path}/runs/a; the same command"
    )
    folder = tmp_path / "runs" / "a" / "train"
    (folder / "step-4").mkdir(parents=True)
    (folder / "step-4" / "train_state.json").write_text(state(step=4).to_json())
    snapshot = folder / "checkpoint_manager_snapshot.json"
    snapshot.write_text('{"latest_checkpoint_result": {"checkpoint_dir_name": "step-4"}}')
    assert "the checkpoint of step 4 of 6" in what_is_kept(str(tmp_path), "a")
    snapshot.write_text("{")
    assert "cannot be read just now" in what_is_kept(str(tmp_path), "a")


def test_only_what_no_snapshot_names_is_swept(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a" / "train"
    for name in ("step-0000002-a", "step-0000004-b", "step-0000006-c"):
        (folder / name / "zero3").mkdir(parents=True)
        (folder / name / "zero3" / "file").write_text("x")
    latest, older = {"checkpoint_dir_name": "step-0000004-b"}, {"checkpoint_dir_name": "step-0000002-a"}
    snapshot = {"latest_checkpoint_result": latest, "checkpoint_results": [older, latest]}
    (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    assert sweep_uncommitted(str(tmp_path), "a") == ["step-0000006-c"]
    assert sorted(path.parent.parent.name for path in folder.rglob("file")) == ["step-0000002-a", "step-0000004-b"]
    assert sweep_uncommitted(str(tmp_path), "a") == []
    assert sweep_uncommitted(str(tmp_path), "never started") == []


@pytest.mark.parametrize(
    "fault", [TransientStorageError("no answer for 120 s"), ShardError("s3://b/x.tar", "unreadable", "no answer")]
)
def test_a_storage_that_was_away_is_no_fault_of_the_data(fault: ValueError) -> None:
    assert isinstance(root_cause(ray.train.WorkerGroupError("...", {0: fault}), "run 'a'"), TrainingError)
    damaged = ShardError("s3://b/x.tar", "replaced", "other checksum")
    assert root_cause(ray.train.WorkerGroupError("...", {0: damaged}), "run 'a'") is damaged


def test_local_folders_of_dead_workers_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine, other = new_folder("s3://b/runs/a"), new_folder("s3://b/runs/b")
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))
    dead.mkdir()
    again = new_folder("s3://b/runs/a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in (mine, other, again))


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
