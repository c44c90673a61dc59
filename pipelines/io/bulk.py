"""Large files into an object store: few requests at a time, each with a limit and a repetition of its own.

A file goes in parts of `part_bytes`, at most WINDOW at once, so memory holds WINDOW parts however slow the store is,
and a fault costs one part. What a request may take follows from its bytes and LEAST_BYTES_PER_S; it is its own thread
that notices, so no request is left behind beside the next one. An upload that ends early is aborted.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from pipelines.io.addresses import split_s3
from pipelines.io.errors import StorageError
from pipelines.io.progress_log import SPEAK_S, ProgressLog
from pipelines.io.retry import RETRY_S, StalledError, retry
from pipelines.io.s3_client import LEAST_BYTES_PER_S, PART_BYTES, WINDOW, bulk_client, part_limit_s
from pipelines.io.s3_config import s3_config
from pipelines.io.storage_faults import TransientStorageError, code_of, retried

MAX_PARTS = 9_500  # S3 takes 10,000
COPY_PART_BYTES = 512 * 2**20  # of a copy inside the store
_ABORT_RETRY_S = 10.0

logger = logging.getLogger(__name__)


class _AgainError(StorageError):
    """All of an upload has to be made again; one request of it cannot mend that."""


class _StoppedError(StorageError):
    """Another request of the same file has failed for good."""


class _Body(io.BytesIO):
    """The bytes of one request: as they are taken, the store's pace is watched."""

    def __init__(self, data: bytes, limit_s: float, stopped: threading.Event) -> None:
        super().__init__(data)
        self._until = time.monotonic() + limit_s
        self._limit_s = limit_s
        self._stopped = stopped

    def read(self, size: int | None = -1) -> bytes:
        if self._stopped.is_set():
            raise StalledError("stopped")
        if time.monotonic() > self._until:
            raise StalledError(
                f"less than {len(self.getbuffer())} bytes were taken in {self._limit_s:.0f} s; a store that takes less "
                f"than {LEAST_BYTES_PER_S // 1024} KiB/s counts as one that has stalled"
            )
        return super().read(size)


def part_bytes(size: int) -> int:
    """Bytes of the parts that a file of `size` bytes goes in."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


# -------------------------------------------------------------------------------------------------------------- uploads


def upload(local: Path, url: str, retry_s: float, moved: Callable[[int], None]) -> None:
    """Bring a file to the address of an object; the size that the store states is compared.

    Args:
        local: of any size.
        url: s3://BUCKET/KEY.
        retry_s: seconds for which each request outlasts a store that fails.
        moved: is called with the bytes of every part that the store has taken, from the thread that sent it.

    Raises:
        StorageError: at once, where repeating is of no use.
        TransientStorageError: after `retry_s`.
    """
    size = local.stat().st_size

    def attempt() -> None:
        if size <= PART_BYTES:
            put(url, local.read_bytes(), retry_s)
            moved(size)
        else:
            _upload_in_parts(local, size, url, retry_s, moved)
        bucket, key = split_s3(url)
        stated = retried(url, lambda: s3_size(bucket, key), retry_s)
        if stated != size:
            raise _AgainError(f"{url}: storage states {stated} bytes after an upload of {size}")

    try:
        retry(attempt, url, retry_s=retry_s, transient=lambda error: isinstance(error, _AgainError))
    except _AgainError as error:
        raise TransientStorageError(str(error)) from error


def s3_size(bucket: str, key: str) -> int:
    """Bytes of an object, as the store states them."""
    return int(bulk_client().head_object(Bucket=bucket, Key=key)["ContentLength"])


def put(url: str, data: bytes, retry_s: float = RETRY_S, **conditions: str) -> None:
    """Write an object in one request. Raises StorageError."""
    retried(url, lambda: put_once(url, data, **conditions), retry_s)


def put_once(url: str, data: bytes, **conditions: str) -> None:
    """The same, tried once, with the client's own errors."""
    bucket, key = split_s3(url)
    body = _Body(data, part_limit_s(len(data)), threading.Event())
    bulk_client().put_object(Bucket=bucket, Key=key, Body=body, **s3_config().encryption, **conditions)


def _upload_in_parts(local: Path, size: int, url: str, retry_s: float, moved: Callable[[int], None]) -> None:
    bucket, key = split_s3(url)
    target = {"Bucket": bucket, "Key": key}
    created = retried(
        url,
        lambda: bulk_client().create_multipart_upload(**target, **s3_config().encryption, **_checksum())["UploadId"],
        retry_s,
    )
    place = {**target, "UploadId": created}
    step = part_bytes(size)
    with local.open("rb") as source:

        def send(number: int, stopped: threading.Event) -> dict[str, Any]:
            data = os.pread(source.fileno(), step, (number - 1) * step)
            sent = retried(url, lambda: _send_part(place, number, data, stopped), retry_s)
            moved(len(data))
            return sent

        try:
            _in_parts(url, size, step, place, send, retry_s)
        except BaseException:
            _abort(url, place)
            raise


def _in_parts(
    url: str,
    size: int,
    step: int,
    place: dict[str, str],
    send: Callable[[int, threading.Event], dict[str, Any]],
    retry_s: float,
) -> None:
    """Send all parts, WINDOW at a time, and complete the upload."""
    numbers = range(1, -(-size // step) + 1)
    stopped, spoken = threading.Event(), ProgressLog(url, size)
    with ThreadPoolExecutor(WINDOW, thread_name_prefix="upload") as pool:
        pending = {pool.submit(send, number, stopped) for number in numbers}
        parts: list[dict[str, Any]] = []
        try:
            while pending:
                done, pending = wait(pending, timeout=SPEAK_S, return_when=FIRST_EXCEPTION)
                parts += [future.result() for future in done]
                spoken.add(step * len(done))
        except BaseException:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    listed = {"Parts": sorted(parts, key=lambda part: int(part["PartNumber"]))}

    def complete() -> None:
        _again_if_gone(lambda: bulk_client().complete_multipart_upload(**place, MultipartUpload=listed))

    retried(url, complete, retry_s)


def _send_part(place: dict[str, str], number: int, data: bytes, stopped: threading.Event) -> dict[str, Any]:
    if stopped.is_set():
        raise _StoppedError("stopped")
    body = _Body(data, part_limit_s(len(data)), stopped)
    sent = _again_if_gone(lambda: bulk_client().upload_part(**place, PartNumber=number, Body=body, **_checksum()))
    return _part(number, sent)


def _checksum() -> dict[str, str]:
    """What says that each part comes with its CRC32, as the client sends it where the store is to know it."""
    asked = bulk_client().meta.config.request_checksum_calculation
    return {"ChecksumAlgorithm": "CRC32"} if asked == "when_supported" else {}


def _part(number: int, sent: dict[str, Any]) -> dict[str, Any]:
    """What completing an upload says of a part: its tag, and its checksum where the store gave one."""
    return {"PartNumber": number} | {name: sent[name] for name in ("ETag", "ChecksumCRC32") if name in sent}


def _again_if_gone(call: Callable[[], Any]) -> Any:
    """The store has forgotten the upload: removed as a leftover, or completed by a request whose answer was lost."""
    try:
        return call()
    except Exception as error:
        if code_of(error) == "NoSuchUpload":
            raise _AgainError(f"the store has forgotten the upload: {error}") from error
        raise


def _abort(url: str, place: dict[str, str]) -> None:
    try:
        retried(url, lambda: bulk_client().abort_multipart_upload(**place), _ABORT_RETRY_S)
    except StorageError as error:
        logger.warning("parts of a broken upload stay at %s until a lifecycle rule removes them: %s", url, error)


# --------------------------------------------------------------------------------------------------------------- copies


def copy(source: str, target: str, size: int, retry_s: float = RETRY_S) -> None:
    """Copy an object inside the store, by the store itself. Raises StorageError."""
    bucket, key = split_s3(source)
    to_bucket, to_key = split_s3(target)
    origin = {"Bucket": bucket, "Key": key}
    place = {"Bucket": to_bucket, "Key": to_key}
    extra = s3_config().encryption
    if size <= COPY_PART_BYTES:
        retried(target, lambda: bulk_client().copy_object(**place, CopySource=origin, **extra), retry_s)
        return
    created = retried(target, lambda: bulk_client().create_multipart_upload(**place, **extra)["UploadId"], retry_s)
    parts = {**place, "UploadId": created}

    def send(number: int, stopped: threading.Event) -> dict[str, Any]:
        first = (number - 1) * COPY_PART_BYTES
        last = min(first + COPY_PART_BYTES, size) - 1
        span = {"CopySource": origin, "CopySourceRange": f"bytes={first}-{last}"}

        def one() -> dict[str, Any]:
            if stopped.is_set():
                raise _StoppedError("stopped")
            return _part(number, bulk_client().upload_part_copy(**parts, PartNumber=number, **span)["CopyPartResult"])

        return retried(target, one, retry_s)

    try:
        _in_parts(target, size, COPY_PART_BYTES, parts, send, retry_s)
    except BaseException:
        _abort(target, parts)
        raise
