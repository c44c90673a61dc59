"""Writing to this machine's disk: what does not fit is an error that names disk, folder and need.

Libraries say it in their own words (torch's archive writer: "unexpected pos 576 vs 534"), so every place that writes
more than a little does it inside `writing`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipelines.io.node_copies import make_room

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors that say so."""
_WORDS = (
    "unexpected pos",
    "no space left",
    "disk quota exceeded",
    "file too large",
    "pytorchstreamwriter failed",
    " requested and ",
)
_RESERVE_BYTES = 2**20


class LocalDiskError(OSError):
    """This machine's disk has no room for what is to be written; the message says where, what, and how much."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message,)


@contextmanager
def writing(folder: Path, need: int | None, what: str) -> Iterator[None]:
    """Files are written below `folder` in this block.

    Args:
        folder: where; it need not be there yet.
        need: bytes that come; None where nobody knows. Copies that nobody has open make room for them; more than are
            free then is an error before anything is written.
        what: names it for people.

    Raises:
        LocalDiskError: there is no room, found before or while writing, whatever the writer raised.
    """
    if need is not None and need + _RESERVE_BYTES > free_bytes(folder):
        make_room(_existing(folder), need + _RESERVE_BYTES)
    if need is not None and need + _RESERVE_BYTES > free_bytes(folder):
        raise LocalDiskError(no_room(folder, need, what))
    try:
        yield
    except Exception as error:
        if isinstance(error, LocalDiskError) or not is_disk_full(error):
            raise
        raise LocalDiskError(f"{no_room(folder, need, what)} ({type(error).__name__}: {str(error)[:200]})") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that a file could not grow."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:  # chains of exceptions may run in circles
        chain.append(current)
        current = current.__cause__ or current.__context__
    return any(
        (isinstance(one, OSError) and one.errno in FULL) or any(word in str(one).lower() for word in _WORDS)
        for one in chain
    )


def free_bytes(folder: Path) -> int:
    """Bytes that this process may still write below `folder`. Raises OSError."""
    stat = os.statvfs(_existing(folder))
    return stat.f_bavail * stat.f_frsize


def no_room(folder: Path, need: int | None, what: str) -> str:
    """For people: the disk that has no room for what is to be written below `folder`."""
    place = _existing(folder)
    stat = os.statvfs(place)
    disks = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    disk = max(disks, key=lambda part: len(part.mountpoint), default=None)
    named = f"the disk {disk.device} at {disk.mountpoint}" if disk is not None else "its disk"
    asked = f"{what} needs {need} bytes" if need is not None else f"{what} was cut off"
    return (
        f"no room on this machine for {folder}: {asked}, {named} has {stat.f_bavail * stat.f_frsize} of "
        f"{stat.f_blocks * stat.f_frsize} bytes free (a quota or a limit on file sizes may allow less). Make room, or "
        "set TMPDIR to a folder on a larger disk"
    )


def _existing(folder: Path) -> Path:
    path = folder.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.resolve()
