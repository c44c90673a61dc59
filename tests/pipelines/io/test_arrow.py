"""Ray's filesystem: what Ray Train and Tune do with one, over the client of everything else."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pyarrow.fs
import pytest
from pyarrow.fs import FileSelector, FileType, LocalFileSystem

from pipelines.io.arrow import arrow_filesystem
from tests.pipelines.fake_s3 import BUCKET, FakeS3

URL = f"s3://{BUCKET}/runs/a/train"
FILES = {"step-1/state.json": b"{}", "step-1/zero3/part.pt": os.urandom(300_000), "snapshot.json": b"[1]"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(data)
    return tmp_path / "local"


def test_folders_go_up_and_come_back(fake_s3: FakeS3, folder: Path, tmp_path: Path) -> None:
    filesystem, path = arrow_filesystem(URL)
    filesystem.create_dir(path)
    pyarrow.fs.copy_files(str(folder), path, source_filesystem=LocalFileSystem(), destination_filesystem=filesystem)
    assert fake_s3.objects == {f"runs/a/train/{name}": data for name, data in FILES.items()}
    again = pickle.loads(pickle.dumps(filesystem))
    assert again == filesystem
    assert b"secret" not in pickle.dumps(filesystem)
    (tmp_path / "back").mkdir()
    pyarrow.fs.copy_files(path, str(tmp_path / "back"), source_filesystem=again)
    assert {name: (tmp_path / "back" / name).read_bytes() for name in FILES} == FILES


def test_what_is_where(fake_s3: FakeS3) -> None:
    fake_s3.objects = {f"runs/a/train/{name}": data for name, data in FILES.items()}
    fake_s3.objects["runs/a/train-2/x"] = b"x"
    filesystem, path = arrow_filesystem(URL)
    infos = filesystem.get_file_info([path, f"{path}/snapshot.json", f"{path}/step-1", f"{path}/step", f"{path}/none"])
    kinds = [FileType.Directory, FileType.File, FileType.Directory, FileType.NotFound, FileType.NotFound]
    assert [info.type for info in infos] == kinds
    assert infos[1].size == 3
    listed = filesystem.get_file_info(FileSelector(path))
    assert {info.base_name: info.type for info in listed} == {
        "step-1": FileType.Directory,
        "snapshot.json": FileType.File,
    }
    deep = filesystem.get_file_info(FileSelector(path, recursive=True))
    assert {info.path.removeprefix(f"{path}/") for info in deep if info.type == FileType.File} == set(FILES)
    assert filesystem.get_file_info(FileSelector(f"{path}/none", allow_not_found=True)) == []
    with pytest.raises(FileNotFoundError):
        filesystem.get_file_info(FileSelector(f"{path}/none"))


def test_files_are_read_anywhere_and_removed(fake_s3: FakeS3) -> None:
    fake_s3.objects = {f"runs/a/train/{name}": data for name, data in FILES.items()}
    filesystem, path = arrow_filesystem(URL)
    data = FILES["step-1/zero3/part.pt"]
    with filesystem.open_input_file(f"{path}/step-1/zero3/part.pt") as stream:
        assert stream.size() == len(data)
        stream.seek(250_000)
        assert stream.read(10) == data[250_000:250_010]
        assert stream.read_at(7, 3) == data[3:10]
        stream.seek(0)
        assert stream.read() == data
    with pytest.raises(FileNotFoundError):
        filesystem.open_input_stream(f"{path}/none")
    with filesystem.open_output_stream(f"{path}/snapshot.json") as out:
        out.write(b"[1,")
        out.write(b"2]")
    assert fake_s3.objects["runs/a/train/snapshot.json"] == b"[1,2]"
    filesystem.move(f"{path}/snapshot.json", f"{path}/moved.json")
    filesystem.delete_dir(f"{path}/step-1")
    assert set(fake_s3.objects) == {"runs/a/train/moved.json"}
    filesystem.delete_file(f"{path}/moved.json")
    filesystem.delete_file(f"{path}/moved.json")
    assert fake_s3.objects == {}


def test_a_local_run_uses_pyarrow_s_own(tmp_path: Path) -> None:
    filesystem, path = arrow_filesystem(str(tmp_path / "runs"))
    assert isinstance(filesystem, LocalFileSystem)
    assert path == str(tmp_path / "runs")
