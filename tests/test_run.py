"""The two halves of the suite: nothing is in none, a failure of either counts, an interrupt lets both clean up."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.run import ROOT, halves, run_halves, verdict

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


def test_every_test_module_belongs_to_one_half() -> None:
    rest, beside = halves()
    assert rest == [f"--ignore={folder}" for folder in beside]
    assert all((ROOT / folder).is_dir() for folder in beside)


@pytest.mark.parametrize(("statuses", "whole"), [((0, 0), 0), ((0, 1), 1), ((2, 0), 2), ((0, 5), 0), ((5, 5), 5)])
def test_a_failure_of_either_half_counts(statuses: tuple[int, int], whole: int) -> None:
    assert verdict(statuses) == whole


def test_the_second_is_printed_after_the_first(capfd: pytest.CaptureFixture[str]) -> None:
    slow = [sys.executable, "-c", "import time; time.sleep(0.5); print('first')"]
    quick = [sys.executable, "-c", "import sys; print('second'); sys.exit(3)"]
    assert run_halves([slow, quick]) == 3
    printed = capfd.readouterr().out
    assert printed.index("first\n") < printed.index("second\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_both_clean_up(number: signal.Signals, tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    commands = [[sys.executable, "-c", CLEANING, str(place)] for place in places]

    def interrupt() -> None:
        while not all((place / "begun").exists() for place in places):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    assert run_halves(commands) != 0
    thread.join()
    assert all((place / "cleaned").exists() for place in places)
