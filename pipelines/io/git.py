"""Which code runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

COMMIT_VARIABLE, UNKNOWN_COMMIT = "METEOR_GIT_COMMIT", "unknown"


def git_commit(root: Path) -> str:
    """The commit of the code: METEOR_GIT_COMMIT (a Ray working directory holds no .git), else git's, else `unknown`.

    A checkout with changes that are not committed ends in `-dirty`.
    """
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN_COMMIT
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else UNKNOWN_COMMIT
