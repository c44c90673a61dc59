"""Preemption notices: a worker that is about to be taken away says so, and all workers make one more checkpoint.

Two kinds of notice, and what is right after the checkpoint:

- signal: SIGTERM to the process of a worker. It has `grace_s` seconds to live, so its training stops once the
  checkpoint is committed: every worker raises `Preempted`, and the training starts again from there. Ray's own handler
  would exit at once.
- drain: Ray reports that a node of the training is being drained (`ray drain-node`, the autoscaler, a spot notice).
  The training goes on: the node may live until its deadline. Ray restarts the workers then, without charging it to
  the failures.

A SIGTERM to Ray's own node process, or to all processes of a node, leaves no time: Ray ends its workers in
milliseconds. Who stops whole nodes drains them first.

Each worker knows of its own SIGTERM alone, so the workers agree once a step: `PreemptionWatch.votes` are summed over
all of them (in the all-reduce that a step makes anyway), and `PreemptionWatch.agree` gets the sums.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import FrameType
from typing import Literal

import ray.train
from ray.train import CheckpointConsistencyMode

POLL_S = 2.0  # between two looks at Ray's drain notices: one takes some ms on every worker; Ray itself looks every 5 s


class PreemptedError(RuntimeError):
    """The training stopped because a worker is being taken away; no fault of its settings or data."""


@dataclass(frozen=True)
class Preemption:
    """A notice that all workers know of."""

    kind: Literal["signal", "drain"]
    """Whose notice it is; the training stops after a signal, and goes on after a drain."""
    deadline: float | None
    """When the worker is taken away, in seconds since the epoch; None where Ray knows no time."""
    detail: str
    """Who got the notice, for people."""

    def seconds_left(self, otherwise: float) -> float:
        """Seconds until the deadline, at least 0; `otherwise` where there is none."""
        return otherwise if self.deadline is None else max(0.0, self.deadline - time.time())


# -------------------------------------------------------------------------------------------------- SIGTERM of a worker


class TermNotice:
    """Whether this process got a SIGTERM; reading it costs nothing."""

    def __init__(self) -> None:
        self.received_at: float | None = None
        """Seconds since the epoch; None before."""

    @property
    def requested(self) -> bool:
        """Whether the signal came."""
        return self.received_at is not None

    def listen(self) -> None:
        """Take SIGTERM from Ray's handler, which exits; only the main thread may.

        The killer's SIGKILL still ends the process, as does the end of Ray's node process.
        """
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received_at = self.received_at or time.time()


TERM_NOTICE = TermNotice()
"""This process's notice; a signal handler belongs to the whole process."""


def listen() -> None:
    """Take SIGTERM as a notice in this process (`TERM_NOTICE`); for the main thread of a worker."""
    TERM_NOTICE.listen()


# ------------------------------------------------------------------------------------------- the workers' common notice


class PreemptionWatch:
    """One worker's part in agreeing on a notice.

    Every worker calls `votes` and then `agree` in every step.

    Args:
        grace_s: seconds between a SIGTERM and the kill.
        poll_s: seconds between two looks at Ray's drain notices.
    """

    def __init__(
        self, rank: int, grace_s: float, poll_s: float = POLL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rank = rank
        self._grace_s = grace_s
        self._poll_s = poll_s
        self._clock = clock
        self._polled = clock()
        self._drained: set[str] = set()

    def votes(self) -> tuple[int, int]:
        """Whether this worker got a SIGTERM, and whether it is time to ask Ray for drain notices.

        Only worker 0 says the latter. To be summed over the workers.
        """
        due = self._rank == 0 and self._clock() - self._polled >= self._poll_s
        return int(TERM_NOTICE.requested), int(due)

    def agree(self, signalled: int, due: int) -> Preemption | None:
        """The notice to act upon in this step, from the summed votes; the same kind on every worker.

        A signal is told in every step from the first on, a drain once for every node.
        """
        if due:
            self._polled = self._clock()
            info = ray.train.get_preemption_info()  # collective; all workers got the same `due`
            nodes = set(info.preempted_node_ids) if info else set()
            if info and not signalled and nodes - self._drained:
                self._drained |= nodes
                deadline = None if info.deadline_ms is None else info.deadline_ms / 1000
                return Preemption("drain", deadline, f"Ray drains the nodes of workers {info.preempted_ranks}")
        if signalled:
            deadline = (TERM_NOTICE.received_at or time.time()) + self._grace_s
            return Preemption("signal", deadline, f"{signalled} of the workers got a SIGTERM")
        return None


def wait_committed(checkpoint_dir_name: str, timeout_s: float) -> bool:
    """Wait until Ray Train has committed the checkpoint that this worker reported last, on all workers.

    A worker that raises right after its report ends the others in the middle of their uploads; this is how it knows
    that they are through. Each worker asks for itself.

    Returns:
        whether the checkpoint `checkpoint_dir_name` was committed within `timeout_s` seconds.
    """
    reported = ray.train.get_all_reported_checkpoints(
        consistency_mode=CheckpointConsistencyMode.COMMITTED, timeout_s=timeout_s
    )
    return any(PurePosixPath(one.checkpoint.path).name == checkpoint_dir_name for one in reported)


def preempted(notice: Preemption, step: int, committed: bool) -> PreemptedError:
    """The error to raise after the checkpoint of optimizer step `step`."""
    kept = f"the checkpoint of step {step} is whole" if committed else f"the checkpoint of step {step} came too late"
    return PreemptedError(
        f"preempted after step {step}: {notice.detail}; {kept}. Start the same command again under the same run name "
        "to continue from the last checkpoint."
    )
