"""Which checkpoints of a run count, and which one a start resumes from.

A checkpoint counts from the moment that Ray Train's snapshot file names it, so a half-uploaded folder is never resumed
from. Ray Train's controller imports this module, to start the stream where the checkpoint stands, so it loads neither
torch nor transformers (6 s of CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipelines.checkpoint.state import STATE_FILE, CheckpointError, TrainState
from pipelines.compat.ray import Snapshot, parse_snapshot
from pipelines.io import sealed, storage
from pipelines.io.run_folder import RunFolder, run_folder

if TYPE_CHECKING:
    from ray.data import Dataset

CHECKPOINT_PREFIX = "step-"


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint."""

    url: str
    state: TrainState


def latest_checkpoint(root: str, run_name: str) -> CheckpointRef | None:
    """The checkpoint that Ray Train would resume run `run_name` of storage `root` from, or None for a new run.

    Ray's checkpoint manager names it in its snapshot file, which it writes after every worker has uploaded.

    Raises:
        CheckpointError: if the snapshot or the state in the checkpoint is damaged.
        StorageError: if storage cannot be read.
    """
    folder = run_folder(root, run_name)
    try:
        data = storage.read_bytes(folder.snapshot)
    except storage.ObjectMissingError:
        return None
    latest = read_snapshot(folder, data).latest
    if latest is None:
        return None
    url = folder.checkpoint(latest)
    return CheckpointRef(url, read_state(url))


def read_snapshot(folder: RunFolder, data: bytes) -> Snapshot:
    """What Ray's snapshot of a run says.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        return parse_snapshot(data)
    except ValueError as error:
        raise CheckpointError(
            f"{folder.snapshot} is damaged ({error}); go on with --run.resume-step, or use another --run.name"
        ) from error


def read_state(url: str) -> TrainState:
    """The training state of the checkpoint at an address.

    Raises:
        CheckpointError: if it is no state.
        DamagedFileError: if it is not what was written.
        StorageError: if storage cannot be read.
    """
    state_url = storage.join(url, STATE_FILE)
    return TrainState.from_json(sealed.read_file(url, STATE_FILE), state_url)


def remaining_stream(root: str, run_name: str, stream: Callable[[int], Dataset]) -> Dataset:
    """The part of a stream that run `run_name` has not consumed.

    Ray Train's controller calls it just before the workers get their checkpoint, at every start of them. Both take the
    latest result of the controller's snapshot; `pipelines.training.batches.BatchReader` checks that they agree.

    Args:
        root: storage root, whose `runs/` holds the run.
        run_name: of the run.
        stream: makes the stream from a given row of the plan on.
    """
    checkpoint = latest_checkpoint(root, run_name)
    return stream(checkpoint.state.rows if checkpoint else 0)
