"""What happens after a training's workers fail: go on, or stop with the cause.

A fault of data or settings would happen again, so it stops the job at once. Anything else (a killed worker, a lost
node, a network that broke) restarts the workers from the last checkpoint. What is counted are failures in a row: a new
checkpoint in between shows that the training moves, and months of it may meet many.
"""

from dataclasses import dataclass

from pipelines.io.retry import Backoff
from pipelines.recovery.failures import TrainingError

BACKOFF = Backoff(1.0, 60.0)


@dataclass(frozen=True)
class Restart:
    """How to go on."""

    pause_s: float
    """Seconds to wait first."""
    reason: str
    """For the job's log."""


@dataclass
class RestartPolicy:
    """Decides after each failure. Plain values in and out, so that it is tested without a cluster.

    Args:
        max_failures: restarts in a row without a new checkpoint in between.
    """

    max_failures: int
    _failures: int = 0
    _last_step: int = -1

    def after(self, error: Exception, step: int) -> Restart:
        """What to do after `error`, the newest checkpoint being of `step` (-1: none).

        Raises:
            the error itself: a fault of data or settings.
            TrainingError: once there were too many failures in a row.
        """
        if isinstance(error, TrainingError) and error.preempted:
            return Restart(0.0, f"{error.summary}; going on from {_place(step)}")
        if not isinstance(error, TrainingError):
            raise error
        self._failures = 1 if step > self._last_step else self._failures + 1
        self._last_step = step
        if self._failures > self.max_failures:
            raise error
        count = f"restart {self._failures} of at most {self.max_failures} in a row"
        return Restart(BACKOFF.pause_s(self._failures), f"{error.summary}; {count}, from {_place(step)}")


def _place(step: int) -> str:
    return "the start" if step < 0 else f"the checkpoint of step {step}"
