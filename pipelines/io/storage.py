"""Small objects, listings and whole files, at `s3://bucket/prefix` or plain local paths.

Where S3 is comes from the standard environment and files of S3 clients (`pipelines.io.s3_config`); there is one client
for all of it (`pipelines.io.s3_client`). Large files go in parts (`pipelines.io.bulk`) and come in ranges
(`pipelines.io.ranged`); what Ray keeps goes through `pipelines.io.arrow`; a job asks first whether all of it is allowed
(`pipelines.io.storage_check`).

Transient faults are retried: each call is made again until `retry_s` after its first fault, so that the restart of a
server costs time and nothing else. What is wrong for good fails at once (`pipelines.io.storage_faults`).
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from meteor_model.foreign import foreign
from pipelines.io import bulk, ranged
from pipelines.io.addresses import S3_SCHEME, is_s3, join, local_path, split_s3
from pipelines.io.errors import StorageError
from pipelines.io.retry import RETRY_S, Progress, with_stall_limit
from pipelines.io.s3_client import PART_BYTES, STALL_S, s3_client
from pipelines.io.storage_faults import (
    ForbiddenError,
    ObjectMissingError,
    TransientStorageError,
    retried,
    storage_errors,
    translate,
)

# ------------------------------------------------------------------------------------------------ reading and writing


def read_bytes(url: str, retry_s: float = RETRY_S) -> bytes:
    """The whole object. Raises ObjectMissingError, StorageError, or, after `retry_s`, TransientStorageError.

    Of an object that is one request long, a byte that flips on the wire is noticed where the store keeps a checksum.
    """

    def read() -> bytes:
        if not is_s3(url):
            return with_stall_limit(lambda progress: b"".join(_pieces_of_disk(url, progress)), STALL_S)
        bucket, key = split_s3(url)
        return ranged.read_checked(s3_client().get_object(Bucket=bucket, Key=key))

    return retried(url, read, retry_s)


def read_bulk(url: str, retry_s: float = RETRY_S) -> bytes:
    """The whole object by several requests at a time; for shards. Errors as read_bytes."""
    if not is_s3(url):
        return read_bytes(url, retry_s)
    pieces = list(ranged.download(url, retry_s))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def pieces(url: str, retry_s: float = RETRY_S) -> Iterator[bytes]:
    """The bytes of an object or a file in their order, some megabytes at a time. Errors as read_bytes."""
    if is_s3(url):
        yield from ranged.download(url, retry_s)
        return
    with storage_errors(url), local_path(url).open("rb") as source:
        while piece := source.read(PART_BYTES):
            yield piece


def read_range(url: str, start: int, count: int, retry_s: float = RETRY_S) -> bytes:
    """`count` bytes of an object or a file from `start` on, fewer where it ends before. Errors as read_bytes."""
    if is_s3(url):
        return ranged.download_range(url, start, count, retry_s)

    def read(progress: Progress) -> bytes:
        with local_path(url).open("rb") as source:
            source.seek(start)
            found: list[bytes] = []
            for place in range(0, count, PART_BYTES):
                found.append(source.read(min(PART_BYTES, count - place)))
                progress.note()
            return b"".join(found)

    return retried(url, lambda: with_stall_limit(read, STALL_S), retry_s)


def _pieces_of_disk(url: str, progress: Progress) -> Iterator[bytes]:
    with local_path(url).open("rb") as source:
        while piece := source.read(PART_BYTES):
            progress.note()
            yield piece


def write_bytes(url: str, data: bytes, retry_s: float = RETRY_S) -> None:
    """Write the whole object at once: a reader sees all of it or nothing. Raises StorageError."""
    if is_s3(url):
        bulk.put(url, data, retry_s)
    else:
        retried(url, lambda: _replace_file(local_path(url), lambda stream: stream.write(data)), retry_s)


def _unheard(count: int) -> None:
    """Nobody wants to know how far a file is."""


def write_file(local: Path, url: str, retry_s: float = RETRY_S, moved: Callable[[int], None] = _unheard) -> None:
    """Bring a file of any size to an address; a reader sees all of it or nothing. Raises StorageError.

    `moved` is called with the bytes of every part that has arrived.
    """
    if is_s3(url):
        bulk.upload(local, url, retry_s, moved)
        return

    def fill(progress: Progress) -> None:
        def copied(target: BinaryIO) -> None:
            with local.open("rb") as source:
                while piece := source.read(PART_BYTES):
                    target.write(piece)
                    progress.note()
                    moved(len(piece))

        _replace_file(local_path(url), copied)

    retried(url, lambda: with_stall_limit(fill, STALL_S), retry_s)


def _replace_file(target: Path, fill: Callable[[BinaryIO], object]) -> None:
    """A local file under a name of its own, moved into place when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            fill(stream)
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def delete(url: str, retry_s: float = RETRY_S) -> None:
    """Remove one object; one that is not there is no error. Raises StorageError."""

    def remove() -> None:
        if is_s3(url):
            bucket, key = split_s3(url)
            s3_client().delete_object(Bucket=bucket, Key=key)
        else:
            local_path(url).unlink(missing_ok=True)

    retried(url, remove, retry_s)


def copy(source: str, target: str, size: int, retry_s: float = RETRY_S) -> None:
    """Copy one object of `size` bytes inside storage, in an object store by the store itself. Raises StorageError."""
    if is_s3(source) and is_s3(target):
        bulk.copy(source, target, size, retry_s)
    else:
        write_file(local_path(source), target, retry_s)


# ------------------------------------------------------------------------------------------------------------- listings


def exists(url: str, retry_s: float = RETRY_S) -> bool:
    """Whether an object or a prefix with objects is there. A missing bucket is a StorageError, not False."""
    if not is_s3(url):
        return local_path(url).exists()
    bucket, key = split_s3(url)

    def first(prefix: str) -> list[str]:
        answer = s3_client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        return [entry["Key"] for entry in answer.get("Contents", [])]

    def ask() -> bool:
        return first(key) == [key] or bool(first(f"{key}/" if key else ""))

    return retried(url, ask, retry_s)


def _listing(url: str, delimiter: str = "") -> tuple[dict[str, int], list[str]]:
    """Bytes of the objects below a prefix by their path relative to it; and the folders, which `delimiter` ends."""
    bucket, key = split_s3(url)
    root = f"{key}/" if key else ""
    files: dict[str, int] = {}
    folders: list[str] = []
    for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=root, Delimiter=delimiter):
        found = {entry["Key"].removeprefix(root): int(entry["Size"]) for entry in page.get("Contents", [])}
        files |= {name: size for name, size in found.items() if name and not name.endswith("/")}
        folders += [entry["Prefix"].removeprefix(root).rstrip("/") for entry in page.get("CommonPrefixes", [])]
    return files, folders


def list_sizes(url: str, retry_s: float = RETRY_S) -> dict[str, int]:
    """Bytes of every file below a prefix by its path relative to it, sorted by path; {} where there are none.

    A missing bucket is a StorageError.
    """

    def find() -> dict[str, int]:
        if is_s3(url):
            return dict(sorted(_listing(url)[0].items()))
        return dict(sorted(_local_sizes(local_path(url))))

    return retried(url, find, retry_s)


def _local_sizes(root: Path) -> Iterator[tuple[str, int]]:
    for path in root.rglob("*"):
        with suppress(FileNotFoundError):  # another process has moved it just now
            if path.is_file():
                yield path.relative_to(root).as_posix(), path.stat().st_size


def list_files(url: str, retry_s: float = RETRY_S) -> list[str]:
    """Paths of all files below a prefix, relative to it, sorted; [] where there are none. Raises StorageError."""
    return list(list_sizes(url, retry_s))


def list_folders(url: str, retry_s: float = RETRY_S) -> list[str]:
    """Names of the folders directly below a prefix, sorted; [] where there are none.

    One listing (S3 gives a thousand names a page), whatever the folders hold. Raises StorageError, also for a missing
    bucket.
    """

    def find() -> list[str]:
        if is_s3(url):
            return sorted(_listing(url, "/")[1])
        root = local_path(url)
        return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []

    return retried(url, find, retry_s)


def delete_folder(url: str, retry_s: float = RETRY_S) -> None:
    """Remove everything below a prefix. Raises StorageError."""
    if not is_s3(url):
        retried(url, lambda: shutil.rmtree(local_path(url), ignore_errors=False), retry_s)
        return
    bucket, key = split_s3(url)
    if not key:
        raise StorageError(f"{url}: a whole bucket is not removed; name a prefix in it")

    def remove() -> None:
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/")
        for entry in (entry for page in pages for entry in page.get("Contents", [])):
            s3_client().delete_object(Bucket=bucket, Key=entry["Key"])

    retried(url, remove, retry_s)


# ----------------------------------------------------------------------------------------------------------------- JSON


def read_json(url: str, retry_s: float = RETRY_S) -> Any:
    """Parse the object as JSON. Raises StorageError naming the URL when it is not JSON; else as read_bytes."""
    data = read_bytes(url, retry_s)
    with foreign(lambda what: StorageError(f"{url}: not JSON: {what}")):
        return json.loads(data)


def write_json(url: str, value: Any, retry_s: float = RETRY_S) -> None:
    """Write `value` as indented JSON with sorted keys. Raises StorageError."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_bytes(url, text.encode(), retry_s)


__all__ = [
    "S3_SCHEME",
    "ForbiddenError",
    "ObjectMissingError",
    "StorageError",
    "TransientStorageError",
    "copy",
    "delete",
    "delete_folder",
    "exists",
    "is_s3",
    "join",
    "list_files",
    "list_folders",
    "list_sizes",
    "local_path",
    "pieces",
    "read_bulk",
    "read_bytes",
    "read_json",
    "read_range",
    "retried",
    "split_s3",
    "storage_errors",
    "translate",
    "write_bytes",
    "write_file",
    "write_json",
]
