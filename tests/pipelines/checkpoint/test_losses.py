"""The losses of a run are read back to the last bit, whenever its workers are killed and however often they start."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.checkpoint.losses import LossFile, LossLog, read_losses, remove_uncommitted_losses, write_losses
from pipelines.checkpoint.state import CheckpointError, TrainState
from pipelines.io.run_folder import RunFolder

START = TrainState("abc", world_size=2, total_steps=1000)


class Run:
    """A training that is killed and started again; `expected` are the losses up to the last commit."""

    def __init__(self, folder: str, committed: TrainState = START) -> None:
        self.folder = RunFolder(folder)
        self.committed = committed
        self.expected = list(committed.losses_in_version_2)
        self.start()

    def start(self) -> None:
        """The workers start from the last commit."""
        remove_uncommitted_losses(self.folder, self.committed.step)
        self.log = LossLog(self.committed)
        self.state = dataclasses.replace(self.committed, losses_in_version_2=())
        self.losses = list(self.expected)

    def train(self, losses: list[float]) -> None:
        for loss in losses:
            self.log.add(loss)
            self.losses.append(loss)
            self.state = dataclasses.replace(self.state.with_loss(loss), step=self.state.step + 1)

    def save(self, committed: bool) -> None:
        write_losses(self.folder, *self.log.take(), retry_s=0.0)
        if committed:
            self.committed = TrainState.from_json(self.state.to_json(), "here")
            self.expected = list(self.losses)


LOSSES = st.lists(st.floats(allow_nan=False), min_size=1, max_size=6)
ENDS = st.sampled_from(["commit", "saved, commit", "killed before the commit", "killed before the save"])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(LOSSES, ENDS), max_size=12))
def test_whatever_is_killed_the_committed_losses_are_read_to_the_last_bit(parts: list[tuple[list[float], str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder)
        for losses, end in parts:
            run.train(losses)
            if end == "saved, commit":  # one checkpoint whose commit came too late to be seen, and the next
                run.save(committed=False)
                run.train(losses)
            if end != "killed before the save":
                run.save(committed="killed" not in end)
            assert read_losses(run.folder, run.committed).tobytes() == np.array(run.expected).tobytes()
            if "killed" in end:
                run.start()


def test_steps_that_are_trained_again_after_a_kill_before_the_commit_have_their_new_losses(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    run.train([3.0, 2.0])
    run.save(committed=True)
    run.train([1.5, 1.25])
    run.save(committed=False)  # the losses are stored, the checkpoint is not: the worker is killed here
    assert read_losses(run.folder, run.committed).tolist() == [3.0, 2.0]
    run.start()
    run.train([1.75])  # a notice makes this start save a step earlier
    run.save(committed=True)
    run.train([1.0])
    run.save(committed=True)
    assert read_losses(run.folder, run.committed).tolist() == [3.0, 2.0, 1.75, 1.0]


def test_a_run_of_version_2_goes_on_and_can_be_finished(tmp_path: Path) -> None:
    losses = [0.1 * step for step in range(40)]
    values = json.loads(dataclasses.replace(START, step=40).to_json())
    del values["first_losses"], values["last_losses"]
    old = TrainState.from_json(json.dumps({**values, "version": 2, "losses": losses}), "here")
    assert read_losses(RunFolder(str(tmp_path)), old).tolist() == losses  # a finished run: nothing is trained any more
    run = Run(str(tmp_path), old)
    run.train([7.0])
    run.save(committed=False)
    run.start()
    run.train([8.0])
    run.save(committed=True)
    assert read_losses(run.folder, run.committed).tolist() == [*losses, 8.0]


def test_a_file_that_is_gone_or_cut_off_is_named(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    for loss in (3.0, 2.0, 1.0):
        run.train([loss, loss])
        run.save(committed=True)
    middle = tmp_path / "step-losses" / LossFile(2, 4).name
    content = middle.read_bytes()
    places = range(0, len(content), 9)
    changed = [content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in places]
    for damaged in (content[:-1], content[:7], content + b"x", *changed):
        middle.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"000000002-000000004.f64 is damaged: it has \d+ bytes, 8 for each"):
            read_losses(run.folder, run.committed)
    middle.write_bytes(content[:16])  # of an earlier version
    assert read_losses(run.folder, run.committed).tolist() == [3.0, 3.0, 2.0, 2.0, 1.0, 1.0]
    middle.unlink()
    with pytest.raises(CheckpointError, match="no unbroken losses of the steps 1 to 6: they end at step 2"):
        read_losses(run.folder, run.committed)
