"""One job at a time for a run: two would overwrite each other's checkpoints."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

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
    deadline = time.monotonic() + patience_s
    while True:
        try:
            claim = ray.remote(num_cpus=0)(_Claim).options(name=name, namespace=NAMESPACE).remote()
            break
        except ValueError as error:  # the name is taken
            if time.monotonic() > deadline:
                raise RunInUseError(
                    f"{subject} is being trained by another job: wait for it, stop it (`ray job list`, "
                    "`ray job stop`), or use another --run.name"
                ) from error
            time.sleep(PAUSE_S)
    try:
        ray.get(claim.ready.remote())
        yield
    finally:
        ray.kill(claim)
