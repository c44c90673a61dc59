"""A job as a user starts it, on a Ray of its own, and killed with all of it by SIGKILL."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from infra.services import OF_EVERY_NODE

ROOT = Path(__file__).resolve().parents[2]


def own_environment() -> dict[str, str]:
    """This process's environment without the Ray that it uses, and with what every Ray of the tests gets."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | OF_EVERY_NODE


def kill_when(reached: Callable[[], bool], command: Sequence[str], environment: dict[str, str], log: Path) -> None:
    """Start a command and kill its whole process group as soon as it has `reached` something."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while not reached():
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
