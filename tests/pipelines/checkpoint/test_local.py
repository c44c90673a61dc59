"""Local folders of checkpoints, and copies that processes of a machine share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.checkpoint import local
from pipelines.checkpoint.local import local_copy, new_folder
from pipelines.io import sealed
from pipelines.io.node_copies import remove_copies
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


def test_folders_of_another_node_stay_in_a_temp_folder_that_nodes_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock of another node may not be seen here: its folder looks like one of a dead worker."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(local, "own_disk", lambda _: False)
    monkeypatch.setattr(local, "machine", lambda: "node-a")
    of_a = new_folder("s3://b/runs/a")
    local._OWN_LOCKS.pop(of_a).close()  # what node b sees of the lock
    monkeypatch.setattr(local, "machine", lambda: "node-b")
    new_folder("s3://b/runs/a")
    assert of_a.is_dir()
    monkeypatch.setattr(local, "machine", lambda: "node-a")
    new_folder("s3://b/runs/a")
    assert not of_a.exists(), "its own it sweeps"


def _stored(tmp_path: Path, url: str) -> Path:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a").write_bytes(os.urandom(100))
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(os.urandom(1000))
    sealed.write_list(url, sealed.sums_of(source))
    upload_folder(source, url)
    return source


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are brought from the store."""
    names: list[str] = []
    fetch = sealed._fetch

    def counted(folder: sealed.Folder, name: str, target: Path) -> None:
        names.append(name)
        fetch(folder, name, target)

    monkeypatch.setattr(sealed, "_fetch", counted)
    return names


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's temp folder."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.mark.stack
def test_a_copy_is_brought_once_for_all_who_open_it(
    s3: S3Server, tmp_path: Path, temp: Path, fetched: list[str]
) -> None:
    url = f"s3://{BUCKET}/copies/a"
    source = _stored(tmp_path, url)
    with local_copy(url) as first:
        with local_copy(url) as second:
            assert first == second
        assert (first / "deep" / "a").read_bytes() == (source / "deep" / "a").read_bytes()
    with local_copy(url) as again:
        assert again == first
    assert sorted(fetched) == ["config.json", "deep/a", "model.safetensors"]
    (source / "deep" / "a").write_bytes(b"new")
    sealed.write_list(url, sealed.sums_of(source))
    upload_folder(source, url)
    with local_copy(url) as third:  # other content under the same address
        assert (third / "deep" / "a").read_bytes() == b"new"
    assert remove_copies(f"s3://{BUCKET}/copies") == 2
    assert not first.exists()
    assert not third.exists()


@pytest.mark.stack
def test_without_weights_only_what_is_small_is_brought(
    s3: S3Server, tmp_path: Path, temp: Path, fetched: list[str]
) -> None:
    url = f"s3://{BUCKET}/copies/b"
    _stored(tmp_path, url)
    with local_copy(url, weights=False) as folder:
        assert (folder / "config.json").read_text() == "{}"
        assert not (folder / "model.safetensors").exists()
    assert sorted(fetched) == ["config.json", "deep/a"]


def test_a_folder_on_a_disk_is_read_once_to_check_it(
    tmp_path: Path, temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whichever process comes first; who changes a file has it read again."""
    url = str(tmp_path / "stored")
    _stored(tmp_path, url)
    read: list[str] = []
    sha = sealed.sha256_of_file

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha(path)

    monkeypatch.setattr(sealed, "sha256_of_file", counted)
    for _ in range(2):
        with local_copy(url) as folder:
            assert folder == Path(url)
    assert sorted(read) == ["a", "config.json", "model.safetensors"]
    path = Path(url) / "model.safetensors"
    before = path.stat()
    path.write_bytes(bytes(1000))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(sealed.DamagedFileError, match=r"model.safetensors is damaged"), local_copy(url):
        pass
    with local_copy(url, weights=False):
        pass
