"""What the jobs that ask and file share: a fault of the input is one line for people."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipelines.tracking.redact import hide_passwords


def run_command(command: Callable[[], object]) -> int:
    """Exit status of a job: 0 when it is done, 2 for a fault of the input, which is one line on stderr."""
    try:
        command()
    except ValueError as error:
        print(f"error: {hide_passwords(str(error))}", file=sys.stderr)
        return 2
    return 0
