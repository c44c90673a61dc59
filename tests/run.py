"""The test suite as pytest processes side by side: `python -m tests.run`, `make test`.

Tests wait much for servers and workers, so LANES processes keep two cores busy. When one has ended, the next group
begins, the dearest first; fixtures of a session (servers, models) are shared within a group. Arguments go to all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
LANES = 3
THREADS = {"OMP_NUM_THREADS": "1"}
"""Of torch in every lane: two threads that wait for each other at each operator are slower than one where other
processes take a core from them."""
GROUPS: tuple[tuple[str, ...], ...] = (
    ("tests/jobs",),
    ("tests/pipelines/training", "tests/pipelines/recovery"),
    ("tests/jobs/test_sweep.py", "tests/tune"),
    ("tests/meteor_model",),
    ("tests/benchmarks", "tests/infra"),
    ("tests/pipelines/registry", "tests/pipelines/tracking", "tests/pipelines/job", "tests/pipelines/inference"),
    (),
    ("tests/pipelines/checkpoint",),
)
"""Files and folders that are tested by one process, less what another group names below them; () is all the rest, so a
new folder belongs to a group by itself."""
INTERRUPTED, NO_TESTS = 2, 5
"""pytest's exit statuses: told to end, and nothing selected, as `-k` may leave of a group."""
POLL_S = 0.1


def selection(group: Sequence[str], groups: Iterable[Sequence[str]] = GROUPS) -> list[str]:
    """The arguments that select a group."""
    others = [PurePosixPath(path) for other in groups if other != group for path in other]
    below = [path for path in others if not group or any(path.is_relative_to(mine) for mine in group)]
    return [*group, *(f"--ignore={path}" for path in below)]


def verdict(statuses: Sequence[int]) -> int:
    """The exit status of the whole: that of a group that failed, if any did."""
    failed = [status for status in statuses if status not in (0, NO_TESTS)]
    return failed[0] if failed else min(statuses)


@dataclass
class Running:
    """A command under way; what it prints is held, or lines of several would mix."""

    command: Sequence[str]
    held: IO[str]
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # A group of its own: an interrupt of the terminal would reach it a second time and cut its cleaning up.
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            env=os.environ | THREADS,
            stdout=self.held,
            stderr=subprocess.STDOUT,
            process_group=0,
        )

    def show(self) -> None:
        """Print what it printed, and what it came to."""
        self.held.seek(0)
        took = f"{time.monotonic() - self.begun:.0f} s, exit status {self.process.returncode}"
        print(f"\n{' '.join(self.command)}\n{self.held.read()}{took}", flush=True)


def run_side_by_side(commands: Sequence[Sequence[str]], lanes: int = LANES) -> int:
    """Run commands, at most `lanes` at once; each is printed when it has ended. Returns the exit status.

    An interrupt goes to those that run as one SIGTERM, and they are waited for: they stop the servers that they
    started. None is begun after it.
    """
    waiting, running, statuses = list(commands), list[Running](), list[int]()
    interrupts, told = list[int](), False
    before = {
        number: signal.signal(number, lambda number, _: interrupts.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    with ExitStack() as files:
        try:
            while waiting or running:
                while waiting and len(running) < lanes:
                    running.append(Running(waiting.pop(0), files.enter_context(tempfile.TemporaryFile("w+"))))
                time.sleep(POLL_S)
                if interrupts and not told:
                    told = True
                    waiting.clear()
                    statuses.append(INTERRUPTED)
                    for one in running:
                        one.process.terminate()
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    statuses.append(one.process.returncode)
                    one.show()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return verdict(statuses)


def main(arguments: Sequence[str]) -> int:
    """Run all groups with further arguments of pytest. Returns the exit status."""
    begun = time.monotonic()
    commands = [[sys.executable, "-m", "pytest", *selection(group), *arguments] for group in GROUPS]
    print(f"{len(commands)} groups of tests, {LANES} at a time; each is shown when it has ended", flush=True)
    status = run_side_by_side(commands)
    print(f"\nall groups: {time.monotonic() - begun:.0f} s, exit status {status}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
