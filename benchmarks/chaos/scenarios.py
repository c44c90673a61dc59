"""The table of scenarios: what is injected, into which numbers of workers, and what must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.chaos import damage, hangs, processes, state, store
from benchmarks.chaos.stage import Stage

OTHER_WORLD_TOLERANCE = 1e-5
"""Largest loss difference where the number of workers is not the undisturbed training's: sums in another order."""
UNDISTURBED = "undisturbed"


@dataclass(frozen=True)
class Scenario:
    """One row of the table."""

    name: str
    injects: str
    workers: str
    """Numbers of workers over the training."""
    play: Callable[[Stage], None]
    tolerance: float = 0.0
    """Largest loss difference to the undisturbed training; 0 asks for equal bits."""
    services: tuple[str, ...] = ()
    """What the stack must hold beside Ray and the object store."""
    gives_up: str = ""
    """What is not trained, by a setting; there is no undisturbed training of the rest to compare losses with."""

    by_name_only: bool = False
    """Not played unless named: it repeats in one what other rows hold singly, or goes beyond them."""

    @property
    def expects(self) -> str:
        """What must hold, in words."""
        if self.gives_up:
            return f"{self.gives_up} counted and listed as dropped; of the others lost 0, repeated 0"
        losses = "losses bit-equal" if self.tolerance == 0 else f"losses within {self.tolerance:g}"
        return f"lost 0, repeated 0, {losses} to the undisturbed training"


SCENARIOS: tuple[Scenario, ...] = (
    Scenario(UNDISTURBED, "nothing but what all have: 2 of 180 images cannot be decoded", "2", processes.undisturbed),
    Scenario("corrupt-images", "1% corrupt images, once more (the control)", "2", processes.undisturbed),
    Scenario("kill-worker", "SIGKILL to a worker at a random step", "2", processes.kill_worker_at_random_step),
    Scenario("kill-worker-first-step", "the same in the first step", "2", processes.kill_worker_in_first_step),
    Scenario("kill-worker-last-step", "the same in the last step", "2", processes.kill_worker_in_last_step),
    Scenario("kill-worker-data-start", "the same before the first batch", "2", processes.kill_worker_in_data_start),
    Scenario("kill-worker-upload", "the same while its checkpoint is uploaded", "2", store.kill_during_upload),
    Scenario("kill-driver", "SIGKILL to the driver, then the same command", "2", processes.kill_driver),
    Scenario("kill-cluster", "SIGKILL to all of Ray, restart, then the same command", "2", processes.kill_cluster),
    Scenario("kill-raylet", "SIGKILL to the raylet of one of two nodes; another comes", "2", processes.kill_raylet),
    Scenario(
        "lose-node",
        "SIGKILL to the raylet of one of two nodes; none comes, elastic",
        "2, 1",
        processes.lose_a_node,
        OTHER_WORLD_TOLERANCE,
    ),
    Scenario(
        "worlds-2-1-3",
        "two kills of the driver, restarts with other numbers of workers",
        "2, 1, 3",
        processes.worlds_two_one_three,
        OTHER_WORLD_TOLERANCE,
    ),
    Scenario(
        "grow",
        "a second node appears during the training, elastic",
        "1, 2",
        processes.grow_during_the_run,
        OTHER_WORLD_TOLERANCE,
    ),
    Scenario("store-reset", "reads of shards: connection reset at half of the body", "2", store.RESET),
    Scenario("store-503", "SlowDown to reads of shards and uploads of checkpoints", "2", store.answering_503),
    Scenario("store-slow", "reads of shards at 20 kB/s", "2", store.SLOW),
    Scenario("store-truncated", "reads of shards: the body ends at half of its length", "2", store.TRUNCATED),
    Scenario("store-wrong-body", "reads of shards: four bytes inverted", "2", store.WRONG),
    Scenario("store-reset-uploads", "uploads: reset in the body, and before the answer", "2", store.resetting_uploads),
    Scenario(
        "store-mixed",
        "faulty reads and uploads of every kind, and a killed worker",
        "2",
        store.mixed,
        by_name_only=True,
    ),
    Scenario("store-restart", "SIGKILL to the object store, back 4 s later", "2", store.restart),
    Scenario("store-disk-full", "uploads of checkpoints: no space left, for a while", "2", store.disk_full),
    Scenario("truncated-shard", "a shard is cut off; restored after the error", "2", damage.truncated_shard),
    Scenario("replaced-shard", "another shard in its place; restored after the error", "2", damage.replaced_shard),
    Scenario("duplicated-key", "a key twice in a shard; restored after the error", "2", damage.duplicated_key),
    Scenario("empty-shard", "a shard of 0 bytes; restored after the error", "2", damage.empty_shard),
    Scenario("missing-shard", "a shard is deleted; restored after the error", "2", damage.missing_shard),
    Scenario(
        "dropped-shard",
        "another shard in its place, data.bad_shards=drop",
        "2",
        damage.dropped_shard,
        gives_up="every sample of the shard",
    ),
    Scenario(
        "mlflow-restart",
        "MLflow killed in the training, back 4 steps later",
        "2",
        processes.mlflow_restart,
        services=("mlflow",),
    ),
    Scenario("sigterm-worker", "SIGTERM to one worker, 30 s to go", "2", processes.preempted_worker),
    Scenario(
        "sigterm-driver",
        "SIGTERM to the driver, then the same command",
        "2",
        processes.stop_by_signal,
        by_name_only=True,
    ),
    Scenario("checkpoint-wire", "reads of a checkpoint: wrong bytes", "2", state.damaged_on_the_wire),
    Scenario("checkpoint-rest", "a bit of the newest checkpoint changes at rest", "2", state.damaged_at_rest),
    Scenario("lost-snapshot", "Ray's list of committed checkpoints is deleted", "2", state.lost_snapshot),
    Scenario("second-cluster", "the same run from another Ray cluster", "2", state.second_cluster),
    Scenario("full-local-disk", "a worker's disk has no room for its checkpoint", "2", state.full_local_disk),
    Scenario("stop-worker", "SIGSTOP to a worker at a random step", "2", hangs.stop_worker),
    Scenario("stop-data-task", "SIGSTOP to a data task that reads a shard", "2", hangs.stop_data_task),
    Scenario(
        "out-of-memory",
        "a worker takes memory until Ray's node ends it",
        "2",
        hangs.out_of_memory,
        by_name_only=True,  # it needs 9 GiB to spare that no other program takes meanwhile
    ),
    Scenario("drain-node", "Ray's notice that one of two nodes goes in 60 s", "2", processes.drained_node),
)
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
