"""The error that a user sees: the cause, not what it did to the other workers."""

import pytest
import ray.exceptions
import ray.train

from pipelines.data.tar_format import ShardError, ShardUnreadableError
from pipelines.io.storage import TransientStorageError
from pipelines.recovery.failures import TrainingError, root_cause
from pipelines.recovery.preemption import PreemptedError
from pipelines.training.batches import StreamOrderError


def test_root_cause_is_the_project_s_own_error() -> None:
    own = StreamOrderError("row 7 instead of 3")
    collateral = RuntimeError("Connection closed by peer")
    task = ray.exceptions.RayTaskError("f", "traceback", own)
    failures: dict[int, Exception] = {0: collateral, 1: task.as_instanceof_cause()}
    assert root_cause(ray.train.WorkerGroupError("...", failures), "run 'a'") is own
    failed = root_cause(ray.train.WorkerGroupError("...", {0: collateral, 1: KeyError("x")}), "run 'a'")
    assert isinstance(failed, TrainingError)
    assert "worker 1 failed with KeyError" in str(failed)
    assert root_cause(ray.train.ControllerError(own), "run 'a'") is own


def test_a_dead_worker_is_the_cause_of_what_its_absence_does_to_others() -> None:
    died = ray.exceptions.RayActorError(error_msg="The actor died.\n\tpid: 71\n\tip: 10.0.0.2\nIts worker died.")
    failures = {0: KeyError("collateral"), 1: died, 2: RuntimeError()}
    failed = root_cause(ray.train.WorkerGroupError("...", failures), "run 'a'")
    assert isinstance(failed, TrainingError)
    assert failed.summary.startswith("worker 1 died (pid 71 on 10.0.0.2): killed from outside")
    assert not failed.preempted


def test_a_worker_that_ray_ended_for_memory_is_the_cause_and_its_node_is_named() -> None:
    text = (
        "3 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: 60) was "
        "13.59GB used / 23.54GB limit (0.577337)\nOOM kill reason: Memory usage 14533304320B\n- objects spillable: 0"
    )
    failures = {0: KeyError("collateral"), 1: ray.exceptions.OutOfMemoryError(text)}
    failed = root_cause(ray.train.WorkerGroupError("...", failures), "run 'a'")
    assert isinstance(failed, TrainingError)
    assert failed.summary.startswith("worker 1 was ended by Ray, since node 10.0.0.2 (13.59GB of 23.54GB used) ran low")
    other = ray.train.WorkerGroupError("...", {1: ray.exceptions.OutOfMemoryError("in other words")})
    assert "since its node ran low on memory" in str(root_cause(other, "run 'a'"))


def test_a_preempted_worker_is_no_failure() -> None:
    failures = {0: RuntimeError("Connection closed"), 1: PreemptedError("ended by SIGTERM; saved")}
    failed = root_cause(ray.train.WorkerGroupError("...", failures), "run 'a'")
    assert isinstance(failed, TrainingError)
    assert failed.preempted


@pytest.mark.parametrize(
    "fault",
    [TransientStorageError("no answer for 120 s"), ShardUnreadableError("s3://b/x.tar", "unreadable", "no answer")],
)
def test_a_storage_that_was_away_is_no_fault_of_the_data(fault: ValueError) -> None:
    assert isinstance(root_cause(ray.train.WorkerGroupError("...", {0: fault}), "run 'a'"), TrainingError)
    damaged = ShardError("s3://b/x.tar", "replaced", "other checksum")
    assert root_cause(ray.train.WorkerGroupError("...", {0: damaged}), "run 'a'") is damaged


def test_root_cause_has_its_own_message_only() -> None:
    advice = "Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, ..."
    raised = ray.train.WorkerGroupError("...", {0: ValueError(f"shard 3 is truncated\n{advice}")})
    assert str(root_cause(raised, "run 'a'")) == "shard 3 is truncated"
