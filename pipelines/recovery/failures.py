"""From what Ray Train raises to the error that a user can act on."""

import re

import ray.exceptions
import ray.train

from pipelines.compat.ray import health_check_failure, place_of_dead_actor, without_retry_advice
from pipelines.io.errors import TransientError
from pipelines.recovery.preemption import PreemptedError

SHOWN_LINES = 12
_MEMORY = re.compile(r"\(IP: (?P<node>[^,)]+).*?\) was (?P<used>\S+) used / (?P<limit>\S+) limit")
"""Ray's words for a node that ran low on memory."""


class TrainingError(RuntimeError):
    """A training stopped for a reason that is no fault of its settings or data; the message says how to go on.

    Args:
        subject: what failed, e.g. the run.
        summary: who failed with what.
        preempted: the machine is taken away; no failure of the training.
    """

    def __init__(self, subject: str, summary: str, preempted: bool = False) -> None:
        super().__init__(
            f"{subject}: {summary}\n"
            "Start the same command again under the same run name to continue from the last checkpoint."
        )
        self.summary = summary
        self.preempted = preempted


def root_cause(error: ray.train.TrainingFailedError, subject: str) -> Exception:
    """The error to raise instead of `error`.

    When one worker fails, the others fail with it, in their collective operations. The project's own errors are
    ValueErrors, so the first of those is the cause, and it is returned as it was raised. Anything else becomes a
    TrainingError, a storage that was away for too long as well.
    """
    failures = _failures(error)
    for _, failure in failures:
        if isinstance(failure, ValueError) and not isinstance(failure, TransientError):
            return failure
    for who, failure in failures:
        if isinstance(failure, PreemptedError):
            return TrainingError(subject, f"{who} was {failure}", preempted=True)
    who, failure = min(failures, key=lambda item: _distance(item[1]))
    return TrainingError(subject, f"{who} {_what_happened(failure)}")


def _distance(failure: BaseException) -> int:
    """How far from the cause: a process that died, then any other error, then what its absence did to the others."""
    if isinstance(failure, ray.exceptions.RayActorError | ray.exceptions.OutOfMemoryError):
        return 0
    return 2 if isinstance(failure, RuntimeError) else 1


def _what_happened(failure: BaseException) -> str:
    if isinstance(failure, ray.exceptions.RayActorError):
        place = place_of_dead_actor(failure)
        where = f" (pid {place[0]} on {place[1]})" if place else ""
        return f"died{where}: killed from outside, out of memory, or its node is gone"
    if isinstance(failure, ray.exceptions.OutOfMemoryError):
        found = _MEMORY.search(str(failure))
        node = f"node {found['node']} ({found['used']} of {found['limit']} used)" if found else "its node"
        return (
            f"was ended by Ray, since {node} ran low on memory: give the nodes more, or ask for less of each "
            "(training.micro_batch, training.gradient_checkpointing, fewer workers on a node)"
        )
    lines = str(failure).splitlines()
    return f"failed with {type(failure).__name__}: " + "\n".join(lines[:SHOWN_LINES])


def _failures(error: ray.train.TrainingFailedError) -> list[tuple[str, BaseException]]:
    if isinstance(error, ray.train.WorkerGroupError):
        return [(f"worker {rank}", _unwrap(failure)) for rank, failure in sorted(error.worker_failures.items())]
    if isinstance(error, ray.train.ControllerError):
        return [("the start of the workers", _unwrap(error.controller_failure))]
    return [("the training", error)]


def _unwrap(error: BaseException) -> BaseException:
    """The innermost error that a Ray task, a data operator or a health check wraps."""
    inner = health_check_failure(error)
    if isinstance(error, ray.exceptions.RayTaskError):
        inner = error.cause
    elif isinstance(error, ray.exceptions.UserCodeException):
        inner = error.__cause__
    if inner is not None and inner is not error:
        return _unwrap(inner)
    if error.args and isinstance(error.args[0], str):
        error.args = (without_retry_advice(error.args[0]), *error.args[1:])
    return error
