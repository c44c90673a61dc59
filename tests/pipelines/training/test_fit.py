"""The loop on a real Ray Train group of two workers, against one plain process and against itself after a kill."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from meteor_model.collate import collate
from pipelines.checkpoint.best import checkpoint_to_export
from pipelines.checkpoint.committed import CheckpointRef, latest_checkpoint
from pipelines.checkpoint.consolidate import consolidate
from pipelines.checkpoint.losses import read_losses
from pipelines.checkpoint.parity_file import read_parity
from pipelines.checkpoint.state import PARITY_FILE, load_ledger
from pipelines.checkpoint.weight_sums import weight_sums
from pipelines.checkpoint.zero3 import parameter_groups, schedule_factor
from pipelines.io.run_folder import run_folder
from pipelines.recovery.failures import TrainingError
from pipelines.training.batches import make_micro_batch
from pipelines.training.heldout_loss import shuffle_images
from pipelines.training.loop import StepRecord
from pipelines.training.trainer import TrainingResult, fit
from tests.pipelines.training.rows import FAULTY_ROW, IMAGE_SIZE, PAD, Plan, make_row
from tests.pipelines.training.stand_in import (
    HELDOUT,
    SAMPLES,
    SETTINGS,
    TOTAL,
    StandInModel,
    make_job,
    untimed,
    write_init,
)

pytestmark = [pytest.mark.stack, pytest.mark.usefixtures("cluster")]
COLLATE = partial(collate, pad_token_id=PAD, image_size=IMAGE_SIZE)


def reference(root: Path) -> tuple[list[float], StandInModel]:
    """The same training in one plain process: each global batch as one batch, loss its mean over supervised tokens."""
    model = StandInModel.from_pretrained(root / "runs" / "whole" / "init")
    settings = SETTINGS.optimizer
    groups = parameter_groups(model, settings)
    optimizer = torch.optim.AdamW(
        groups, betas=(settings.beta1, settings.beta2), eps=settings.epsilon, weight_decay=settings.weight_decay
    )
    losses = []
    for step in range(TOTAL // 16):
        members = [make_row(row, TOTAL, SAMPLES, (FAULTY_ROW,)) for row in range(16 * step, 16 * (step + 1))]
        loss = model(**make_micro_batch(members, COLLATE, PAD).inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule_factor(step, TOTAL // 16, SETTINGS.schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def consolidated(root: Path, result: TrainingResult) -> StandInModel:
    model = consolidate(Path(result.checkpoint.url), StandInModel, root / "runs" / "whole" / "init")
    assert isinstance(model, StandInModel)
    return model


def test_two_workers_train_what_one_process_trains(trained: tuple[Path, TrainingResult]) -> None:
    root, result = trained
    losses, model = reference(root)
    assert result.steps_trained == len(losses) == 6
    assert read_losses(run_folder(str(root), "whole"), result.checkpoint.state) == pytest.approx(losses, rel=1e-6)
    weights = consolidated(root, result).state_dict()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    before = StandInModel.from_pretrained(root / "runs" / "whole" / "init").state_dict()
    assert all(not torch.equal(before[name], weights[name]) for name in weights if name != "scale")


def test_every_sample_is_counted(trained: tuple[Path, TrainingResult]) -> None:
    state = trained[1].checkpoint.state
    assert state.dropped == {"undecodable_image": 1}
    assert [(one.row, one.sample.key) for one in state.dropped_samples] == [(FAULTY_ROW, f"key{FAULTY_ROW}")]
    assert state.samples_seen + 1 == SAMPLES
    assert (state.step, state.rows, state.world_size) == (6, TOTAL, 2)


def test_heldout_loss_with_true_and_with_shuffled_images(trained: tuple[Path, TrainingResult]) -> None:
    root, result = trained
    model = consolidated(root, result)
    sums = {"heldout_loss": 0.0, "heldout_loss_shuffled_images": 0.0}
    supervised = changed = with_images = 0
    for first in range(0, HELDOUT, SETTINGS.micro_batch):
        members = [make_row(row, HELDOUT, HELDOUT, ()) for row in range(first, first + SETTINGS.micro_batch)]
        batch = make_micro_batch(members, COLLATE, PAD)
        pixels, moved = shuffle_images(batch.inputs["pixel_values"], batch.num_images)
        with torch.no_grad():
            sums["heldout_loss"] += model(**batch.inputs, num_items_in_batch=1.0).loss.item()
            other = model(**{**batch.inputs, "pixel_values": pixels}, num_items_in_batch=1.0).loss.item()
        sums["heldout_loss_shuffled_images"] += other
        supervised += batch.supervised
        changed += moved
        with_images += sum(count > 0 for count in batch.num_images)
    expected = {name: value / supervised for name, value in sums.items()}
    assert result.checkpoint.state.final == pytest.approx(
        {
            **expected,
            "heldout_shuffled_share": changed / with_images,
            "heldout_loss_samples": HELDOUT,
            "heldout_loss_dropped": 0,
            "heldout_loss_truncated": 0,
        },
        rel=1e-5,
    )
    assert 0 < changed < with_images


def test_parity_batch_holds_the_training_model_s_logits(trained: tuple[Path, TrainingResult]) -> None:
    root, result = trained
    parity, precision = read_parity(Path(result.checkpoint.url) / PARITY_FILE)
    whole = consolidated(root, result)
    first = [make_row(row, HELDOUT, HELDOUT, ()) for row in range(SETTINGS.micro_batch)]
    assert parity.inputs["input_ids"].tolist() == make_micro_batch(first, COLLATE, PAD).inputs["input_ids"].tolist()
    with torch.no_grad():
        again = whole(**parity.inputs).logits
    torch.testing.assert_close(again, parity.logits, rtol=0, atol=1e-5)
    assert precision == "fp32"
    assert parity.sums["fp32"] == weight_sums(whole.named_parameters(), "fp32")


def test_a_finished_run_is_not_trained_again(trained: tuple[Path, TrainingResult]) -> None:
    root, result = trained
    files = sorted(path.stat().st_mtime_ns for path in (root / "runs" / "whole").rglob("*"))
    again = fit(make_job(root, "whole"))
    assert again == TrainingResult(result.checkpoint, steps_trained=0)
    assert files == sorted(path.stat().st_mtime_ns for path in (root / "runs" / "whole").rglob("*"))


def test_only_the_newest_checkpoints_stay(trained: tuple[Path, TrainingResult]) -> None:
    kept = sorted(path.name[:12] for path in (trained[0] / "runs" / "whole" / "train").glob("step-*"))
    assert kept == ["step-0000004", "step-0000006"]


def _wait_for_checkpoint(root: Path, run_name: str, driver: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert driver.poll() is None, "the driver ended by itself"
        checkpoint = latest_checkpoint(str(root), run_name)
        if checkpoint is not None:
            return checkpoint.state.step
        time.sleep(0.2)
    raise AssertionError("no checkpoint within 240 s")


class _KillsItsWorkerOnce:
    """A collate that kills its process the first time that it has made `batches` batches."""

    def __init__(self, flag: Path, batches: int) -> None:
        self.flag, self.left = flag, batches

    def __call__(self, examples: Any) -> dict[str, Tensor]:
        self.left -= 1
        if self.left == 0 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return COLLATE(examples)


class _FailsAtTheEnd:
    """A logger that fails its worker after the last checkpoint is committed."""

    def __init__(self, points: object) -> None:
        del points

    def log(self, metrics: object, step: int) -> None:
        del metrics, step

    def pending_points(self) -> list[Any]:
        return []

    def close(self, deadline_s: float = 0) -> None:
        raise RuntimeError("the worker fails after its last checkpoint")


def test_killed_driver_and_killed_worker_resume_bit_for_bit(
    trained: tuple[Path, TrainingResult], tmp_path: Path
) -> None:
    """Driver, workers and Ray die after step 2; then the same run again, beside no validation as `whole` has them.

    In it a worker dies after step 4, and one fails after the last checkpoint.
    """
    root, whole = trained
    write_init(root, "killed")
    driver = subprocess.Popen([sys.executable, "-m", "tests.pipelines.training.driver", str(root), "killed"])
    try:
        step = _wait_for_checkpoint(root, "killed", driver)
    finally:
        family = [driver.pid, *(child.pid for child in psutil.Process(driver.pid).children(recursive=True))]
        for pid in family:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        driver.wait()
    assert step == 2
    job = make_job(root, "killed", dataclasses.replace(SETTINGS, max_failures=1))
    flag = tmp_path / "worker-killed"
    collate = _KillsItsWorkerOnce(flag, batches=5)
    result = fit(dataclasses.replace(job, collate=collate, make_logger=_FailsAtTheEnd))
    assert flag.exists()
    assert result.steps_trained == 4
    states = [untimed(run.checkpoint.state) for run in (result, whole)]
    assert states[0] == states[1]
    losses = [read_losses(run_folder(str(root), name), states[0]) for name in ("killed", "whole")]
    assert losses[0].tobytes() == losses[1].tobytes()
    assert losses[0][-1] == states[0].last_losses[-1]
    assert 1 <= result.checkpoint.state.restarts <= 2  # the second may go on from step 2 again
    weights = consolidated(root, result).state_dict()
    for name, tensor in consolidated(root, whole).state_dict().items():
        assert torch.equal(weights[name], tensor), name


def committed_step(root: str, run_name: str) -> int:
    checkpoint = latest_checkpoint(root, run_name)
    return checkpoint.state.step if checkpoint else -1


@dataclasses.dataclass(frozen=True)
class _StopsAfter:
    """An observer that ends the training once the checkpoint of step `step` is committed."""

    root: str
    run_name: str
    step: int

    def __call__(self, record: StepRecord) -> None:
        if record.step == self.step + 1:
            while committed_step(self.root, self.run_name) < self.step:
                time.sleep(0.1)
            raise RuntimeError("stopped by the test")


def test_another_number_of_workers_trains_the_same(trained: tuple[Path, TrainingResult]) -> None:
    """Two workers, then one, then three, which share the four micro-batches of a step unevenly."""
    root, whole = trained
    write_init(root, "moved")
    for workers, stop in ((2, 2), (1, 4)):
        job = make_job(root, "moved", dataclasses.replace(SETTINGS, workers=workers))
        with pytest.raises(TrainingError, match="stopped by the test"):
            fit(dataclasses.replace(job, observe=_StopsAfter(str(root), "moved", stop)))
        assert committed_step(str(root), "moved") == stop
    result = fit(make_job(root, "moved", dataclasses.replace(SETTINGS, workers=3)))
    state, undisturbed = result.checkpoint.state, whole.checkpoint.state
    assert (state.world_size, state.restarts, result.steps_trained) == (3, 2, 2)
    losses = [read_losses(run_folder(str(root), name), state) for name in ("moved", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert (state.samples_seen, state.dropped) == (undisturbed.samples_seen, undisturbed.dropped)
    assert state.final == pytest.approx(undisturbed.final, rel=1e-5)
    plan = Plan(TOTAL, SAMPLES)
    ledger = load_ledger(Path(result.checkpoint.url), plan.sizes)
    assert (ledger.trained, ledger.dropped) == (SAMPLES - 1, 1)
    ledger.require_equal(plan.consumed(TOTAL), "the last checkpoint")
    weights = consolidated(root, result).state_dict()
    for name, tensor in consolidated(root, whole).state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_a_validated_checkpoint_can_be_exported(trained: tuple[Path, TrainingResult]) -> None:
    """That validations leave the training as it is, others show: they have none, and end as this one, bit for bit."""
    root, result = trained
    worst = CheckpointRef("last", dataclasses.replace(result.checkpoint.state, final={"heldout_loss": math.inf}))
    best = checkpoint_to_export(str(root), "whole", worst, "best")
    assert best.state.step in (2, 4)
    assert best.state.final.keys() == result.checkpoint.state.final.keys()
    parity, _ = read_parity(Path(best.url) / PARITY_FILE)
    with torch.no_grad():
        again = consolidate(Path(best.url), StandInModel, root / "runs" / "whole" / "init")(**parity.inputs).logits
    torch.testing.assert_close(again, parity.logits, rtol=0, atol=1e-5)


def test_a_fault_in_a_data_task_reaches_the_driver(tmp_path: Path, cluster: None) -> None:
    write_init(tmp_path, "broken")
    with pytest.raises(ValueError, match="row 40") as error:
        fit(make_job(tmp_path, "broken", dataclasses.replace(SETTINGS, workers=1), fails_at=40))
    assert type(error.value) is ValueError
    assert str(error.value) == "row 40 cannot be read: shard-000003.tar is truncated"
