"""From what Ray Train raises to the error that a user can act on."""

import re

import ray.exceptions
import ray.train
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

# Ray Data appends to an error's own message what it thinks of retrying it.
_RETRY_ADVICE = re.compile(r"\nFailed to [^\n]* after \d+/\d+ attempts \(total backoff .*", re.DOTALL)


class TrainingError(RuntimeError):
    """A training stopped for a reason that is no fault of its settings or data; the message says how to go on."""


def root_cause(error: ray.train.TrainingFailedError, subject: str) -> Exception:
    """The error to raise instead of `error`.

    When one worker fails, the others fail with it, in their collective operations. The project's own errors are
    ValueErrors, so the first of those is the cause, and it is returned as it was raised. Anything else becomes a
    TrainingError.
    """
    failures = _failures(error)
    for _, failure in failures:
        if isinstance(failure, ValueError):
            return failure
    who, failure = min(failures, key=lambda item: isinstance(item[1], RuntimeError))
    return TrainingError(
        f"{subject}: {who} failed with {type(failure).__name__}: {failure}\n"
        "Start the same command again under the same run name to continue from the last checkpoint."
    )


def _failures(error: ray.train.TrainingFailedError) -> list[tuple[str, BaseException]]:
    if isinstance(error, ray.train.WorkerGroupError):
        return [(f"worker {rank}", _unwrap(failure)) for rank, failure in sorted(error.worker_failures.items())]
    if isinstance(error, ray.train.ControllerError):
        return [("the start of the workers", _unwrap(error.controller_failure))]
    return [("the training", error)]


def _unwrap(error: BaseException) -> BaseException:
    """The innermost error that a Ray task, a data operator or a health check wraps."""
    inner: BaseException | None = None
    if isinstance(error, ray.exceptions.RayTaskError):
        inner = error.cause
    elif isinstance(error, WorkerHealthCheckFailedError):
        inner = error.health_check_failure
    elif isinstance(error, ray.exceptions.UserCodeException):
        inner = error.__cause__
    if inner is not None and inner is not error:
        return _unwrap(inner)
    if error.args and isinstance(error.args[0], str):
        error.args = (_RETRY_ADVICE.sub("", error.args[0]), *error.args[1:])
    return error
