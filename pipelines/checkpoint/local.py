"""Folders on this machine: copies of what is in storage, and a worker's files of a checkpoint before their upload.

A copy is shared by the processes of this machine that have it open at the same time: one brings and checks it, the last
one removes it. Locks of the operating system tell who has it open, so a killed process holds nothing.

Data tasks import this module, so what needs torch or transformers is imported where it is used.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pipelines.io import sealed, storage
from pipelines.io.fingerprint import sha256
from pipelines.io.run_folder import RunFolder

if TYPE_CHECKING:
    from meteor_model.processing_meteor import MeteorProcessor


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The files of the folder `url` on this machine, every one compared with the folder's list of SHA-256.

    A local folder is given as it is. One without a list, of an earlier version, is not compared.

    Raises:
        DamagedFileError: a file that is not what was written.
        LocalDiskError: no room for the copy.
        StorageError: storage fails, or there is no such folder.
    """
    folder = sealed.open_folder(url)
    if not folder.present:
        raise storage.ObjectMissingError(f"{url}: no files here")
    if storage.is_s3(url):
        with _shared(folder.identity, lambda target: sealed.fetch(folder, target)) as copy:
            yield copy
    else:
        with _shared(folder.identity, lambda _: sealed.verify(folder)):
            yield storage.local_path(url)


@contextmanager
def _shared(content: str, fill: Callable[[Path], None]) -> Iterator[Path]:
    """A folder of this machine that `fill` has filled with this content, once for all who have it open."""
    root = Path(tempfile.gettempdir()) / f"meteor-copies-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    key = content[:24]
    folder, whole, users = root / key, root / f"{key}.whole", root / f"{key}.users"
    gate = root / f"{key[:2]}.gate"  # never removed: who waits at it must wait at the same file
    with _alone(gate):
        using = users.open("w")
        if _try_lock(using) or not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)
            whole.unlink(missing_ok=True)
            try:
                folder.mkdir()
                fill(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                users.unlink(missing_ok=True)
                using.close()
                raise
            whole.touch()
        fcntl.flock(using, fcntl.LOCK_SH)
    try:
        yield folder
    finally:
        with _alone(gate):
            if _try_lock(using):
                shutil.rmtree(folder, ignore_errors=True)
                whole.unlink(missing_ok=True)
                users.unlink(missing_ok=True)
            using.close()


@contextmanager
def _alone(gate: Path) -> Iterator[None]:
    with gate.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _try_lock(handle: TextIO) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def load_processor(url: str) -> MeteorProcessor:
    """The processor of the run at `url`, on any machine that reads its storage."""
    from meteor_model.processing_meteor import MeteorProcessor  # here: the controller only passes this function on

    with local_copy(RunFolder(url).processor) as folder:
        return MeteorProcessor.from_pretrained(folder)


_OWN_LOCKS: dict[Path, TextIO] = {}
"""Locks on this process's folders, held as long as it lives."""


def new_folder(run: str) -> Path:
    """A fresh local folder for one worker's files of one checkpoint of the run at `run`.

    Ray deletes it after the upload. What killed workers of the run left on this machine is removed first: folders whose
    lock nobody holds.
    """
    prefix = f"meteor-checkpoint-{sha256(run)[:12]}-"
    for folder in [folder for folder in _OWN_LOCKS if not folder.exists()]:
        _lock_of(folder).unlink(missing_ok=True)
        _OWN_LOCKS.pop(folder).close()
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*.lock"):
        try:
            handle = lock.open("r+")
        except OSError:  # another user's, or gone just now
            continue
        with handle:
            if _try_lock(handle):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    unlocked = folder.with_name(f"{folder.name}.new")
    mine = unlocked.open("w")
    fcntl.flock(mine, fcntl.LOCK_EX)
    unlocked.rename(_lock_of(folder))  # only now do others see it
    _OWN_LOCKS[folder] = mine
    return folder


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
