"""What the processes of a training tell each other, in one Ray cluster: an actor that lives as long as the driver.

It carries the word that an attempt to train has failed, or made its last step, from Ray's controller to the validations
beside it (`pipelines.training.validation`). That only one job trains a run is the matter of its lease
(`pipelines.recovery.lease`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.recovery.lease import Lease, LeaseToken

NAMESPACE = "meteor"
DONE = "done"
"""Metric that is reported with a training's last checkpoint."""
WAIT_S = 60.0  # for an answer of the actor, a new process for it included


@dataclass(frozen=True)
class Standing:
    """How an attempt to train stands.

    Attributes:
        failed: or its driver is gone.
        ended_s: seconds since its last checkpoint was committed; None before.
    """

    failed: bool = False
    ended_s: float | None = None


class _LockActor:
    """There as long as its driver."""

    def __init__(self) -> None:
        self.failed_attempt = -1
        self.ended_at: float | None = None

    def fail(self, attempt: int) -> None:
        """Attempts up to this one have failed."""
        self.failed_attempt = max(self.failed_attempt, attempt)

    def end(self) -> None:
        """The last step is made and its checkpoint is committed."""
        self.ended_at = self.ended_at or time.monotonic()

    def standing(self, attempt: int) -> Standing:
        """How this attempt stands."""
        ended_s = None if self.ended_at is None else time.monotonic() - self.ended_at
        return Standing(attempt <= self.failed_attempt, ended_s)


@dataclass(frozen=True)
class RunLock:
    """One attempt to train a claimed run; found by name from any process of the cluster."""

    name: str
    lease: LeaseToken
    """To be asked before anything is stored."""
    attempt: int = 0

    def fail(self) -> None:
        """Say that this attempt has failed; waits for nobody."""
        with suppress(ValueError, ray.exceptions.RayError):
            ray.get_actor(self.name, NAMESPACE).fail.remote(self.attempt)

    def end(self) -> None:
        """Say that the last checkpoint is committed; waits for nobody."""
        with suppress(ValueError, ray.exceptions.RayError):
            ray.get_actor(self.name, NAMESPACE).end.remote()

    def standing(self) -> Standing:
        """How this attempt stands."""
        try:
            asked = ray.get_actor(self.name, NAMESPACE).standing.remote(self.attempt)
            standing: Standing = ray.get(asked, timeout=WAIT_S)
            return standing
        except (ValueError, ray.exceptions.RayError):
            return Standing(failed=True)


class StandingCallback(ray.train.UserCallback):
    """In Ray's controller, which imports this module: what runs beside the training learns that it failed or ended."""

    def __init__(self, lock: RunLock) -> None:
        self.lock = lock

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """One or more workers have failed."""
        self.lock.fail()

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        """All workers have reported a checkpoint."""
        if metrics[0].get(DONE):
            self.lock.end()


@contextmanager
def lock_run(lease: Lease) -> Iterator[RunLock]:
    """The actor of a run that this job holds, for the block; it ends with the driver, however that ends.

    Ray must be initialised.
    """
    name = f"run-{lease.owner[:16]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # ends with the driver
    actor = ray.remote(num_cpus=0)(_LockActor)
    # Known by its name from now on; what is asked before its process is there, waits for that. The driver does not.
    handle = actor.options(name=name, namespace=NAMESPACE, scheduling_strategy=here).remote()
    try:
        yield RunLock(name, lease.token)
    finally:
        ray.kill(handle)
