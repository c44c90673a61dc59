"""One job at a time for a run: two would overwrite each other's checkpoints.

The lock is an actor, so it also carries the word that an attempt to train has failed from Ray's controller to the
validations beside it (`pipelines.training.validation`).
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.actor
import ray.exceptions
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.io.fingerprint import sha256
from pipelines.io.retry import Backoff, retry

NAMESPACE = "meteor"
WAIT_S = 60.0  # the lock of a driver that was killed lives on for some seconds
EVERY_SECOND = Backoff(1.0, 1.0)


class RunInUseError(ValueError):
    """Another job of this Ray cluster trains the run; the message says what to do."""


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
    attempt: int = 0

    def fail(self) -> None:
        """Say that this attempt has failed; waits for nobody."""
        with suppress(ValueError, ray.exceptions.RayError):
            ray.get_actor(self.name, NAMESPACE).fail.remote(self.attempt)

    def failed(self) -> bool:
        """Whether this attempt has failed, or its driver is gone."""
        try:
            return bool(ray.get(ray.get_actor(self.name, NAMESPACE).failed.remote(self.attempt)))
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
def lock_run(run_url: str, subject: str, wait_s: float = WAIT_S) -> Iterator[RunLock]:
    """Hold the run at `run_url` for this driver inside the block; Ray must be initialised.

    It covers the jobs of one Ray cluster, and ends with the driver, however that ends.

    Raises:
        RunInUseError: if another driver still holds it after `wait_s` seconds.
    """
    name = f"run-{sha256(run_url)[:16]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # ends with the driver
    taken = (ValueError, ray.exceptions.RayActorError)  # the name is taken, or its node went just now

    def take() -> ray.actor.ActorHandle:
        actor = ray.remote(num_cpus=0)(_LockActor)
        handle = actor.options(name=name, namespace=NAMESPACE, scheduling_strategy=here).remote()
        ray.get(handle.failed.remote(0))
        return handle

    try:
        lock = retry(
            take, subject, retry_s=wait_s, transient=lambda error: isinstance(error, taken), backoff=EVERY_SECOND
        )
    except taken as error:
        raise RunInUseError(
            f"{subject} is being trained by another job: wait for it, stop it (`ray job list`, `ray job stop`), or use "
            f"another --run.name ({error})"
        ) from error
    try:
        yield RunLock(name)
    finally:
        ray.kill(lock)
