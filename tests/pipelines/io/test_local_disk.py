"""A full local disk is said in words, by whatever writes and however it fails."""

import errno
import os
import pickle
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipelines.io import local_disk, sealed, storage
from pipelines.io.disk_room import LocalDiskError
from pipelines.io.local_disk import writing
from tests.pipelines.s3_fixture import BUCKET, S3Server

LIMIT = 4096
TENSOR = {"weight": torch.zeros(100_000)}


@contextmanager
def small_disk() -> Iterator[None]:
    """Files of this process cannot grow beyond LIMIT bytes, as on a disk that has no more; nor can pytest's output."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Path], object]] = {
    "torch.save": lambda path: torch.save(TENSOR, path),
    "torch.save, the old format": lambda path: torch.save(TENSOR, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: save_file(TENSOR, path),
    "bytes": lambda path: path.write_bytes(bytes(10 * LIMIT)),
    "text": lambda path: path.write_text("x" * 10 * LIMIT),
    "numpy": lambda path: np.save(path, np.zeros(LIMIT)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_cannot_grow_names_disk_folder_and_need(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(LocalDiskError) as caught,
        small_disk(),
        writing(tmp_path / "deep", 400_000, "the checkpoint of step 7"),
    ):
        WRITERS[name](tmp_path / "file")
    for part in (str(tmp_path / "deep"), "the checkpoint of step 7 needs 400000 bytes", "bytes free", "TMPDIR"):
        assert part in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_what_does_not_fit_is_known_before_a_byte_is_written(tmp_path: Path) -> None:
    need = shutil.disk_usage(tmp_path).total + 1  # what is free changes while others write
    with pytest.raises(LocalDiskError, match=f"needs {need} bytes"), writing(tmp_path, need, "the copy of x"):
        raise AssertionError("not reached")


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    for error in (ValueError("a weight is missing"), RuntimeError("shapes differ"), OSError(errno.EACCES, "denied")):
        with pytest.raises(type(error)) as caught, writing(tmp_path, None, "x"):
            raise error
        assert caught.value is error
    circle = ValueError("a chain that runs in a circle")
    circle.__context__ = RuntimeError("x")
    circle.__context__.__context__ = circle
    assert not local_disk.is_disk_full(circle)
    full = RuntimeError("the writer failed")
    full.__cause__ = OSError(errno.EDQUOT, "quota")
    with pytest.raises(LocalDiskError, match="was cut off"), writing(tmp_path, None, "x"):
        raise full


@pytest.mark.stack
@pytest.mark.parametrize("size", [100, 40 * LIMIT])
def test_a_copy_that_does_not_fit_is_no_fault_of_the_store(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """No retry for two minutes: it fails at once, and names this machine's disk."""
    url = f"s3://{BUCKET}/full/{size}"
    storage.write_bytes(f"{url}/model.bin", os.urandom(size))
    folder = sealed.open_folder(url)
    if size <= LIMIT:
        with small_disk():
            sealed.fetch(folder, tmp_path / "copy")
        return
    needs = f"the copy of {url} needs {size} bytes|the copy of {url}/model.bin"
    with pytest.raises(LocalDiskError, match=needs), small_disk():
        sealed.fetch(folder, tmp_path / "copy")
    monkeypatch.setattr(local_disk, "free_bytes", lambda folder: 1000)
    with pytest.raises(LocalDiskError, match=f"the copy of {url} needs {size} bytes"):
        sealed.fetch(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()
