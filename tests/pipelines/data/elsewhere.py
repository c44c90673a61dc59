"""The same program in other processes."""

import os
import subprocess
import sys


def printed_elsewhere(code: str) -> list[str]:
    """What a program prints in two processes that hash differently."""
    return [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "12345")
    ]
