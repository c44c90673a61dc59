"""Objects read by ranges: a bounded number of requests ahead, each with a limit and a repetition of its own."""

from __future__ import annotations

import base64
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.io.addresses import split_s3
from pipelines.io.progress_log import ProgressLog
from pipelines.io.retry import RETRY_S, StalledError
from pipelines.io.s3_client import PART_BYTES, WINDOW, bulk_client, part_limit_s
from pipelines.io.storage_faults import TransientStorageError, code_of, retried

_READ_BYTES = 256 * 2**10
_BEHIND_THE_END = ("InvalidRange", "416")


@dataclass(frozen=True)
class _Piece:
    data: bytes
    tag: str
    total: int


def download(url: str, retry_s: float = RETRY_S) -> Iterator[bytes]:
    """The bytes of an object in their order, in pieces of PART_BYTES, of which WINDOW are fetched ahead.

    Raises:
        ObjectMissingError, StorageError: at once, where repeating is of no use.
        TransientStorageError: after `retry_s` for one piece, or for an object that was replaced meanwhile.
    """
    first = retried(url, lambda: _get_piece(url, 0), retry_s)
    yield first.data
    starts = range(PART_BYTES, first.total, PART_BYTES)
    if not starts or len(first.data) == first.total:
        return
    spoken = ProgressLog(url, first.total)
    pool = ThreadPoolExecutor(WINDOW, thread_name_prefix="download")
    try:
        ahead: deque[Future[_Piece]] = deque()
        for start in starts:
            ahead.append(pool.submit(retried, url, lambda start=start: _get_piece(url, start, first.tag), retry_s))
            if len(ahead) == WINDOW:
                yield _taken(ahead.popleft(), spoken)
        while ahead:
            yield _taken(ahead.popleft(), spoken)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _taken(future: Future[_Piece], spoken: ProgressLog) -> bytes:
    data = future.result().data
    spoken.add(len(data))
    return data


def _get_piece(url: str, start: int, tag: str | None = None) -> _Piece:
    try:
        answer = _get_range(url, start, PART_BYTES)
    except Exception as error:
        if start == 0 and code_of(error) in _BEHIND_THE_END:
            return _Piece(b"", "", 0)  # an object without bytes has no first one
        raise
    if tag is not None and answer.get("ETag") != tag:
        raise TransientStorageError(f"{url}: the object was replaced while it was read")
    stated = answer.get("ContentRange")
    total = int(stated.rpartition("/")[2]) if stated else int(answer["ContentLength"])
    return _Piece(read_body(answer), answer.get("ETag", ""), total)


def download_range(url: str, start: int, count: int, retry_s: float = RETRY_S) -> bytes:
    """Some bytes of an object, PART_BYTES a request and one after another; fewer where it ends before. Errors as above.

    Whether the object was replaced between two requests is the caller's to see, by a checksum.
    """
    found = []
    for place in range(start, start + count, PART_BYTES):
        length = min(PART_BYTES, start + count - place)
        found.append(retried(url, partial(_get_what_is_there, url, place, length), retry_s))
        if len(found[-1]) < length:
            break
    return b"".join(found)


def _get_what_is_there(url: str, start: int, count: int) -> bytes:
    try:
        return get_range(url, start, count)
    except Exception as error:
        if code_of(error) in _BEHIND_THE_END:
            return b""
        raise


def get_range(url: str, start: int, count: int) -> bytes:
    """Some bytes of an object, asked for once, with the client's own errors."""
    return read_body(_get_range(url, start, count))


def _get_range(url: str, start: int, count: int) -> dict[str, Any]:
    bucket, key = split_s3(url)
    answer: dict[str, Any] = bulk_client().get_object(
        Bucket=bucket, Key=key, Range=f"bytes={start}-{start + count - 1}"
    )
    return answer


def read_body(answer: dict[str, Any]) -> bytes:
    """The whole body of an answer, within the time that its length may take. Raises StalledError, OSError."""
    length = int(answer["ContentLength"])
    limit_s = part_limit_s(length)
    until = time.monotonic() + limit_s
    received: list[bytes] = []
    with answer["Body"] as stream:
        left = length
        while left:
            data = stream.read1(min(left, _READ_BYTES))
            if not data:
                raise ConnectionResetError(f"the body ended {left} bytes before its end")
            received.append(data)
            left -= len(data)
            if time.monotonic() > until and left:
                raise StalledError(f"{length - left} of {length} bytes came in {limit_s:.0f} s")
    return received[0] if len(received) == 1 else b"".join(received)


def read_checked(answer: dict[str, Any]) -> bytes:
    """The body of a whole object, compared with the CRC32 that the store keeps of it, where it does."""
    data = read_body(answer)
    stated = answer.get("ChecksumCRC32", "-")
    of_bytes = "-" not in stated and answer.get("ChecksumType") != "COMPOSITE"  # those are of the parts' sums
    if of_bytes and base64.b64decode(stated) != zlib.crc32(data).to_bytes(4, "big"):
        raise ConnectionError("the CRC32 of what arrived is not that of the object")
    return data
