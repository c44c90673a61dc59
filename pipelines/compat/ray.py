"""What this project uses of Ray beyond its public interface, with the version it was read from and the reason.

Written for Ray 2.60; `pyproject.toml` allows no other minor version. `tests/pipelines/compat/test_ray.py` fails when
one of these things changes. Ray Train's controller imports this module, so it loads no torch; what needs torch is in
`pipelines.compat.ray_torch`.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass

import ray.exceptions
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution import context

from meteor_model.foreign import foreign

_RETRY_ADVICE = re.compile(r"\nFailed to [^\n]* after \d+/\d+ attempts \(total backoff .*", re.DOTALL)


@dataclass(frozen=True)
class Snapshot:
    """Names of the checkpoint folders that Ray Train has committed.

    Attributes:
        latest: the one that a restart resumes from; None before the first.
        names: all that are kept.
    """

    latest: str | None
    names: frozenset[str]


def parse_snapshot(data: bytes) -> Snapshot:
    """What `checkpoint_manager_snapshot.json` says, the file that Ray's checkpoint manager writes at every commit.

    Ray has no public way to ask which checkpoint a run would resume from before it is resumed.

    Raises:
        ValueError: if it is damaged.
    """
    with foreign(lambda what: ValueError(f"no snapshot of Ray's checkpoint manager: {what}")):
        state = json.loads(data)
        latest, kept = state["latest_checkpoint_result"], state["checkpoint_results"]
        name = None if latest is None else str(latest["checkpoint_dir_name"])
        names = {str(result["checkpoint_dir_name"]) for result in kept}
    return Snapshot(name, frozenset(names | ({name} if name is not None else set())))


def health_check_failure(error: BaseException) -> BaseException | None:
    """The error of a worker that Ray's health check wraps, None if `error` is no such wrapper.

    Ray hands the private wrapper to the public `WorkerGroupError.worker_failures`.
    """
    return error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else None


def without_retry_advice(message: str) -> str:
    """An error's message without what Ray Data appends to it: how often it tried, and how to change that."""
    return _RETRY_ADVICE.sub("", message)


def place_of_dead_actor(error: ray.exceptions.RayActorError) -> tuple[str, str] | None:
    """Process id and address of the actor that died, None where Ray does not know; they are in the message alone."""
    found = dict(re.findall(r"^\s*(pid|ip): (\S+)", str(error), re.MULTILINE))
    return (found["pid"], found["ip"]) if len(found) == 2 else None


def log_no_reports() -> None:
    """Leave out of the log what every `ray.train.report` says: its metrics, which the progress line has, too."""
    logging.getLogger(context.__file__).setLevel(logging.WARNING)
