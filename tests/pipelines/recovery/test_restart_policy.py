"""What a failure leads to."""

import pytest

from pipelines.recovery.failures import TrainingError
from pipelines.recovery.restart_policy import RestartPolicy
from pipelines.training.batches import StreamOrderError


def test_faults_of_data_stop_at_once_and_others_after_too_many_in_a_row() -> None:
    policy = RestartPolicy(max_failures=2)
    killed = TrainingError("run 'a'", "worker 1 failed with RayActorError: killed")
    with pytest.raises(StreamOrderError):
        policy.after(StreamOrderError("row 7"), 4)
    assert policy.after(killed, -1).reason.endswith("restart 1 of at most 2 in a row, from the start")
    assert policy.after(killed, -1).pause_s == 2.0
    assert "restart 1 of" in policy.after(killed, 4).reason  # a checkpoint came in between
    for _ in range(5):
        assert policy.after(TrainingError("run 'a'", "gone", preempted=True), 4).pause_s == 0
    assert "restart 2 of" in policy.after(killed, 4).reason
    with pytest.raises(TrainingError, match="Start the same command again"):
        policy.after(killed, 4)
