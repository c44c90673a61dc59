"""The checkpoint with the lowest held-out loss, and which checkpoint of a run is exported.

Validation beside the training keeps the best validated checkpoint as a whole copy in the run's `best/`, which Ray Train
does not delete.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal

from pipelines.checkpoint.committed import CheckpointRef, read_state
from pipelines.checkpoint.state import PARITY_FILE, CheckpointError
from pipelines.io import codec, sealed, storage
from pipelines.io.run_folder import RunFolder, run_folder

BEST_VERSION = 1
HELDOUT_LOSS = "heldout_loss"


@dataclass(frozen=True)
class Best:
    """What `best/best.json` says; only once it is written, the copy that it names counts."""

    version: int
    step: int
    loss: float
    """Its held-out loss."""
    source: str
    """Address that the checkpoint was copied from; Ray deletes it when newer ones come."""
    folder: str
    """Name of the copy, beside the file."""
    files: dict[str, int]
    """Bytes of every file of the copy."""
    metrics: dict[str, float] = field(default_factory=dict)
    """All its held-out metrics, under the names of `TrainState.final`; in the first runs the loss alone was kept."""
    unknown: tuple[str, ...] = ()
    """Whole copies beside it that no record told of when it was written: somebody may still want them."""


def keep_best(run: str, checkpoint_url: str, step: int, metrics: Mapping[str, float]) -> bool:
    """Keep a copy of the checkpoint if its held-out loss is the lowest so far; returns whether it is.

    Killed at any point, `best.json` names a whole copy; what a killed call left is removed by the next. One process at
    a time may call it for a run.

    Raises:
        StorageError: if storage fails, or the copy is not like the checkpoint.
        CheckpointError: if `best.json` is damaged.
    """
    place, loss = RunFolder(run), metrics[HELDOUT_LOSS]
    best = _read_best(place)
    better = math.isfinite(loss) and (best is None or loss < best.loss)
    unknown = _unknown_copies(place) if best is None else best.unknown
    if better:
        folder = PurePosixPath(checkpoint_url).name
        copied = best is not None and best.folder == folder  # it is whole: do not touch it
        files = best.files if best is not None and copied else _copy(checkpoint_url, storage.join(place.best, folder))
        best = Best(BEST_VERSION, step, loss, checkpoint_url, folder, files, dict(metrics), unknown)
        sealed.write_document(place.best_record, asdict(best))
    kept = {*unknown, *((best.folder,) if best is not None else ())}
    for name in storage.list_files(place.best):
        url = storage.join(place.best, name)
        if url != place.best_record and name.partition("/")[0] not in kept:
            storage.delete(url)
    return better


def _unknown_copies(place: RunFolder) -> tuple[str, ...]:
    """Copies that are there without a record, and are no copy that was cut short, as far as their lists tell."""
    copies = {name.partition("/")[0] for name in storage.list_files(place.best) if "/" in name}
    return tuple(sorted(copy for copy in copies if not _cut_short(storage.join(place.best, copy))))


def _cut_short(url: str) -> bool:
    """Whether a copy says itself that files of it are missing."""
    try:
        folder = sealed.open_folder(url)
    except sealed.DamagedFileError:
        return False
    return folder.sums is not None and bool(folder.missing)


def best_checkpoint(root: str, run_name: str) -> CheckpointRef | None:
    """The checkpoint of run `run_name` of storage `root` with the lowest validated loss; None before there is one.

    Its state has the metrics of the validation as `final`.

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
    return CheckpointRef(url, replace(read_state(url), final={HELDOUT_LOSS: best.loss, **best.metrics}))


def checkpoint_to_export(
    root: str, run_name: str, last: CheckpointRef, which: Literal["best", "last"]
) -> CheckpointRef:
    """The checkpoint of a finished training that becomes its model; its state has its held-out metrics as `final`.

    Args:
        root: the storage.
        run_name: the run.
        last: its last checkpoint, whose held-out loss was measured at the end of the training.
        which: `last`, or `best`: the one with the lowest held-out loss of all validated ones and the last.

    Raises:
        CheckpointError: if `best` is asked for and no checkpoint was validated, or the best one cannot be proven equal
            after export.
        StorageError: if storage cannot be read.
    """
    if which == "last":
        return last
    best = best_checkpoint(root, run_name)
    if best is None:
        raise CheckpointError(
            f"run {run_name!r} has no validated checkpoint, so none is the best: train with "
            "training.validate_every_checkpoints of at least 1 and checkpoints before the last step "
            "(training.checkpoint_every_steps), or export the last one with run.export last"
        )
    if last.state.final[HELDOUT_LOSS] <= best.state.final[HELDOUT_LOSS]:
        return last
    if not storage.exists(storage.join(best.url, PARITY_FILE)):
        raise CheckpointError(
            f"{best.url} was made by an earlier version of this code and holds no {PARITY_FILE}, so its export cannot "
            "be proven equal: use run.export last"
        )
    return best


def _read_best(place: RunFolder) -> Best | None:
    url = place.best_record
    try:
        best = codec.from_plain(Best, sealed.read_document(url), url)
    except storage.ObjectMissingError:
        return None
    except storage.TransientStorageError:
        raise
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
    for name, size in sizes.items():
        storage.copy(storage.join(source, name), storage.join(target, name), size)
    copied = storage.list_sizes(target)
    wrong = [name for name in sizes if copied.get(name) != sizes[name]]
    if wrong:
        raise storage.StorageError(f"{target}: the copy of {source} is not like it: {', '.join(wrong[:5])}")
    return sizes
