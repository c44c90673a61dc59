"""Scenarios that kill, stop, add and remove processes: workers, drivers, raylets, whole clusters, the MLflow server."""

from __future__ import annotations

import os
import signal
import time

from benchmarks.chaos.audit import attempts_of
from benchmarks.chaos.cluster import HEAD_CPUS
from benchmarks.chaos.stage import COMMIT_POLL_S, STORAGE, TOTAL_STEPS, Stage
from infra.nodes import Node, drain_node
from pipelines.checkpoint.committed import latest_checkpoint
from pipelines.io.run_folder import run_folder
from pipelines.tracking.delivery import deliver_outbox

ONE_PER_NODE = {"cpus_per_worker": HEAD_CPUS / 2 + 1}
"""Room for one worker on the head, for the other one on a node beside it."""
NODE_CPUS = HEAD_CPUS // 2 + 2
LASTING_STEP_S = 0.5


def undisturbed(stage: Stage) -> None:
    """The training that nothing happens to. Its faults are the images that cannot be decoded, in every epoch."""
    stage.finish(stage.config())
    stage.replayed, stage.worlds = 0, (2,)
    stage.faults += 4


def kill_worker_at_random_step(stage: Stage) -> None:
    """Within one command: the workers are started again from the newest checkpoint."""
    step, rank = stage.random.randint(5, TOTAL_STEPS - 2), stage.random.randint(0, 1)
    config = stage.config(faults=(stage.step_fault(step, "hold", rank),), settings={"max_failures": 1})
    command, stage.replayed = stage.hold(config, step)
    os.kill(stage.pid_of(rank), signal.SIGKILL)
    stage.injected()
    stage.notes.append(f"worker {rank} killed after step {step}")
    stage.ends_well(command)


def kill_worker_in_first_step(stage: Stage) -> None:
    """Before there is any checkpoint."""
    stage.finish(stage.config(faults=(stage.step_fault(1, "kill"),), settings={"max_failures": 1}))
    stage.injected_by_marker()
    stage.replayed = 1


def kill_worker_in_last_step(stage: Stage) -> None:
    """After the last optimizer step, before its checkpoint; the command ends, and is given again."""
    config = stage.config(faults=(stage.step_fault(TOTAL_STEPS, "kill"),))
    stage.fails(config)
    stage.injected_by_marker()
    stage.finish(config)


def kill_worker_in_data_start(stage: Stage) -> None:
    """While it waits for its first batch."""
    stage.finish(stage.config(data_start_kill=stage.marker(), settings={"max_failures": 1}))
    stage.injected_by_marker()
    early = [line for line in stage.lines() if stage.fault_times and line.time < stage.fault_times[0]]
    if early:
        stage.wrong.append(f"void: {len(early)} steps were made before the kill")


def kill_driver(stage: Stage) -> None:
    """SIGKILL to the driver at a random step, then the same command."""
    step = stage.random.randint(5, TOTAL_STEPS - 1)
    config = stage.config(faults=(stage.step_fault(step, "hold"),))
    command, stage.replayed = stage.hold(config, step)
    command.kill()
    stage.injected()
    stage.notes.append(f"driver killed after step {step}")
    stage.finish(config)


def kill_cluster(stage: Stage) -> None:
    """SIGKILL to every process of Ray and to the driver; Ray is started again, then the same command."""
    step = stage.random.randint(5, TOTAL_STEPS - 1)
    config = stage.config(faults=(stage.step_fault(step, "hold"),))
    command, stage.replayed = stage.hold(config, step)
    killed = stage.cluster.kill_ray()
    command.kill()
    stage.injected(killed)
    stage.cluster.start_ray()
    stage.notes.append(f"{killed} processes of Ray and the driver killed after step {step}")
    stage.finish(config)


def kill_raylet(stage: Stage) -> None:
    """SIGKILL to the raylet of the node that one of the two workers runs on; another node takes its place."""
    node = stage.cluster.add_node(NODE_CPUS)
    step = stage.random.randint(5, TOTAL_STEPS - 1)
    settings = {**ONE_PER_NODE, "max_failures": 2}
    config = stage.config(faults=(stage.step_fault(step, "hold", rank=0),), settings=settings)
    command, _ = stage.hold(config, step)
    _kill_raylet(stage, node)
    stage.cluster.add_node(NODE_CPUS)
    stage.release()
    if command.wait() != 0:
        stage.notes.append("the command ended and was given again")
        stage.finish(config)
    stage.worlds = (2,)
    _several_starts(stage)


def _kill_raylet(stage: Stage, node: Node) -> None:
    raylet = node.raylet
    assert raylet is not None, "the node has no raylet"
    raylet.kill()
    stage.injected()


def _several_starts(stage: Stage) -> None:
    """Void unless the fault ended a start of the workers."""
    if len({line.attempt for line in stage.lines()}) < 2:
        stage.wrong.append("void: the workers did not feel it")


def worlds_two_one_three(stage: Stage) -> None:
    """The driver is killed twice, and the same run goes on with another number of workers each time."""
    first = stage.random.randint(5, 7)
    second = stage.random.randint(9, 11)
    for workers, step in ((2, first), (1, second)):
        name = f"workers-{workers}"
        config = stage.config(workers=workers, faults=(stage.step_fault(step, "hold", rank=0, name=name),))
        command, _ = stage.hold(config, step, name)
        command.kill()
        stage.injected()
        stage.notes.append(f"{workers} workers until step {step}")
    stage.finish(stage.config(workers=3))
    stage.worlds = (2, 1, 3)


def grow_during_the_run(stage: Stage) -> None:
    """Elastic: the training begins with one worker, room for a second one appears."""
    settings = {**ONE_PER_NODE, "min_workers": 1, "resize_interval_s": 1.0, "max_failures": 2}
    config = stage.config(
        faults=(stage.step_fault(5, "hold", rank=0),), settings=settings, step_seconds=2 * LASTING_STEP_S
    )
    command, _ = stage.hold(config, step=5)
    stage.cluster.add_node(NODE_CPUS)
    stage.injected()
    stage.release()
    stage.ends_well(command)
    stage.worlds = (1, 2)


def lose_a_node(stage: Stage) -> None:
    """Elastic: the raylet of one worker's node is killed and no other node comes; the training goes on with one."""
    node = stage.cluster.add_node(NODE_CPUS)
    step = stage.random.randint(5, TOTAL_STEPS - 3)
    settings = {**ONE_PER_NODE, "min_workers": 1, "resize_interval_s": 1.0, "max_failures": 2}
    config = stage.config(faults=(stage.step_fault(step, "hold", rank=0),), settings=settings)
    command, _ = stage.hold(config, step)
    _kill_raylet(stage, node)
    stage.cluster.stop_nodes()
    stage.release()
    stage.ends_well(command)
    stage.worlds = (2, 1)


def preempted_worker(stage: Stage) -> None:
    """SIGTERM to one worker: a checkpoint at the next step's end, and no step is made twice."""
    step = stage.random.choice((5, 6, 9, 10))  # no step of a regular checkpoint comes next
    settings = {"max_failures": 0, "preemption_grace_s": 30.0}
    config = stage.config(faults=(stage.step_fault(step, "terminate"),), settings=settings, step_seconds=0.2)
    command = stage.start(config)
    if command.wait() != 0:
        stage.notes.append("the command ended and was given again")
        stage.finish(config)
    stage.injected_by_marker()
    stage.notes.append(f"SIGTERM after step {step}")
    stage.replayed = 0
    _several_starts(stage)


def drained_node(stage: Stage) -> None:
    """Ray gives notice that a node goes away; then the node goes, and the training goes on from there.

    The notice makes a checkpoint at once, of a step that has none otherwise.
    """
    node = stage.cluster.add_node(NODE_CPUS)
    settings = {**ONE_PER_NODE, "max_failures": 1, "checkpoint_every_steps": TOTAL_STEPS}
    config = stage.config(
        faults=(stage.step_fault(3, "hold", rank=0),), settings=settings, step_seconds=2 * LASTING_STEP_S
    )
    command = stage.start(config)
    stage.wait_marker(command)
    drain_node(stage.cluster.ray, node, deadline_s=60)
    stage.release()
    saved: list[int] = []

    def committed() -> bool:
        checkpoint = latest_checkpoint(STORAGE, stage.name)
        saved[:] = [] if checkpoint is None else [checkpoint.state.step]
        return bool(saved)

    stage.wait_for("a checkpoint", committed, command, COMMIT_POLL_S)
    raylet = node.raylet
    if raylet is not None:  # Ray itself ends a drained node once it is idle
        raylet.kill()
    stage.injected()
    stage.cluster.add_node(NODE_CPUS)
    if command.wait() != 0:
        stage.notes.append("the command ended and was given again")
        stage.finish(config)
    _several_starts(stage)
    again = min(line.step for line in attempts_of(stage.lines())[-1])
    stage.notes.append(f"checkpoint of step {saved[0]} on notice; went on with step {again}")
    if again != saved[0] + 1 or saved[0] >= TOTAL_STEPS:
        stage.wrong.append(f"went on with step {again}, though step {saved[0]} was saved on notice")


def mlflow_restart(stage: Stage) -> None:
    """The MLflow server is killed during the training and comes back later."""
    from mlflow import MlflowClient

    client = MlflowClient(stage.cluster.stores.mlflow_uri)
    experiment = client.create_experiment(f"chaos-{time.time_ns():x}")
    run_id = client.create_run(experiment).info.run_id
    config = stage.config(
        faults=(stage.step_fault(4, "hold", rank=0),),
        step_seconds=LASTING_STEP_S,
        mlflow_uri=stage.cluster.stores.mlflow_uri,
        mlflow_run_id=run_id,
    )
    command = stage.start(config)
    stage.wait_marker(command)
    stage.injected(stage.cluster.kill_service("mlflow"))
    stage.release()
    stage.wait_for("step 8", lambda: any(line.step >= 8 for line in stage.lines()), command)
    stage.cluster.start_service("mlflow")
    stage.ends_well(command)
    # Where the training was over before MLflow answered again, the rest lies in the outbox, for the job's last phase.
    late = deliver_outbox(stage.cluster.stores.mlflow_uri, run_id, run_folder(STORAGE, stage.name).url).delivered
    points = [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")]
    losses = {line.step: line.loss for line in stage.lines()}
    if sorted(points) != sorted(losses.items()):
        stage.wrong.append(f"MLflow holds the losses {sorted(points)}, the workers saw {sorted(losses.items())}")
    stage.notes.append(f"{len(points)} losses in MLflow, {late} points of all metrics delivered after the training")
    stage.replayed = 0


def stop_by_signal(stage: Stage) -> None:
    """SIGTERM to the driver, then the same command."""
    config = stage.config(faults=(stage.step_fault(6, "hold"),))
    command, _ = stage.hold(config, step=6)
    os.kill(command.process.pid, signal.SIGTERM)
    stage.injected()
    command.wait()
    stage.finish(config)
