"""The checkpoint with the lowest validated loss: a whole copy in the run's `best/`, which Ray Train does not delete."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from pipelines.checkpoint.committed import CheckpointRef, read_state
from pipelines.checkpoint.state import CheckpointError
from pipelines.io import codec, storage
from pipelines.io.run_folder import RunFolder, run_folder

BEST_VERSION = 1


@dataclass(frozen=True)
class Best:
    """What `best/best.json` says; only once it is written, the copy that it names counts."""

    version: int
    step: int
    loss: float
    source: str
    """Address that the checkpoint was copied from; Ray deletes it when newer ones come."""
    folder: str
    """Name of the copy, beside the file."""
    files: dict[str, int]
    """Bytes of every file of the copy."""


def keep_best(run: str, checkpoint_url: str, step: int, loss: float) -> bool:
    """Keep a copy of the checkpoint if its loss is lower than that of the best one so far; returns whether it is.

    Killed at any point, `best.json` names a whole copy; what a killed call left is removed by the next. One process at
    a time may call it for a run.

    Raises:
        StorageError: if storage fails, or the copy is not like the checkpoint.
        CheckpointError: if `best.json` is damaged.
    """
    place = RunFolder(run)
    best = _read_best(place)
    better = math.isfinite(loss) and (best is None or loss < best.loss)
    if better:
        folder = PurePosixPath(checkpoint_url).name
        copied = best is not None and best.folder == folder  # it is whole: do not touch it
        files = best.files if best is not None and copied else _copy(checkpoint_url, storage.join(place.best, folder))
        best = Best(BEST_VERSION, step, loss, checkpoint_url, folder, files)
        storage.write_json(place.best_record, asdict(best))
    kept = f"{best.folder}/" if best is not None else None
    for name in storage.list_files(place.best):
        url = storage.join(place.best, name)
        if url != place.best_record and not (kept and name.startswith(kept)):
            storage.delete(url)
    return better


def best_checkpoint(root: str, run_name: str) -> CheckpointRef | None:
    """The checkpoint of run `run_name` of storage `root` with the lowest validated loss; None before there is one.

    Raises:
        CheckpointError: if it is damaged.
        StorageError: if storage cannot be read.
    """
    place = run_folder(root, run_name)
    best = _read_best(place)
    if best is None:
        return None
    url = storage.join(place.best, best.folder)
    found = storage.list_sizes(url)
    wrong = [name for name in {*found, *best.files} if found.get(name) != best.files.get(name)]
    if wrong:
        raise CheckpointError(
            f"{url} is not what {place.best_record} says: {', '.join(sorted(wrong)[:5])}; remove {place.best}"
        )
    return CheckpointRef(url, read_state(url))


def _read_best(place: RunFolder) -> Best | None:
    url = place.best_record
    try:
        text = storage.read_bytes(url)
    except storage.ObjectMissingError:
        return None
    try:
        best = codec.decode(Best, text, url)
    except ValueError as error:
        raise CheckpointError(f"{error}; remove {place.best}") from error
    if best.version != BEST_VERSION:
        raise CheckpointError(f"{url} has version {best.version}, this code reads {BEST_VERSION}")
    return best


def _copy(source: str, target: str) -> dict[str, int]:
    """Copy a folder inside storage, in an object store by the store itself; the bytes of each file."""
    sizes = storage.list_sizes(source)
    if not sizes:
        raise storage.ObjectMissingError(f"{source}: no files to copy")
    with storage.storage_errors(target):
        filesystem, from_path = storage.fsspec_filesystem(source)
        _, to_path = storage.fsspec_filesystem(target)
        for name in sizes:
            if not storage.is_s3(target):
                Path(to_path, name).parent.mkdir(parents=True, exist_ok=True)
            filesystem.cp_file(f"{from_path}/{name}", f"{to_path}/{name}")
    copied = storage.list_sizes(target)
    wrong = [name for name in sizes if copied.get(name) != sizes[name]]
    if wrong:
        raise storage.StorageError(f"{target}: the copy of {source} is not like it: {', '.join(wrong[:5])}")
    return sizes
