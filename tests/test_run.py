"""The groups of the suite: every test is in one, a failure of any counts, an interrupt lets all clean up."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.run import GROUPS, ROOT, run_side_by_side, selection, verdict

CLEANING = """
import pathlib, signal, sys, time
def stop(number, frame): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
place = pathlib.Path(sys.argv[1])
(place / "begun").touch()
try:
    time.sleep(60)
finally:
    time.sleep(0.3)
    (place / "cleaned").touch()
"""


def selects(arguments: list[str], file: Path) -> bool:
    """Whether pytest takes a file for these arguments."""
    paths = [ROOT / one for one in arguments if not one.startswith("--")] or [ROOT / "tests"]
    ignored = [ROOT / one.removeprefix("--ignore=") for one in arguments if one.startswith("--")]
    return any(file.is_relative_to(path) for path in paths) and not any(file.is_relative_to(path) for path in ignored)


def test_every_test_module_belongs_to_one_group() -> None:
    assert all((ROOT / path).exists() for group in GROUPS for path in group)
    chosen = [selection(group) for group in GROUPS]
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        assert sum(selects(one, file) for one in chosen) == 1, file


@pytest.mark.parametrize(("statuses", "whole"), [((0, 0), 0), ((0, 1), 1), ((2, 0), 2), ((0, 5), 0), ((5, 5), 5)])
def test_a_failure_of_any_group_counts(statuses: tuple[int, int], whole: int) -> None:
    assert verdict(statuses) == whole


def test_each_is_printed_whole_when_it_ends_and_the_next_takes_its_place(capfd: pytest.CaptureFixture[str]) -> None:
    def program(name: str, pause_s: float, status: int = 0) -> list[str]:
        code = f"import time; print('{name} begins', flush=True); time.sleep({pause_s}); print('{name} ends')"
        return [sys.executable, "-c", f"{code}; exit({status})"]

    commands = [program("slow", 3.0), program("quick", 0.0, status=3), program("next", 0.0)]
    assert run_side_by_side(commands, lanes=2) == 3
    printed = [line for line in capfd.readouterr().out.splitlines() if line.endswith((" begins", " ends"))]
    assert printed == [f"{name} {what}" for name in ("quick", "next", "slow") for what in ("begins", "ends")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_all_that_run_clean_up_and_begins_no_more(number: signal.Signals, tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two", tmp_path / "three"]
    for place in places:
        place.mkdir()
    commands = [[sys.executable, "-c", CLEANING, str(place)] for place in places]

    def interrupt() -> None:
        while not all((place / "begun").exists() for place in places[:2]):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert run_side_by_side(commands, lanes=2) != 0
    thread.join()
    assert [(place / "cleaned").exists() for place in places] == [True, True, False]
