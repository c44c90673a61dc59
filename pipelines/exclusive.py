"""One job at a time for a run: two would overwrite each other's checkpoints."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

NAMESPACE = "meteor"
PATIENCE_S = 60.0  # the claim of a driver that was killed lives on for some seconds
PAUSE_S = 1.0


class RunInUseError(ValueError):
    """Another job of this Ray cluster trains the run; the message says what to do."""


class _Claim:
    """An actor that is there as long as its driver."""

    def ready(self) -> bool:
        """Once it is."""
        return True


@contextmanager
def exclusive(run_url: str, subject: str, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold the run at `run_url` for this driver inside the block; Ray must be initialised.

    It covers the jobs of one Ray cluster, and ends with the driver, however that ends.

    Raises:
        RunInUseError: if another driver still holds it after `patience_s` seconds.
    """
    name = f"run-{hashlib.sha256(run_url.encode()).hexdigest()[:16]}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # ends with the driver
    deadline = time.monotonic() + patience_s
    while True:
        try:
            actor = ray.remote(num_cpus=0)(_Claim)
            claim = actor.options(name=name, namespace=NAMESPACE, scheduling_strategy=here).remote()
            ray.get(claim.ready.remote())
            break
        except (ValueError, ray.exceptions.RayActorError) as error:  # the name is taken, or its node went just now
            if time.monotonic() > deadline:
                raise RunInUseError(
                    f"{subject} is being trained by another job: wait for it, stop it (`ray job list`, "
                    f"`ray job stop`), or use another --run.name ({error})"
                ) from error
            time.sleep(PAUSE_S)
    try:
        yield
    finally:
        ray.kill(claim)
