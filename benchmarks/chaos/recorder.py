"""What sits inside the training workers: it writes down what was trained, and dies where it is told to.

Every worker appends one line a step to one file; a line is one `write`, so lines of several processes never mix. A
fault happens once for its marker file, whichever attempt or command comes to its step first.
"""

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ray.data
import torch

from benchmarks.chaos.data import as_json
from pipelines.data.schema import Row
from pipelines.data.shards import ShardInfo
from pipelines.data.stream import Fetch, Samples
from pipelines.training.batches import iterate_rows
from pipelines.training.loop import StepRecord

HOLD_LIMIT_S = 180.0
POLL_S = 0.02
INTO_DATA_START_S = 0.3

BALLOON_PIECE, BALLOON_MOST = 64 * 2**20, 12 * 2**30
BALLOON_EVERY_S = 0.05
MEMORY_LIMIT = "RAY_memory_usage_threshold"
"""The variable under which Ray's nodes know when they run low on memory."""

FULL_AT_BYTES = 32 * 2**10
"""Largest file on a full disk: less than a checkpoint's, more than all that the benchmark itself writes."""

Action = Literal["kill", "hold", "terminate", "stop", "balloon", "fill"]


SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}


@dataclass(frozen=True)
class StepFault:
    """One fault right after the optimizer step `step` on worker `rank`.

    kill: SIGKILL to itself. terminate: SIGTERM to itself. stop: SIGSTOP to itself. hold: wait there until `marker`.go
    is made. balloon: take memory until Ray ends it; only on a node that Ray was given a limit for. fill: from now on
    the process writes no file larger than FULL_AT_BYTES, as on a disk that is full.
    """

    step: int
    rank: int
    action: Action
    marker: str

    def happen(self) -> None:
        """Claim the marker, then act; nothing where the marker was claimed before."""
        if (self.action == "balloon" and MEMORY_LIMIT not in os.environ) or not claim(Path(self.marker)):
            return
        if self.action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.action])
        elif self.action == "balloon":
            take_memory()
        elif self.action == "fill":
            resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_AT_BYTES, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        else:
            deadline = time.monotonic() + HOLD_LIMIT_S
            while not Path(self.marker + ".go").exists():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nobody released the hold at step {self.step} within {HOLD_LIMIT_S:.0f} s")
                time.sleep(POLL_S)


def take_memory() -> None:
    """Take memory, a piece at a time, and keep it. Raises MemoryError where nobody minds."""
    kept: list[bytes] = []
    while len(kept) * BALLOON_PIECE < BALLOON_MOST:
        kept.append(b"x" * BALLOON_PIECE)
        time.sleep(BALLOON_EVERY_S)
    raise MemoryError(f"nobody ended a process that took {BALLOON_MOST / 2**30:.0f} GiB")


def claim(marker: Path) -> bool:
    """Make `marker`, with the time in it (seconds since the epoch); False where it is there already."""
    try:
        descriptor = os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(repr(time.time()))
    return True


@dataclass(frozen=True)
class Recorder:
    """The observer of the training loop."""

    log: str
    faults: tuple[StepFault, ...] = ()
    step_seconds: float = 0.0
    """Pause after every step, for faults that need a training that lasts."""

    def __call__(self, record: StepRecord) -> None:
        """Append the line of one step, then let the faults of this step and worker happen."""
        line = {
            # Equal on all workers of one start, and another one at the next.
            "attempt": f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
            "pid": os.getpid(),
            "time": time.time(),
            "step": record.step,
            "rank": record.rank,
            "world": record.world,
            "loss": record.loss,
            "samples": [[sample.epoch, sample.key] for sample in record.samples],
        }
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, (as_json(line) + "\n").encode())
        finally:
            os.close(descriptor)
        time.sleep(self.step_seconds)
        for fault in self.faults:
            if (fault.step, fault.rank) == (record.step, record.rank):
                fault.happen()


@dataclass(frozen=True)
class StopsInRead:
    """Fetches a shard as `fetch` does, but once the data task that does it is stopped in the middle, by SIGSTOP."""

    fetch: Fetch
    shard: str
    marker: str

    def __call__(self, manifest: str, info: ShardInfo) -> Samples:
        """The samples of one shard."""
        if info.path == self.shard and claim(Path(self.marker)):
            os.kill(os.getpid(), signal.SIGSTOP)
        return self.fetch(manifest, info)


@dataclass(frozen=True)
class KilledInDataStart:
    """Reads rows as `iterate_rows` does, but worker `rank` dies while it waits for its first ones."""

    rank: int
    marker: str

    def __call__(self, share: ray.data.DataIterator, micro_batch: int) -> Iterator[Sequence[Row]]:
        """The rows of one worker's share."""
        if torch.distributed.get_rank() == self.rank and claim(Path(self.marker)):
            threading.Timer(INTO_DATA_START_S, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return iterate_rows(share, micro_batch)
