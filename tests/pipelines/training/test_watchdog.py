"""Processes of a real training that are stopped: a data task is replaced, a worker's stop starts all again."""

import dataclasses
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.checkpoint.losses import read_losses
from pipelines.io.pulse import mailbox_name
from pipelines.io.run_folder import run_folder
from pipelines.training.loop import StepRecord
from pipelines.training.trainer import TrainingResult, fit
from tests.pipelines.training.stand_in import SETTINGS, make_job, untimed, write_init

STUCK_AFTER_S = 10.0
NOTICED_S = 4.0
"""The most beyond the limit: looks of sender and observer."""
STOPPED_STEP, STOPPED_ROW = 3, 20


@dataclass(frozen=True)
class StopsItsWorkerOnce:
    """An observer that stops worker 1 after a step, as `kill -STOP` does."""

    flag: str

    def __call__(self, record: StepRecord) -> None:
        if (record.step, record.rank) == (STOPPED_STEP, 1) and not Path(self.flag).exists():
            Path(self.flag).touch()
            os.kill(os.getpid(), signal.SIGSTOP)


def test_what_is_stopped_is_named_and_replaced_and_nothing_is_lost(
    trained: tuple[Path, TrainingResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, whole = trained
    write_init(root, "stopped")
    folder = run_folder(str(root), "stopped")
    settings = dataclasses.replace(SETTINGS, max_failures=1, stuck_after_s=STUCK_AFTER_S)
    job = make_job(
        root, "stopped", settings, mailbox=mailbox_name(folder.url), stops=(STOPPED_ROW, str(tmp_path / "task"))
    )
    result = fit(dataclasses.replace(job, observe=StopsItsWorkerOnce(str(tmp_path / "worker"))))
    output = capsys.readouterr().out

    silent = r"no sign of life for (\d+) s \(limit (\d+) s\): "
    task = re.search(silent + r"data task \d+ .* last in encoding \(row 20\)", output)
    worker = re.search(
        silent + r"worker 1 \(pid \d+ on .*, node .*\) last in [a-z ]+ of step [123] ?"
        r"(\(last sample key\d+ .*\))?\. Meanwhile: worker 0 in ",  # none, where the last beat is of the first wait
        output,
    )
    assert task is not None, output
    assert worker is not None, output
    for seconds, limit in (task.groups()[:2], worker.groups()[:2]):  # the limit holds the slowest step, too
        assert float(seconds) <= float(limit) + NOTICED_S
    assert "restart 1 of at most 1 in a row, from " in output
    reports = sorted(Path(folder.stuck).iterdir())
    assert len(reports) == 2
    assert all("state T (stopped)" in report.read_text() for report in reports)
    assert "loop.py" in reports[1].read_text(), "the stacks of the workers"

    state, undisturbed = (untimed(one.checkpoint.state) for one in (result, whole))
    assert state == undisturbed
    losses = [read_losses(run_folder(str(root), name), state) for name in ("stopped", "whole")]
    assert losses[0].tobytes() == losses[1].tobytes()
    own = whole.checkpoint.state.own_seconds
    assert len(own) == len(whole.checkpoint.state.data_seconds) == 2
    assert 0 < min(own) <= max(own) <= whole.checkpoint.state.step_seconds + 1e-6
