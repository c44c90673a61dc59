"""Folders on this machine: copies of what is in storage, and a worker's files of a checkpoint before their upload.

Data tasks import this module, so what needs torch or transformers is imported where it is used.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from meteor_model import sample_encoder
from pipelines.io import sealed, storage
from pipelines.io.fingerprint import canonical_json, sha256
from pipelines.io.node_copies import Content, open_copy
from pipelines.io.node_locks import machine, own_disk, try_lock
from pipelines.io.run_folder import RunFolder

if TYPE_CHECKING:
    from meteor_model.processing_meteor import MeteorProcessor

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""Ends of the names of files of weights."""


@contextmanager
def local_copy(url: str, *, weights: bool = True, keep: bool = True) -> Iterator[Path]:
    """The files of the folder `url` on this machine, every one compared with the folder's list of SHA-256.

    There is one copy a node, brought and compared once (`pipelines.io.node_copies`). A local folder is given as it is.
    One without a list, of an earlier version, is not compared.

    Args:
        url: address of the folder.
        weights: without, only what is small is brought: configuration, processor, state.
        keep: whether the copy stays for the next who opens it, while there is room.

    Raises:
        DamagedFileError: a file that is not what was written.
        LocalDiskError: no room for the copy.
        StorageError: storage fails, or there is no such folder.
    """
    folder = sealed.open_folder(url)
    if not folder.present:
        raise storage.ObjectMissingError(f"{url}: no files here")
    names = [name for name in folder.wanted if weights or not name.endswith(WEIGHTS)]
    if storage.is_s3(url):
        need = sum(folder.present.get(name, 0) for name in names)
        place, fill = None, lambda target: sealed.fetch(folder, target, names)
    else:
        need, place = 0, storage.local_path(url)
        listed = None if folder.sums is None else {name: one for name, one in folder.sums.items() if name in names}
        fill = lambda _: sealed.verify(replace(folder, sums=listed))  # noqa: E731
    key = sha256(canonical_json([folder.identity, names]))
    with open_copy(Content(key, url, names, need, fill, place), keep) as path:
        yield path


def load_processor(url: str) -> MeteorProcessor:
    """The processor of the run at `url`, on any machine that reads its storage."""
    from meteor_model.processing_meteor import MeteorProcessor  # here: the controller only passes this function on

    with local_copy(RunFolder(url).processor) as folder:
        return MeteorProcessor.from_pretrained(folder)


def load_sample_encoder(url: str) -> sample_encoder.SampleEncoder | MeteorProcessor:
    """What encodes the samples of the run at `url`: without transformers, or its processor, where a run has no other.

    Raises:
        ValueError, StorageError: a file that is damaged, storage that fails.
    """
    with local_copy(RunFolder(url).processor) as folder:
        found = sample_encoder.load_sample_encoder(folder)
    return found if found is not None else load_processor(url)


_OWN_LOCKS: dict[Path, TextIO] = {}
"""Locks on this process's folders, held as long as it lives."""


def new_folder(run: str) -> Path:
    """A fresh local folder for one worker's files of one checkpoint of the run at `run`.

    Ray deletes it after the upload. What killed workers of the run left on this machine is removed first: folders whose
    lock nobody holds. In a temp folder that machines share, those of others stay: their locks may not be seen here.
    """
    temp, prefix = Path(tempfile.gettempdir()), f"meteor-checkpoint-{sha256(run)[:12]}-"
    own = f"{prefix}{machine()}-"
    for folder in [folder for folder in _OWN_LOCKS if not folder.exists()]:
        _lock_of(folder).unlink(missing_ok=True)
        _OWN_LOCKS.pop(folder).close()
    for lock in temp.glob(f"{prefix if own_disk(temp) else own}*.lock"):
        try:
            handle = lock.open("r+")
        except OSError:  # another user's, or gone just now
            continue
        with handle:
            if try_lock(handle):
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink(missing_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=own))
    unlocked = folder.with_name(f"{folder.name}.new")
    mine = unlocked.open("w")
    locked = try_lock(mine)
    assert locked, "nobody else knows the file"
    unlocked.rename(_lock_of(folder))  # only now do others see it
    _OWN_LOCKS[folder] = mine
    return folder


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
