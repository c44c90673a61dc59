"""Locks of the operating system on files in a temp folder: a killed process holds nothing.

They tell about the processes of one kernel. Where nodes share a temp folder (NFS, Lustre), a lock of another node may
not be seen, so what is kept there carries the name of its machine, and no machine removes what bears another's.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import psutil

from pipelines.io.errors import StorageError

POLL_S = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_OWN_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "ramfs", "overlay", "zfs", "f2fs", "bcachefs", "apfs"}
"""Kinds of file systems that no two machines have mounted at a time."""


@lru_cache(maxsize=1)
def machine() -> str:
    """This boot of this machine as a part of a file name: its name for people, and what tells it from its namesakes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")[:8]
    except OSError:
        boot = f"{int(psutil.boot_time()):x}"
    return f"{re.sub(r'[^A-Za-z0-9.]', '_', socket.gethostname())[:64]}-{boot}"


def own_disk(folder: Path) -> bool:
    """Whether this machine alone has the file system of `folder`: then its locks tell about all that lies there."""
    place = folder.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if place.is_relative_to(part.mountpoint)]
    # The last of those at the same place covers the others.
    mount = max(enumerate(mounts), key=lambda item: (len(item[1].mountpoint), item[0]), default=None)
    return mount is not None and mount[1].fstype in _OWN_DISKS


def try_lock(handle: TextIO, shared: bool = False) -> bool:
    """Whether the lock on an open file could be had at once; it is held until the file is closed.

    Raises:
        StorageError: the file system knows no locks.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise StorageError(
                f"{handle.name}: its file system knows no locks ({error.strerror}); set TMPDIR to a folder on "
                "this machine's own disk"
            ) from error
        raise
    return True


@contextmanager
def alone(gate: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Only one process of this machine is in this block for this gate; its file may be removed inside the block.

    Args:
        gate: the file.
        waiting: called several times a second while another one is inside.
    """
    while True:
        handle = gate.open("w")
        try:
            while not try_lock(handle):
                if waiting is not None:
                    waiting()
                time.sleep(POLL_S)
        except BaseException:
            handle.close()
            raise
        if _is_still(gate, handle):
            break
        handle.close()  # who was inside has removed the file: others meet at a new one
    with handle:
        yield


@contextmanager
def alone_or_not(gate: Path) -> Iterator[bool]:
    """The same without waiting: whether this process is alone in the block."""
    with gate.open("w") as handle:
        yield try_lock(handle) and _is_still(gate, handle)


def _is_still(path: Path, handle: TextIO) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(path.stat(), os.fstat(handle.fileno()))
    return False
