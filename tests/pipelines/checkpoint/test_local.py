"""Local folders of checkpoints, and copies that processes of a machine share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.checkpoint import local
from pipelines.checkpoint.local import local_copy, new_folder
from pipelines.io import sealed, storage
from pipelines.io.upload import upload_folder
from tests.pipelines.s3_fixture import BUCKET, S3Server


def test_local_folders_of_dead_workers_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead is whose lock is free: numbers of processes mean nothing in another container."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine, other = new_folder("s3://b/runs/a"), new_folder("s3://b/runs/b")
    code = f"""
import tempfile; tempfile.tempdir = {str(tmp_path)!r}
from pipelines.checkpoint.local import new_folder
print(new_folder("s3://b/runs/a"))
"""
    dead = Path(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    assert dead.is_dir()
    assert mine.is_dir(), "a living process's folder was swept by another"
    mine.rmdir()  # as Ray does after the upload
    again = new_folder("s3://b/runs/a")
    folders = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert folders == sorted([other, again])
    assert len(list(tmp_path.glob("*.lock"))) == 2


@pytest.mark.stack
def test_a_copy_is_brought_once_for_all_who_have_it_open(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a").write_bytes(os.urandom(100))
    url = f"s3://{BUCKET}/copies/a"
    sealed.write_list(url, sealed.sums_of(source))
    upload_folder(source, url)
    fetched: list[int] = []
    fetch = sealed.fetch

    def counted(folder: sealed.Folder, target: Path) -> None:
        fetched.append(1)
        fetch(folder, target)

    monkeypatch.setattr(local.sealed, "fetch", counted)
    with local_copy(url) as first:
        with local_copy(url) as second:
            assert first == second
        assert (first / "deep" / "a").read_bytes() == (source / "deep" / "a").read_bytes()
        assert fetched == [1]
        storage.delete(f"{url}/deep/a")
        (source / "deep" / "a").write_bytes(b"new")
        sealed.write_list(url, sealed.sums_of(source))
        upload_folder(source, url)
        with local_copy(url) as third:  # other content under the same address
            assert (third / "deep" / "a").read_bytes() == b"new"
    assert not first.exists()
    assert [path.suffix for path in first.parent.iterdir() if path.suffix != ".gate"] == []
