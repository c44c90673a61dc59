"""The test suite as two pytest processes side by side: `python -m tests.run`, `make test`.

Both wait much for servers and workers, so together they need little longer than the longer one. Arguments go to both.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("tests/meteor_model", "tests/benchmarks", "tests/infra", "tests/jobs")
"""Folders that are tested beside all others, which follow from it: a new folder belongs to a half by itself."""
NO_TESTS = 5
"""pytest's exit status where nothing was selected, as `-k` may leave of one half."""


def halves(beside: Sequence[str] = BESIDE) -> tuple[list[str], list[str]]:
    """The arguments that select each half."""
    return [f"--ignore={folder}" for folder in beside], list(beside)


def verdict(statuses: Sequence[int]) -> int:
    """The exit status of the whole: that of a half that failed, if any did."""
    failed = [status for status in statuses if status not in (0, NO_TESTS)]
    return failed[0] if failed else min(statuses)


def run_halves(commands: Sequence[Sequence[str]]) -> int:
    """Run two commands at once; print the first as it goes and the second after it. Returns the exit status.

    An interrupt goes to both as one SIGTERM, and both are waited for: they stop the servers that they started.
    """
    with tempfile.TemporaryFile("w+") as held:
        outputs = (None, held)
        # Groups of their own: an interrupt of the terminal would reach them a second time and cut their cleaning up.
        started = [
            subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output and subprocess.STDOUT, process_group=0)
            for command, output in zip(commands, outputs, strict=True)
        ]

        def forward(number: int, frame: FrameType | None) -> None:
            for process in started:
                with suppress(ProcessLookupError):
                    process.terminate()

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            statuses = [process.wait() for process in started]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        held.seek(0)
        print(f"\n{' '.join(commands[1])}\n{held.read()}", flush=True)
    return verdict(statuses)


def main(arguments: Sequence[str]) -> int:
    """Run both halves with further arguments of pytest. Returns the exit status."""
    begun = time.monotonic()
    status = run_halves([[sys.executable, "-m", "pytest", *half, *arguments] for half in halves()])
    print(f"both halves: {time.monotonic() - begun:.0f} s, exit status {status}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
