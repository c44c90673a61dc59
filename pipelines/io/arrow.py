"""The filesystem that Ray keeps checkpoints and its own files with: pyarrow's interface over the one S3 client.

pyarrow's own S3 client knows no proxy, no profile with a role, and no encryption by header, and would be a second one
to set up and to check. Here every call waits out a store that fails for `RETRY_S`; what is pickled holds no
credentials.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.fs
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileSystemHandler, FileType, PyFileSystem

from pipelines.io import ranged, storage
from pipelines.io.addresses import S3_SCHEME, is_s3, local_path, split_s3
from pipelines.io.s3_client import PART_BYTES, s3_client
from pipelines.io.seekable import SeekableFile
from pipelines.io.storage_faults import retried

RETRY_S = 300.0


def arrow_filesystem(url: str) -> tuple[FileSystem, str]:
    """The pyarrow filesystem for `url` and the path inside it. Raises StorageError for an address that is none."""
    if not is_s3(url):
        return pyarrow.fs.LocalFileSystem(), str(local_path(url))
    bucket, key = split_s3(url)
    return PyFileSystem(S3Handler()), f"{bucket}/{key}".rstrip("/")


class S3Handler(FileSystemHandler):
    """Paths are BUCKET/KEY. A folder is there while an object is below it; making one does nothing."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, S3Handler)

    def __hash__(self) -> int:
        return hash(S3Handler)

    def get_type_name(self) -> str:
        """As Ray's messages show it."""
        return "s3"

    def normalize_path(self, path: str) -> str:
        """Without a slash at its end."""
        return path.rstrip("/")

    def get_file_info(self, paths: list[str]) -> list[FileInfo]:
        """What each path is: a file with its size, a folder, or nothing."""
        return [self._info(path) for path in paths]

    def get_file_info_selector(self, selector: FileSelector) -> list[FileInfo]:
        """What lies below a folder. Raises FileNotFoundError for none, unless the selector allows it."""
        root = selector.base_dir.rstrip("/")
        files = storage.list_sizes(_url(root), RETRY_S)
        folders = {"/".join(name.split("/")[:depth]) for name in files for depth in range(1, name.count("/") + 1)}
        if not files and not selector.allow_not_found:
            raise FileNotFoundError(root)
        found = [FileInfo(f"{root}/{name}", FileType.Directory) for name in sorted(folders)]
        found += [FileInfo(f"{root}/{name}", FileType.File, size=size) for name, size in files.items()]
        return [info for info in found if selector.recursive or "/" not in info.path.removeprefix(f"{root}/")]

    def _info(self, path: str) -> FileInfo:
        bucket, key = split_s3(_url(path))

        def ask() -> FileInfo:
            answer = s3_client().list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
            for entry in answer.get("Contents", []):
                if key and entry["Key"] == key:
                    return FileInfo(path, FileType.File, size=int(entry["Size"]))
            return FileInfo(path, FileType.Directory if storage.exists(_url(path) + "/") else FileType.NotFound)

        return retried(_url(path), ask, RETRY_S)

    def create_dir(self, path: str, recursive: bool) -> None:
        """A store has no folders to make."""

    def delete_dir(self, path: str) -> None:
        """Everything below a folder."""
        storage.delete_folder(_url(path), RETRY_S)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        """The same: an empty folder is none."""
        storage.delete_folder(_url(path), RETRY_S)

    def delete_root_dir_contents(self) -> None:
        """Refused."""
        raise NotImplementedError("all buckets of a store are not removed")

    def delete_file(self, path: str) -> None:
        """One object."""
        storage.delete(_url(path), RETRY_S)

    def move(self, source: str, target: str) -> None:
        """One object: a copy, then a removal."""
        self.copy_file(source, target)
        self.delete_file(source)

    def copy_file(self, source: str, target: str) -> None:
        """One object, by the store itself."""
        (info,) = self.get_file_info([source])
        if info.type != FileType.File:
            raise FileNotFoundError(source)
        storage.copy(_url(source), _url(target), info.size, RETRY_S)

    def open_input_stream(self, path: str) -> Any:
        """A reader from the start on."""
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        """A reader that fetches some megabytes at a time."""
        (info,) = self.get_file_info([path])
        if info.type != FileType.File:
            raise FileNotFoundError(path)
        return pyarrow.PythonFile(io.BufferedReader(_Reader(_url(path), info.size), PART_BYTES), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        """A writer; what is written is kept on this machine's disk and sent when it is closed."""
        return pyarrow.PythonFile(_Writer(_url(path)), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        """Refused: objects do not grow."""
        raise NotImplementedError(f"{path}: an object is written as a whole")


def _url(path: str) -> str:
    return f"{S3_SCHEME}{path}"


class _Reader(SeekableFile):
    """An object, read by ranges."""

    def __init__(self, url: str, size: int) -> None:
        super().__init__(size)
        self._url = url

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._size - self._at))
        if count:
            data = retried(self._url, lambda: ranged.get_range(self._url, self._at, count), RETRY_S)
            buffer[: len(data)] = data
            self._at += len(data)
            count = len(data)
        return count


class _Writer(io.RawIOBase):
    """A file on this machine that becomes the object when it is closed."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._file = tempfile.NamedTemporaryFile(prefix="meteor-out-")  # noqa: SIM115 - closed with this object

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        with self._file:
            self._file.flush()
            storage.write_file(Path(self._file.name), self._url, RETRY_S)
