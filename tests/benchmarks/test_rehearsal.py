"""The meter of the rehearsals sees what a process takes, phase by phase, and nothing of other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.rehearsal.expected import compared, expected
from benchmarks.rehearsal.meter import MIB, Meter, folder_bytes
from benchmarks.rehearsal.plays import PLAYS
from benchmarks.rehearsal.report import draw
from benchmarks.rehearsal.stage import PHASE_LINE
from jobs.recipes import RECIPES
from pipelines.job.run import Phases

TAKES = """
import sys, time
kept = b"x" * int(sys.argv[1])
print("taken", flush=True)
sys.stdin.read()
"""


def taking(size: int, temp: Path | None) -> subprocess.Popen[bytes]:
    """A process that has taken `size` bytes, and ends when its input does."""
    environment = {**os.environ, **({"TMPDIR": str(temp)} if temp else {})}
    process = subprocess.Popen(
        [sys.executable, "-c", TAKES, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"taken\n"
    return process


def test_a_phase_has_the_memory_the_files_and_the_bytes_of_its_time(tmp_path: Path) -> None:
    counts = [0, 0]
    mine, other = taking(100 * MIB, tmp_path), taking(300 * MIB, None)
    try:
        meter = Meter(tmp_path, {"store": lambda: (counts[0], counts[1])})
        meter.start()
        meter.phase("first")
        (tmp_path / "file").write_bytes(b"x" * 5 * MIB)
        counts[0] += 7
        time.sleep(1.2)
        meter.phase("second")
        mine.communicate()
        (tmp_path / "file").unlink()
        counts[1] += 9
        time.sleep(1.2)
        taken = meter.stop()
    finally:
        for process in (mine, other):
            process.kill()
            process.wait()
    first, second = taken["first"], taken["second"]
    assert 100 * MIB <= first.memory <= 140 * MIB  # the interpreter takes some
    assert list(first.by_process.values()) == [first.memory]  # a single process
    assert 5 * MIB <= first.temp < 6 * MIB
    assert (first.network, second.network) == ({"store up": 7, "store down": 0}, {"store up": 0, "store down": 9})
    assert 1.2 <= first.seconds < 5
    assert folder_bytes(tmp_path) == 0


def test_a_phase_is_read_off_the_line_that_a_job_says(capsys: pytest.CaptureFixture[str]) -> None:
    with Phases()("calibrate", "start model"):
        pass
    found = PHASE_LINE.match(capsys.readouterr().out)
    assert found is not None
    assert found["name"] == "calibrate"


def test_every_rehearsal_names_jobs_and_recipes_that_exist() -> None:
    for play in PLAYS:
        for command in play.commands:
            assert Path(command.words[0]).is_file()
            if "--recipe" in command.words:
                recipe = command.words[command.words.index("--recipe") + 1]
                assert recipe in RECIPES[Path(command.words[0]).stem]


def test_the_picture_has_a_row_for_every_phase(tmp_path: Path) -> None:
    phase = {"seconds": 1.0, "peak_memory_mib": 2.0, "peak_temp_mib": 3.0, "network_mib": {"store up": 4.0}}
    row = {"phases": {"train": phase, "export": phase}, "estimate": {"train": {"memory_mib": 2.5, "temp_mib": 3.0}}}
    draw(tmp_path / "r.png", {"small": {"commands": {"pretrain": row}}})
    assert (tmp_path / "r.png").stat().st_size > 5000


def test_the_estimate_stands_beside_every_phase_of_a_training() -> None:
    (pretrain, pull) = (PLAYS[1].commands[0], PLAYS[1].commands[1])
    found = expected(pretrain)
    assert set(found) == {"prepare", "calibrate", "train", "export", "answer", "register"}
    assert found["export"]["memory_mib"] > 2 * 1070  # 1.07 G parameters in bf16
    assert found["train"]["memory_mib"] > found["prepare"]["memory_mib"]
    assert expected(pull) == {}
    phase = {"peak_memory_mib": found["export"]["memory_mib"] / 2, "peak_temp_mib": 0.0}
    assert compared({"export": phase, "start": phase}, found) == {"export": {"memory": 0.5, "temp": 0.0}}
