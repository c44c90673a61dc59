"""Validation beside the training: its value against the workers' own, and what happens when it fails."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from ray.train.torch import TorchTrainer

from meteor_model.collate import collate
from pipelines.checkpoint.best import best_checkpoint
from pipelines.compat.ray import make_snapshot
from pipelines.io import storage
from pipelines.io.run_folder import RunFolder
from pipelines.recovery.lease import hold_run
from pipelines.recovery.run_lock import RunLock, Standing, StandingCallback, lock_run
from pipelines.training.batches import MicroBatch, iterate_rows, make_micro_batch
from pipelines.training.heldout_loss import heldout_loss
from pipelines.training.trainer import TrainingResult
from pipelines.training.validation import (
    Validation,
    ValidationError,
    _watch,
    validate,
    validation_config,
)
from tests.pipelines.training.rows import IMAGE_SIZE, PAD, make_row, make_stream
from tests.pipelines.training.stand_in import HELDOUT, StandInConfig, StandInModel, write_init

COLLATE = partial(collate, pad_token_id=PAD, image_size=IMAGE_SIZE)
MICRO = 4

# ---------------------------------------------------------------------------------------------------------- the number


def batches() -> Iterator[MicroBatch]:
    for first in range(0, HELDOUT, MICRO):
        yield make_micro_batch(
            [make_row(row, HELDOUT, HELDOUT, ()) for row in range(first, first + MICRO)], COLLATE, PAD
        )


def test_the_loss_is_the_mean_over_supervised_tokens() -> None:
    torch.manual_seed(1)
    model = StandInModel(StandInConfig()).eval()
    total, count = 0.0, 0
    for row in range(HELDOUT):  # one sample at a time, token by token
        inputs = make_micro_batch([make_row(row, HELDOUT, HELDOUT, ())], COLLATE, PAD).inputs
        labels = inputs.pop("labels")[0]
        with torch.no_grad():
            log_probs = model(**inputs).logits[0].float().log_softmax(-1)
        for place in range(1, len(labels)):
            if labels[place] != -100:
                total -= log_probs[place - 1, labels[place]].item()
                count += 1
    metrics = heldout_loss(model, batches(), torch.device("cpu"))
    assert metrics["heldout_loss"] == pytest.approx(total / count, rel=1e-6)
    assert metrics["heldout_loss_shuffled_images"] != metrics["heldout_loss"]
    assert heldout_loss(model, batches(), torch.device("cpu"), loss_chunk=3) == pytest.approx(metrics, rel=1e-6)


def make_validation(run: Path) -> Validation:
    data = partial(make_stream, HELDOUT, HELDOUT, (), MICRO, 0)
    return Validation(str(run), StandInModel, torch.float32, COLLATE, PAD, MICRO, HELDOUT, data, iterate_rows)


@pytest.mark.stack
def test_it_is_the_value_of_the_workers(trained: tuple[Path, TrainingResult]) -> None:
    root, result = trained
    checkpoint = ray.train.Checkpoint.from_directory(result.checkpoint.url)
    metrics, step = validate(checkpoint, make_validation(root / "runs" / "whole"), use_gpu=False)
    assert step == result.checkpoint.state.step
    for name, expected in result.checkpoint.state.final.items():
        assert metrics[f"validation/{name}"] == pytest.approx(expected, abs=1e-6), name


# -------------------------------------------------------------------------------------------------- beside the training


def log_to(path: Path, metrics: Mapping[str, float], step: int) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps({**metrics, "step": step}) + "\n")


def logged(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def killed_once(marker: Path, data: Callable[[], Any]) -> Any:
    """The first validation's process ends without a word, as if memory had run out."""
    if not marker.exists():
        marker.touch()
        os._exit(9)
    return data()


def train_beside(config: dict[str, str]) -> None:
    steps = []
    for number in (1, 2):
        folder = tempfile.mkdtemp()
        shutil.copytree(config["source"], folder, dirs_exist_ok=True)
        checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"number": number}, checkpoint, f"step-{number}", validation=True)
        made, end = 0, time.monotonic() + 60
        while len(logged(Path(config["log"]))) < number and time.monotonic() < end:
            made += 1
            time.sleep(0.01)
        steps.append(made)
    Path(config["steps"]).write_text(json.dumps(steps))


@pytest.mark.stack
def test_training_goes_on_beside_a_validation_that_is_killed_and_one_that_succeeds(
    trained: tuple[Path, TrainingResult], tmp_path: Path
) -> None:
    root, result = trained
    run = root / "runs" / "beside"
    write_init(root, "beside")
    validation = make_validation(run)
    validation = replace(validation, data=partial(killed_once, tmp_path / "marker", validation.data))
    config = {name: str(tmp_path / name) for name in ("log", "steps")} | {"source": result.checkpoint.url}
    beside = TorchTrainer(
        train_beside,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        validation_config=validation_config(
            validation, cpus=1.0, gpus=0.0, timeout_s=60.0, log=partial(log_to, tmp_path / "log")
        ),
        run_config=ray.train.RunConfig(
            name="train", storage_path=str(run), logging_config=ray.train.LoggingConfig(log_level="CRITICAL")
        ),
    ).fit()
    step, final = result.checkpoint.state.step, result.checkpoint.state.final
    killed, succeeded = logged(tmp_path / "log")
    assert killed == {"validation/failed": 1.0, "step": step}
    assert succeeded["validation/failed"] == 0.0
    assert succeeded["step"] == step
    assert succeeded["validation/heldout_loss"] == pytest.approx(final["heldout_loss"], abs=1e-6)
    assert min(json.loads((tmp_path / "steps").read_text())) > 20, "steps were made while each validation ran"
    assert beside.best_checkpoints is not None
    metrics = {Path(checkpoint.path).name: values for checkpoint, values in beside.best_checkpoints}
    assert "validation/heldout_loss" not in metrics["step-1"]
    assert metrics["step-2"]["validation/heldout_loss"] == succeeded["validation/heldout_loss"]
    best = best_checkpoint(str(root), "beside")
    assert best is not None
    assert Path(best.url).name == "step-2"
    assert best.state == result.checkpoint.state


def never(data: Callable[[], Any]) -> Any:
    time.sleep(600)
    return data()


def fail_beside(config: dict[str, str]) -> None:
    """Reports one checkpoint, and fails while it is validated; the next time there is nothing to do."""
    if ray.train.get_checkpoint() is not None:
        return
    folder = tempfile.mkdtemp()
    shutil.copytree(config["source"], folder, dirs_exist_ok=True)
    ray.train.report({}, ray.train.Checkpoint.from_directory(folder), "step-1", validation=True)
    time.sleep(3)
    raise RuntimeError("a worker fails")


@pytest.mark.stack
def test_a_failed_training_waits_for_no_validation_and_the_next_start_makes_it(
    trained: tuple[Path, TrainingResult], tmp_path: Path
) -> None:
    root, result = trained
    run = root / "runs" / "failed"
    write_init(root, "failed")
    whole = make_validation(run)

    def train(lock: RunLock, validation: Validation) -> None:
        TorchTrainer(
            fail_beside,
            train_loop_config={"source": result.checkpoint.url},
            scaling_config=ray.train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
            validation_config=validation_config(
                validation,
                cpus=1.0,
                gpus=0.0,
                timeout_s=300.0,
                log=partial(log_to, tmp_path / "log"),
                standing=lock.standing,
            ),
            run_config=ray.train.RunConfig(
                name="train",
                storage_path=str(run),
                callbacks=[StandingCallback(lock)],
                logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
            ),
        ).fit()

    with hold_run(str(run), "run 'failed'") as lease, lock_run(lease) as lock:
        started = time.monotonic()
        with pytest.raises(ray.train.TrainingFailedError, match="a worker fails"):
            train(lock, replace(whole, data=partial(never, whole.data)))
        assert time.monotonic() - started < 200, "the validation would have taken 300 s"
        assert logged(tmp_path / "log") == []
        train(replace(lock, attempt=1), whole)
    assert [entry["validation/failed"] for entry in logged(tmp_path / "log")] == [0.0]


@pytest.mark.stack
def test_a_validation_without_room_is_given_up_and_said(
    trained: tuple[Path, TrainingResult], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, result = trained
    asked = validation_config(
        make_validation(root / "runs" / "whole"),
        cpus=100.0,
        gpus=0.0,
        timeout_s=1.0,
        log=partial(log_to, tmp_path / "log"),
    )
    assert isinstance(asked.fn, partial)
    assert asked.fn.func is _watch
    with pytest.raises(ValidationError, match=r"step-.* was given up after 1 s.* 100\.0 CPUs"):
        asked.fn(ray.train.Checkpoint.from_directory(result.checkpoint.url))
    assert "[meteor]   warning: the validation of step-" in capfd.readouterr().out
    assert logged(tmp_path / "log") == [{"validation/failed": 1.0, "step": result.checkpoint.state.step}]


@pytest.mark.stack
def test_a_validation_that_lasts_beyond_the_training_is_given_up_and_said(
    trained: tuple[Path, TrainingResult], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, result = trained
    whole = make_validation(root / "runs" / "whole")
    asked = validation_config(
        replace(whole, data=partial(never, whole.data)),
        cpus=1.0,
        gpus=0.0,
        timeout_s=500.0,
        log=partial(log_to, tmp_path / "log"),
        wait_s=20.0,
        standing=partial(Standing, failed=False, ended_s=21.0),
    )
    assert isinstance(asked.fn, partial)
    started = time.monotonic()
    with pytest.raises(ValidationError, match=r"step-.* was given up 20 s after the last step"):
        asked.fn(ray.train.Checkpoint.from_directory(result.checkpoint.url))
    assert time.monotonic() - started < 100
    assert "was given up 20 s after the last step (training.validation_wait_s)" in capfd.readouterr().out
    assert [entry["validation/failed"] for entry in logged(tmp_path / "log")] == [1.0]


@pytest.mark.stack
def test_a_checkpoint_that_a_newer_one_waits_behind_is_passed_over(
    trained: tuple[Path, TrainingResult], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, result = trained
    run = RunFolder(str(tmp_path / "runs" / "queued"))
    names = [Path(result.checkpoint.url).name, "step-0000900-a", "step-0001000-b"]
    state = json.loads(make_snapshot([(name, {}) for name in names]))
    state["pending_training_results"] = state["checkpoint_results"]
    storage.write_bytes(run.snapshot, json.dumps(state).encode())
    validation = replace(make_validation(root / "runs" / "whole"), run=run.url)
    log = partial(log_to, tmp_path / "log")
    asked = validation_config(validation, cpus=1.0, gpus=0.0, timeout_s=500.0, log=log)
    metrics = asked.fn(ray.train.Checkpoint.from_directory(result.checkpoint.url))
    assert metrics == {"validation/passed_over": 1.0}
    assert logged(tmp_path / "log") == [{"validation/passed_over": 1.0, "step": result.checkpoint.state.step}]
    assert "step-0001000-b, which is newer, waits for its validation" in capfd.readouterr().out


def test_rows_that_are_no_whole_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="15 rows to validate on are no multiple of micro_batch 4"):
        replace(make_validation(Path("run")), rows=15)
