"""Ray's private parts are there and behave as `pipelines.compat.ray` uses them: the library's own code is called."""

import asyncio
import logging
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray.exceptions
import ray.train
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.data._internal.util import _annotate_exception_with_retry_context
from ray.train import Checkpoint, CheckpointConfig
from ray.train.torch import TorchConfig
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.storage import StorageContext
from ray.train.v2._internal.execution.training_report import _TrainingReport
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from pipelines.compat.ray import (
    ENVIRONMENT_OF_THE_CONTROLLER,
    Snapshot,
    StartPhases,
    health_check_failure,
    log_no_reports,
    parse_snapshot,
    place_of_dead_actor,
    without_retry_advice,
)
from pipelines.compat.ray_torch import StartHookTorchConfig
from pipelines.io.run_folder import RunFolder


def test_ray_calls_what_tells_the_part_of_a_start() -> None:
    told: list[str] = []
    phases = StartPhases(*(partial(told.append, name) for name in ("began", "room", "placing", "starting", "running")))
    assert ray.train.RunConfig(callbacks=[phases]).callbacks == [phases], "Ray takes it among the public ones"
    base = {name for kind in (ControllerCallback, WorkerGroupCallback) for name in dir(kind)}
    own = [name for name in vars(StartPhases) if not name.startswith("_")]
    assert set(own) <= base, "names that Ray knows"
    for name in own:
        getattr(phases, name)(None)
    assert told == ["began", "placing", "room", "starting", "running", "running"]


def test_workers_are_given_the_environment_of_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the data tasks that each starts would be in processes of their own."""

    class TakenError(Exception):
        pass

    def remote(**options: Any) -> None:
        raise TakenError(options["runtime_env"])

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr(ray, "remote", remote)
    with pytest.raises(TakenError) as taken:
        DataParallelTrainer._initialize_and_run_controller(cast(Any, None))
    assert WorkerGroup._get_worker_runtime_env(ENVIRONMENT_OF_THE_CONTROLLER) == taken.value.args[0]


def test_the_snapshot_that_ray_writes_is_read(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    assert PurePosixPath(run.snapshot).name == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    place = StorageContext(str(tmp_path), "train")

    async def commit() -> None:
        manager = CheckpointManager(CheckpointConfig(num_to_keep=2), place)
        manager._write_state_to_storage()
        assert parse_snapshot(Path(run.snapshot).read_bytes()) == Snapshot(None, frozenset())
        for step in (2, 4, 6):
            Path(run.checkpoint(f"step-{step}")).mkdir()
            manager.register_checkpoint(_TrainingReport(Checkpoint(run.checkpoint(f"step-{step}")), {}, False))

    asyncio.run(commit())
    assert parse_snapshot(Path(run.snapshot).read_bytes()) == Snapshot("step-6", frozenset({"step-4", "step-6"}))
    assert not Path(run.checkpoint("step-2")).exists()


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"{}", b'{"latest_checkpoint_result": 3, "checkpoint_results": []}']
)
def test_a_damaged_snapshot_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="no snapshot of Ray's checkpoint manager"):
        parse_snapshot(data)


def test_a_health_check_wraps_the_worker_s_error() -> None:
    failure = KeyError("x")
    assert health_check_failure(WorkerHealthCheckFailedError("worker 1 is ill", failure)) is failure
    assert health_check_failure(failure) is None


def test_ray_data_appends_advice_that_is_taken_off() -> None:
    told = _annotate_exception_with_retry_context(
        ValueError("shard 3 is truncated\nat byte 7"),
        description="apply UDF transform",
        attempts=1,
        max_attempts=1,
        total_backoff_s=0.0,
        exception_str="",
    )
    assert "total backoff" in str(told)
    assert without_retry_advice(str(told)) == "shard 3 is truncated\nat byte 7"


def test_a_dead_actor_has_its_place_in_the_message() -> None:
    cause = ActorDiedErrorContext(pid=71, node_ip_address="10.0.0.2", class_name="Worker", actor_id=bytes(16))
    assert place_of_dead_actor(ray.exceptions.ActorDiedError(cause)) == ("71", "10.0.0.2")
    assert place_of_dead_actor(ray.exceptions.ActorDiedError()) is None


def test_reports_are_logged_by_a_logger_named_after_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    assert context.logger.name == context.__file__
    monkeypatch.setattr(context.logger, "level", logging.INFO)
    log_no_reports()
    assert context.logger.level == logging.WARNING


class Hooked(Exception):
    """The hook was given to the workers."""


class Group:
    """A worker group whose first call ends the start."""

    def execute(self, function: Any, *arguments: Any) -> None:
        assert function.__name__, "Ray asks for it"
        raise Hooked(*arguments)


def test_the_torch_backend_starts_with_the_hook() -> None:
    assert isinstance(vars(TorchConfig)["backend_cls"], property)
    config = StartHookTorchConfig(backend="gloo", timeout_s=60, start_hook=print)
    with pytest.raises(Hooked) as raised:
        config.backend_cls().on_start(Group(), config)
    assert raised.value.args == (print,)


class GoneGroup:
    """A worker group one of whose workers is gone."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def execute_async(self, function: Any, **arguments: Any) -> Any:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.OutOfMemoryError("the node ran low on memory"),
        ray.exceptions.WorkerCrashedError(),
        ray.exceptions.NodeDiedError("the node is gone"),
        ray.exceptions.RaySystemError(OSError("no connection")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_worker_that_is_gone_does_not_keep_the_others_from_shutting_down(error: Exception) -> None:
    config = StartHookTorchConfig(backend="gloo", timeout_s=60, start_hook=print)
    config.backend_cls().on_shutdown(GoneGroup(error), config)
    with pytest.raises(type(error)):  # why the override is there; where Ray passes over it too, it can go
        TorchConfig().backend_cls().on_shutdown(GoneGroup(error), config)


def test_what_is_no_fault_of_ray_is_not_passed_over() -> None:
    config = StartHookTorchConfig(backend="gloo", timeout_s=60, start_hook=print)
    with pytest.raises(ZeroDivisionError):
        config.backend_cls().on_shutdown(GoneGroup(ZeroDivisionError()), config)
