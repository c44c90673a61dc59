"""What the processes of a training tell each other, in one Ray cluster: an actor that lives as long as the driver.

It carries the word that an attempt to train has failed from Ray's controller to the validations beside it
(`pipelines.training.validation`). That only one job trains a run is the matter of its lease
(`pipelines.recovery.lease`).
"""

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
WAIT_S = 60.0  # for an answer of the actor, a new process for it included


class _LockActor:
    """There as long as its driver."""

    def __init__(self) -> None:
        self.failed_attempt = -1

    def fail(self, attempt: int) -> None:
        """Attempts up to this one have failed."""
        self.failed_attempt = max(self.failed_attempt, attempt)

    def failed(self, attempt: int) -> bool:
        """Whether this attempt has failed."""
        return attempt <= self.failed_attempt


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

    def failed(self) -> bool:
        """Whether this attempt has failed, or its driver is gone."""
        try:
            return bool(ray.get(ray.get_actor(self.name, NAMESPACE).failed.remote(self.attempt), timeout=WAIT_S))
        except (ValueError, ray.exceptions.RayError):
            return True


class FailureCallback(ray.train.UserCallback):
    """In Ray's controller, which imports this module: what runs beside the training learns that it failed."""

    def __init__(self, lock: RunLock) -> None:
        self.lock = lock

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """One or more workers have failed."""
        self.lock.fail()


@contextmanager
def lock_run(lease: Lease) -> Iterator[RunLock]:
    """The actor of a run that this job holds, for the block; it ends with the driver, however that ends.

    Ray must be initialised.
    """
    name = f"run-{lease.owner[:16]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # ends with the driver
    actor = ray.remote(num_cpus=0)(_LockActor)
    handle = actor.options(name=name, namespace=NAMESPACE, scheduling_strategy=here).remote()
    ray.get(handle.failed.remote(0), timeout=WAIT_S)
    try:
        yield RunLock(name, lease.token)
    finally:
        ray.kill(handle)
