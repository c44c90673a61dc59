"""Which checkpoints are validated: those that are due, as long as no other validation is running or waiting.

Ray Train (2.60) makes one validation at a time, keeps all others that were asked for in a queue, keeps their
checkpoints in storage until it gets to them, and ends a training only when the queue is empty; nothing can be taken out
of it. So none is asked for that would have to wait: the next validation is of the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import ray.train
from ray.train import CheckpointConsistencyMode, ReportedCheckpointStatus

from pipelines.checkpoint.state import TrainState
from pipelines.io.console import say_from_worker

COMMIT_S = 10.0
"""Seconds that the checkpoint before may take to be committed, after all its files are stored."""


def pending_validation() -> str | None:
    """Folder of a checkpoint whose validation is running or waiting, None where there is none; for any one worker."""
    reported = ray.train.get_all_reported_checkpoints(
        consistency_mode=CheckpointConsistencyMode.COMMITTED, timeout_s=COMMIT_S
    )
    pending = [one for one in reported if one.status is ReportedCheckpointStatus.PENDING_VALIDATION]
    return PurePosixPath(pending[0].checkpoint.path).name if pending else None


@dataclass
class ValidationTurn:
    """Decides on worker 0 whether the next checkpoint is to be validated.

    Args:
        every: checkpoints between two validations; 0 for none.
        pending: asks for one that is under way.
        tell: says a line to people.

    Attributes:
        passed_over: checkpoints that were due and are not validated.
    """

    every: int
    pending: Callable[[], str | None] = pending_validation
    tell: Callable[[str], None] = say_from_worker
    passed_over: int = 0
    _overdue: bool = field(default=False, init=False)

    def is_due(self, number: int, state: TrainState) -> bool:
        """Whether checkpoint `number`, from 1, is due, or one before it still is.

        The last one of a training has held-out metrics already.
        """
        return self.every > 0 and not state.done and (self._overdue or number % self.every == 0)

    def begins(self, state: TrainState) -> bool:
        """Whether a checkpoint of `state` that is due is validated."""
        pending = self.pending()
        self._overdue = pending is not None
        if pending is not None:
            self.passed_over += 1
            if self.passed_over == 1:
                self.tell(
                    f"  the checkpoint of step {state.step} is not validated: the validation of {pending} still runs. "
                    "The first one after it will be. training.validate_every_checkpoints makes validations rarer, "
                    "training.validation_gpus and training.validation_cpus make them faster"
                )
        return pending is None

    def conclude(self) -> None:
        """After the last checkpoint: how many were passed over."""
        if self.passed_over > 1:
            self.tell(f"  {self.passed_over} checkpoints were not validated: another validation was under way")
