"""The loss of every step of a run, in files that are only ever added to.

Each checkpoint adds one file `step-losses/{first}-{last}.f64` to the run's folder: the losses of the steps since the
checkpoint before, `first` excluded, `last` included, as little-endian float64, and their SHA-256. So a checkpoint costs
what its own steps cost, however long the run is, and old losses outlive old checkpoints.

The file is written before its checkpoint is committed: a committed checkpoint of step s always has files that cover
the steps 1 to s. Files beyond the last commit are of steps that are trained again; a start removes them
(`remove_uncommitted_losses`), so the files in the folder never overlap.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from pipelines.checkpoint.state import CheckpointError, TrainState
from pipelines.io import sealed, storage
from pipelines.io.fingerprint import sha256_bytes
from pipelines.io.run_folder import RunFolder

DTYPE = np.dtype("<f8")
READERS = 16  # at once; a file is small, so reading one is waiting
_NAME = re.compile(r"(\d+)-(\d+)\.f64")


@dataclass(frozen=True, order=True)
class LossFile:
    """The losses of the steps first + 1 to last."""

    first: int
    last: int

    @property
    def name(self) -> str:
        """Its name in the folder."""
        return f"{self.first:09d}-{self.last:09d}.f64"

    @classmethod
    def parse(cls, name: str) -> LossFile | None:
        """The file of this name, None if it holds no losses."""
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), int(match[2])) if match else None


class LossLog:
    """The losses of the steps since the last checkpoint, on the worker that stores them.

    Args:
        state: where the worker starts.
    """

    def __init__(self, state: TrainState) -> None:
        self._first = state.step - len(state.losses_in_version_2)
        self._losses = list(state.losses_in_version_2)

    def add(self, loss: float) -> None:
        """The next step's loss."""
        self._losses.append(loss)

    def take(self) -> tuple[LossFile, bytes]:
        """The file of the steps since the last call, and its content."""
        file = LossFile(self._first, self._first + len(self._losses))
        content = np.array(self._losses, DTYPE).tobytes()
        self._first, self._losses = file.last, []
        return file, content


def write_losses(run: RunFolder, file: LossFile, content: bytes, retry_s: float) -> None:
    """Store one file of a run; written again, it is the same.

    Raises:
        StorageError: if storage refuses, or fails for longer than `retry_s` seconds.
    """
    storage.write_bytes(storage.join(run.losses, file.name), content + sha256_bytes(content), retry_s)


def read_losses(run: RunFolder, state: TrainState) -> npt.NDArray[np.float64]:
    """The loss of every step of a run up to a committed state, to the last bit.

    Raises:
        CheckpointError: if files are missing or do not hold what their names say.
        StorageError: if storage cannot be read.
    """
    if state.losses_in_version_2:
        return np.array(state.losses_in_version_2)
    files = [file for file in _parsed(storage.list_files(run.losses)) if file.last <= state.step]
    reached = 0
    for file in files:
        if file.first != reached:
            break
        reached = file.last
    if reached != state.step or (files and files[-1].last != reached):
        raise CheckpointError(
            f"{run.losses} holds no unbroken losses of the steps 1 to {state.step}: they end at step {reached}. "
            "Restore the files of that folder as the run wrote them"
        )
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(partial(_read, run.losses), files))
    return np.concatenate([np.empty(0), *parts])


def remove_uncommitted_losses(run: RunFolder, committed_step: int) -> None:
    """Remove the files beyond the committed step: a start trains these steps again. Only while no worker is alive."""
    for file in _parsed(storage.list_files(run.losses)):
        if file.last > committed_step:
            storage.delete(storage.join(run.losses, file.name))


def _parsed(names: Iterable[str]) -> list[LossFile]:
    return sorted(file for name in names if (file := LossFile.parse(name)) is not None)


def _read(folder: str, file: LossFile) -> npt.NDArray[np.float64]:
    url, size = storage.join(folder, file.name), DTYPE.itemsize * (file.last - file.first)
    for _ in range(sealed.READS):  # a wrong body may be a fault on the wire
        stored = storage.read_bytes(url)
        content, digest = stored[:size], stored[size:]
        if len(content) == size and digest in (b"", sha256_bytes(content)):  # earlier versions stored no digest
            return np.frombuffer(content, DTYPE)
    raise CheckpointError(
        f"{url} is damaged: it has {len(stored)} bytes, {DTYPE.itemsize} for each of its {file.last - file.first} "
        "steps and a SHA-256 that is theirs were written"
    )
