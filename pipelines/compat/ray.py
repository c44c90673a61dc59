"""What this project uses of Ray beyond its public interface, with the version it was read from and the reason.

Written for Ray 2.60; `pyproject.toml` allows no other minor version. `tests/pipelines/compat/test_ray.py` fails when
one of these things changes. Ray Train's controller imports this module, so it loads no torch; what needs torch is in
`pipelines.compat.ray_torch`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.train.v2._internal import constants
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from meteor_model.foreign import foreign

_RETRY_ADVICE = re.compile(r"\nFailed to [^\n]* after \d+/\d+ attempts \(total backoff .*", re.DOTALL)


ENVIRONMENT_OF_THE_CONTROLLER = {
    "env_vars": {
        constants.RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: constants.DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE
    }
}
"""The runtime environment that Ray Train gives its controller and not the workers.

Data tasks that they start inherit it, and Ray never lends a process to another environment. Workers with the same one
find the training's data processes warm when they read held-out samples, instead of starting others.
"""


@dataclass(frozen=True)
class Snapshot:
    """Names of the checkpoint folders that Ray Train has committed.

    Attributes:
        latest: the one that a restart resumes from; None before the first.
        names: all that are kept.
        pending: those whose validation was asked for and has not ended, oldest first.
    """

    latest: str | None
    names: frozenset[str]
    pending: tuple[str, ...] = ()


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
        pending = tuple(str(result["checkpoint_dir_name"]) for result in state.get("pending_training_results", ()))
        names = {str(result["checkpoint_dir_name"]) for result in kept}
    return Snapshot(name, frozenset(names | ({name} if name is not None else set())), pending)


def without_checkpoints(data: bytes, names: frozenset[str]) -> bytes:
    """A snapshot that names all checkpoints of `data` but these; the latest is the last reported of the others.

    Raises:
        ValueError: if `data` is damaged.
    """
    parse_snapshot(data)
    state = json.loads(data)
    results, indices = state["checkpoint_results"], state["checkpoint_report_indices"]
    kept = [
        (index, one) for index, one in zip(indices, results, strict=True) if one["checkpoint_dir_name"] not in names
    ]
    pending = zip(state["pending_training_results"], state["pending_validation_specs"], strict=True)
    waiting = [(one, spec) for one, spec in pending if one["checkpoint_dir_name"] not in names]
    latest = max(kept, key=lambda item: item[0], default=(0, None))[1]
    left = {
        **state,
        "checkpoint_results": [one for _, one in kept],
        "checkpoint_report_indices": [index for index, _ in kept],
        "latest_checkpoint_result": latest,
        "pending_training_results": [one for one, _ in waiting],
        "pending_validation_specs": [spec for _, spec in waiting],
    }
    return json.dumps(left).encode()


def make_snapshot(results: Sequence[tuple[str, Mapping[str, float]]]) -> bytes:
    """A snapshot that names these checkpoints: folders and what was reported with each, the latest last."""
    states = [{"version": 0, "checkpoint_dir_name": name, "metrics": dict(metrics)} for name, metrics in results]
    return json.dumps(
        {
            "ray_version": ray.__version__,
            "checkpoint_results": states,
            "checkpoint_report_indices": list(range(len(states))),
            "latest_checkpoint_result": states[-1] if states else None,
            "pending_training_results": [],
            "pending_validation_specs": [],
            "current_report_index": len(states),
            "validated_checkpoint_dir_names": [],
            "timed_out_validation_checkpoint_dir_names": [],
            "failed_validation_checkpoint_dir_names": [],
        }
    ).encode()


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


class StartPhases(ControllerCallback, WorkerGroupCallback):
    """Tells which part of a start of the workers Ray Train's controller is at.

    The controller waits without a limit for processes that never answer, and the public callback hears of no start.

    Args:
        began: called in the controller's process when it begins.
        room: called when a start came to nothing, and it waits until there is room for another one.
        placing: called when it asks for room for the workers, for which Ray waits a minute, and for their processes.
        starting: called when their processes are there.
        running: called when they train, and once more when they do not any more.
    """

    def __init__(
        self,
        began: Callable[[], None],
        room: Callable[[], None],
        placing: Callable[[], None],
        starting: Callable[[], None],
        running: Callable[[], None],
    ) -> None:
        self._began, self._room, self._placing = began, room, placing
        self._starting, self._running = starting, running

    def after_controller_start(self, train_run_context: Any) -> None:
        """The controller begins."""
        self._began()

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """It asks for room."""
        self._placing()

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        """A start came to nothing, or a worker has failed."""
        self._room()

    def before_init_train_context(self, workers: Any) -> dict[str, list[Any]]:
        """The processes are there."""
        self._starting()
        return {}

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        """The workers train."""
        self._running()

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        """They do not any more."""
        self._running()


def log_no_reports() -> None:
    """Leave out of the log what every `ray.train.report` says: its metrics, which the progress line has, too."""
    logging.getLogger(context.__file__).setLevel(logging.WARNING)
