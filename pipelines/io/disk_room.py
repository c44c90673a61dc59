"""How much room a disk of this machine has, and the error that says that it is too little."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import psutil

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of errors that say so."""


class LocalDiskError(OSError):
    """This machine's disk has no room for what is to be written; the message says where, what, and how much."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message,)


def free_bytes(folder: Path) -> int:
    """Bytes that this process may still write below `folder`. Raises OSError."""
    stat = os.statvfs(existing_part(folder))
    return stat.f_bavail * stat.f_frsize


def no_room(folder: Path, need: int | None, what: str) -> str:
    """For people: the disk that has no room for what is to be written below `folder`."""
    place = existing_part(folder)
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


def existing_part(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    path = folder.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.resolve()
