"""What stops the loop, on one worker without DeepSpeed: faulty samples, a loss that is no number, a short stream."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from meteor_model.collate import collate
from meteor_model.flops import PassFlops, TrainingFlops
from pipelines.checkpoint.state import TrainState
from pipelines.checkpoint.zero3 import parameter_groups
from pipelines.data.schema import Row
from pipelines.recovery.preemption import PreemptedError, Preemption
from pipelines.training.batches import BatchReader, MicroBatch, Share
from pipelines.training.loop import DivergedError, Loop, TooManyDroppedError
from pipelines.training.pace import WARM_UP_STEPS, Device, Pace
from pipelines.training.worker import Worker
from tests.pipelines.training.rows import IMAGE_SIZE, PAD, make_row
from tests.pipelines.training.stand_in import SAMPLES, SETTINGS, TOTAL, StandInConfig, StandInModel


class OneProcessEngine:
    """The part of DeepSpeed's engine that the loop uses; it updates after every `accumulation` steps."""

    def __init__(self, accumulation: int) -> None:
        torch.manual_seed(0)
        self.model = StandInModel(StandInConfig())
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, SETTINGS.optimizer))
        self.device = torch.device("cpu")
        self.accumulation = accumulation
        self.steps = 0
        self.spoiled_at = -1
        self.steep_at = -1
        self.gave_logits: set[bool] = set()

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        self.gave_logits.add(output.logits is not None)
        if self.steps // self.accumulation == self.spoiled_at:
            return SimpleNamespace(loss=output.loss * math.nan, pruning_stats=output.pruning_stats)
        return output

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self.steps += 1
        if self.steps % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> float:
        return math.inf if self.steps == self.steep_at * self.accumulation else 1.0


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class NothingSaved:
    """A saver that only remembers."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.samples = 0
        self.losses: list[float] = []

    def trained(self, members: Sequence[MicroBatch], loss: float) -> None:
        self.losses.append(loss)
        self.samples += sum(batch.seen + len(batch.dropped) for batch in members)

    def validates_next(self, state: TrainState) -> bool:
        return False

    def save(self, state: TrainState, pending: object, parity: object = None) -> str:
        self.steps.append(state.step)
        return f"step-{state.step}"

    def wait_committed(self, name: str, timeout_s: float) -> bool:
        return True


class Notice:
    """A preemption notice that comes in a given step."""

    def __init__(self, step: int, kind: Literal["signal", "drain"]) -> None:
        self.step = step
        self.kind = kind
        self.asked = 0

    def votes(self) -> tuple[int, int]:
        self.asked += 1
        return int(self.asked == self.step), 0

    def agree(self, signalled: int, due: int) -> Preemption | None:
        return Preemption(self.kind, None, "worker 0 goes") if signalled else None


def make_loop(
    faulty: range = range(0),
    rows: int = TOTAL,
    notice: Notice | None = None,
    of_length: Callable[[Row], Row] = lambda row: row,
    **changes: Any,
) -> tuple[Loop, Iterator[Any]]:
    settings = dataclasses.replace(SETTINGS, workers=1, **{"checkpoint_every_steps": 100, **changes})
    engine = OneProcessEngine(settings.accumulation)
    loop = Loop(
        settings,
        SAMPLES,
        Worker(engine, rank=0, world=1, start=""),
        TrainState("abc", 1, TOTAL // 16),
        saver=NothingSaved(),  # type: ignore[arg-type]
        preemption=notice or Notice(1000, "drain"),  # type: ignore[arg-type]
    )
    share = Share(rank=0, world=1, per_step=settings.micro_batches_per_step)
    reader = BatchReader(partial(collate, pad_token_id=PAD, image_size=IMAGE_SIZE), PAD, 4, share)
    every = [of_length(make_row(row, TOTAL, SAMPLES, faulty)) for row in range(rows)]
    groups = (every[first : first + 4] for first in range(0, rows, 4))
    return loop, reader.read(groups, 0, TOTAL)


@pytest.mark.usefixtures("alone")
def test_progress_is_shown_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    loop, batches = make_loop(range(5, 6))
    loop.run(batches)
    assert loop.state.done
    assert (loop.state.samples_seen, loop.state.dropped) == (SAMPLES - 1, {"undecodable_image": 1})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(
        f"[meteor 1/6] step 1/6  loss {loop.state.first_losses[0]:.4f}  lr 1.00e-02  grad 1.00  "
    )
    assert " samples/s  " in lines[0]
    assert lines[-1].endswith("1 kept  dropped 1")
    assert loop.state.first_losses == loop.state.last_losses == tuple(loop.saver.losses)  # type: ignore[arg-type]


@pytest.mark.usefixtures("alone")
def test_a_loss_in_chunks_is_the_plain_one_without_logits() -> None:
    losses = {}
    for chunk in (None, 3):
        loop, batches = make_loop(loss_chunk=chunk)
        loop.run(batches)
        losses[chunk] = loop.saver.losses
        assert loop.worker.engine.gave_logits == {chunk is None}
    assert losses[3] == pytest.approx(losses[None], rel=1e-5)


@pytest.mark.usefixtures("alone")
def test_utilisation_is_shown_and_logged_once_the_warm_up_is_behind(capsys: pytest.CaptureFixture[str]) -> None:
    loop, batches = make_loop()
    logged: list[Mapping[str, float]] = []
    loop.logger = SimpleNamespace(log=lambda metrics, step: logged.append(metrics))
    flops = TrainingFlops(PassFlops(10**6), PassFlops(10**6), PassFlops(10**6), PassFlops(0), PassFlops(0))
    loop.pace = Pace(Device(flops, peak=1e9))
    loop.run(batches)
    lines = capsys.readouterr().out.splitlines()
    assert not any("MFU" in line or "data wait" in line for line in lines[:WARM_UP_STEPS])
    assert all(re.search(r" tokens/s  MFU \d+%  data wait \d+%  padding ", line) for line in lines[WARM_UP_STEPS:])
    assert {"mfu", "hfu", "workers/tflops", "workers/peak_memory_gb"} <= logged[-1].keys()
    assert logged[-1]["hfu"] > logged[-1]["mfu"], "padding is computed"
    assert loop.state.measured.samples == loop.state.samples_seen - WARM_UP_STEPS * 16


@pytest.mark.usefixtures("alone")
def test_too_many_faulty_samples_stop_the_job() -> None:
    loop, batches = make_loop(range(1, 20, 3))
    with pytest.raises(TooManyDroppedError) as error:
        loop.run(batches)
    message = str(error.value)
    assert "5 of 93 samples are faulty, more than max_drop_share 0.05" in message
    assert "{'undecodable_image': 5}" in message
    assert "key1 (dataset 0, epoch 0, shard 0, index 1): undecodable_image, not an image; key4" in message
    assert loop.state.step == 1


def of_length(row: Row, too_long: range, truncated: range) -> Row:
    """The row as one whose sample is too long, or was truncated."""
    if row.row in too_long and not row.void:
        return dataclasses.replace(
            row, reason="too_long", detail="9 tokens", input_ids=[PAD], labels=[-100], num_images=0
        )
    return dataclasses.replace(row, cut=3 if row.row in truncated and row.usable else 0)


@pytest.mark.usefixtures("alone")
def test_length_is_counted_apart_from_faults(capsys: pytest.CaptureFixture[str]) -> None:
    """40 of 93 samples are too long, 10 truncated, one is faulty: under a ceiling of 5 % the training goes on."""
    loop, batches = make_loop(
        range(5, 6), of_length=partial(of_length, too_long=range(10, 50), truncated=range(60, 70))
    )
    loop.run(batches)
    state = loop.state
    assert state.done
    assert (state.dropped, state.faulty) == ({"undecodable_image": 1, "too_long": 40}, 1)
    assert (state.truncated, state.samples_seen) == (10, SAMPLES - 41)
    assert capsys.readouterr().out.splitlines()[-1].endswith("1 kept  dropped 41  truncated 10")
    assert TrainState.from_json(state.to_json(), "here") == state


@pytest.mark.usefixtures("alone")
def test_a_training_that_trains_nothing_is_an_error() -> None:
    loop, batches = make_loop(of_length=partial(of_length, too_long=range(TOTAL), truncated=range(0)))
    with pytest.raises(TooManyDroppedError, match=r"none of the first 93 samples could be trained.*too_long': 93"):
        loop.run(batches)


@pytest.mark.usefixtures("alone")
def test_a_loss_that_is_no_number_stops_before_the_update() -> None:
    loop, batches = make_loop()
    engine = loop.worker.engine
    engine.spoiled_at = 2
    with pytest.raises(DivergedError, match="loss of step 3 is nan") as error:
        loop.run(batches)
    assert all(f"key{row} (dataset 0, epoch 0, shard 3, index {row - 30})" in str(error.value) for row in range(32, 40))
    assert loop.state.step == 2
    assert engine.steps == 3 * engine.accumulation - 1
    assert all(parameter.isfinite().all() for parameter in engine.model.parameters())


@pytest.mark.usefixtures("alone")
def test_a_stream_shorter_than_the_plan_is_an_error() -> None:
    loop, batches = make_loop(rows=40)
    with pytest.raises(ValueError, match="expected rows 40 to 43, and the data stream ended"):
        loop.run(batches)


@pytest.mark.usefixtures("alone")
def test_a_gradient_that_is_no_number_is_never_saved() -> None:
    loop, batches = make_loop(checkpoint_every_steps=2)
    loop.worker.engine.steep_at = 4
    with pytest.raises(DivergedError, match="gradient of step 4 has the norm inf"):
        loop.run(batches)
    assert loop.saver.steps == [2]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("alone")
def test_checkpoints_come_at_their_steps_and_the_ledger_hears_of_every_sample() -> None:
    loop, batches = make_loop(range(5, 6), checkpoint_every_steps=2)
    loop.run(batches)
    assert (loop.saver.steps, loop.saver.samples) == ([2, 4], SAMPLES)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("alone")
def test_a_notice_makes_one_checkpoint_at_once_and_sigterm_ends() -> None:
    loop, batches = make_loop(notice=Notice(3, "signal"))
    with pytest.raises(PreemptedError, match="after step 3: worker 0 goes; the checkpoint of step 3 is whole"):
        loop.run(batches)
    assert loop.saver.steps == [3]  # type: ignore[attr-defined]
    loop, batches = make_loop(notice=Notice(3, "drain"))
    loop.run(batches)
    assert (loop.saver.steps, loop.state.done) == ([3], True)  # type: ignore[attr-defined]
