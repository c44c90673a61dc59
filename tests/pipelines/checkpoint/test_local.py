"""Local folders of checkpoints."""

import os
from pathlib import Path

import pytest

from pipelines.checkpoint.local import new_folder


def test_local_folders_of_dead_workers_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine, other = new_folder("s3://b/runs/a"), new_folder("s3://b/runs/b")
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-"))
    dead.mkdir()
    again = new_folder("s3://b/runs/a")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in (mine, other, again))
