"""What stops the loop, on one worker without DeepSpeed: faulty samples, a loss that is no number, a short stream."""

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meteor_model.processing_meteor import collate
from pipelines.batches import BatchReader
from pipelines.checkpoint import TrainState
from pipelines.loop import DivergedError, Loop, TooManyDropped
from pipelines.zero3 import parameter_groups
from tests.training.rows import IMAGE_SIZE, PAD, make_row
from tests.training.stand_in import SAMPLES, SETTINGS, TOTAL, StandInConfig, StandInModel


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

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
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
        return 1.0


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def make_loop(faulty: range = range(0), rows: int = TOTAL) -> tuple[Loop, Iterator[Any]]:
    settings = dataclasses.replace(SETTINGS, workers=1, checkpoint_every_steps=100)
    engine = OneProcessEngine(settings.accumulation)
    loop = Loop(settings, SAMPLES, engine, TrainState("abc", 1, TOTAL // 16), rank=0, world=1, logger=None)
    reader = BatchReader(partial(collate, pad_token_id=PAD, image_size=IMAGE_SIZE), PAD, 4, rank=0, world=1)
    groups = ([make_row(row, TOTAL, SAMPLES, faulty) for row in range(first, first + 4)] for first in range(0, rows, 4))
    return loop, reader.read(groups, 0)


@pytest.mark.usefixtures("alone")
def test_progress_is_shown_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    loop, batches = make_loop(range(5, 6))
    loop.run(batches)
    assert loop.state.done
    assert (loop.state.samples_seen, loop.state.dropped) == (SAMPLES - 1, {"undecodable_image": 1})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith(f"step 1/6  loss {loop.state.losses[0]:.4f}  lr 1.00e-02  grad 1.00  ")
    assert " samples/s  " in lines[0]
    assert lines[-1].endswith("1 kept  dropped 1")


@pytest.mark.usefixtures("alone")
def test_too_many_faulty_samples_stop_the_job() -> None:
    loop, batches = make_loop(range(1, 20, 3))
    with pytest.raises(TooManyDropped) as error:
        loop.run(batches)
    message = str(error.value)
    assert "5 of 93 samples are faulty, more than max_drop_share 0.05" in message
    assert "{'undecodable_image': 5}" in message
    assert "key1 (shard 0, sample 1): undecodable_image, not an image; key4" in message
    assert loop.state.step == 1


@pytest.mark.usefixtures("alone")
def test_a_loss_that_is_no_number_stops_before_the_update() -> None:
    loop, batches = make_loop()
    engine = loop.engine
    engine.spoiled_at = 2
    with pytest.raises(DivergedError, match="loss of step 3 is nan"):
        loop.run(batches)
    assert loop.state.step == 2
    assert engine.steps == 3 * engine.accumulation - 1
    assert all(parameter.isfinite().all() for parameter in engine.model.parameters())


@pytest.mark.usefixtures("alone")
def test_a_stream_shorter_than_the_plan_is_an_error() -> None:
    loop, batches = make_loop(rows=40)
    with pytest.raises(ValueError, match="the data stream ended in step 3 of 6"):
        loop.run(batches)
