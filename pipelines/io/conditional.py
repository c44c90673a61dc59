"""One small object that several processes write, each only over the content that it has seen.

- S3: `If-None-Match` and `If-Match`, where the store knows them (AWS, MinIO, SeaweedFS);
- local folders: a lock on a file beside it, around compare and rename;
- where neither is there: compare, write, and read back after `SETTLE_S`, so that of two writers who meet one loses.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipelines.io import bulk, ranged, storage
from pipelines.io.fingerprint import sha256
from pipelines.io.s3_client import s3_client
from pipelines.io.storage_faults import code_of

SETTLE_S = 2.0
_REFUSALS = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_GONE = ("NoSuchKey", "404")
_UNKNOWN = ("NotImplemented", "501")

Outcome = Literal["written", "refused", "unknown"]
"""Of a conditional write: done, refused for the condition, or refused by a store that knows no conditions."""


@dataclass(frozen=True)
class Content:
    """What an object holds, and the tag that a conditional write is made over it with."""

    data: bytes
    tag: str


def read(url: str) -> Content | None:
    """The object; None where there is none. Raises StorageError."""
    try:
        if not storage.is_s3(url):
            data = storage.read_bytes(url)
            return Content(data, sha256(data))
        return storage.retried(url, lambda: _get(url))
    except storage.ObjectMissingError:
        return None


def replace(
    url: str, data: bytes, over: Content | None, *, sleep: Callable[[float], None] = time.sleep
) -> Content | None:
    """Write the object, only over the content `over` (None: only where there is no object).

    Returns:
        what is stored now; None where somebody else has written.

    Raises:
        StorageError: if storage fails, or refuses.
    """
    if storage.is_s3(url):
        return _replace_s3(url, data, over, sleep)
    return storage.retried(url, lambda: _replace_local(storage.local_path(url), data, over, sleep))


def _get(url: str) -> Content:
    bucket, key = storage.split_s3(url)
    answer = s3_client().get_object(Bucket=bucket, Key=key)
    return Content(ranged.read_checked(answer), str(answer["ETag"]))


def _replace_s3(url: str, data: bytes, over: Content | None, sleep: Callable[[float], None]) -> Content | None:
    condition = {"IfNoneMatch": "*"} if over is None else {"IfMatch": over.tag}
    outcome = _put(url, data, condition)
    if outcome == "unknown":  # the store refuses to hear of conditions
        if not _same(read(url), over):
            return None
        _put(url, data, {})
    stored = read(url)
    if stored is None or stored.data != data:
        return None
    # A store that does not know conditions would write this: it proves by refusing that it does.
    if outcome == "unknown" or (over is None and _put(url, data, {"IfNoneMatch": "*"}) == "written"):
        sleep(SETTLE_S)
        stored = read(url)
    return stored if stored is not None and stored.data == data else None


def _put(url: str, data: bytes, condition: dict[str, str]) -> Outcome:
    def put() -> Outcome:
        try:
            bulk.put_once(url, data, **condition)
        except Exception as error:
            code = code_of(error)
            if condition and code in _UNKNOWN:
                return "unknown"
            if condition and (code in _REFUSALS or code in _GONE):
                return "refused"
            raise
        return "written"

    return storage.retried(url, put)


def _replace_local(path: Path, data: bytes, over: Content | None, sleep: Callable[[float], None]) -> Content | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as locked:
        if not _same(read(str(path)), over):
            return None
        storage.write_bytes(str(path), data)
    if not locked:
        sleep(SETTLE_S)
    stored = read(str(path))
    return stored if stored is not None and stored.data == data else None


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Alone among all processes that write this file; False where the file system has no locks."""
    handle = os.open(path.with_name(f".{path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        locked = False
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        yield locked
    finally:
        os.close(handle)


def _same(found: Content | None, over: Content | None) -> bool:
    return (None if found is None else found.data) == (None if over is None else over.data)
