"""Scenarios of the object store: faults between the real clients and the real server, and the server's own restart.

Shards are read and checkpoints written through the proxy. Every scenario must end well within one command: the clients
outlast the fault.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from benchmarks.chaos.processes import kill_worker_at_random_step
from benchmarks.chaos.stage import TOTAL_STEPS, Stage
from infra.faults import DISK_FULL, SLOW_DOWN, Delay, Drip, Fault, Flip, Reset, Rule, Truncate

SHARD = r"/data/train-\d+\.tar(\?|$)"
CHECKPOINT = r"/train/step-"
UPLOADS = "PUT|POST"
OUTAGE_S = 4.0
DISK_FULL_ANSWERS = 25


def reading(fault: Fault, times: int = 3) -> Callable[[Stage], None]:
    """A scenario in which `times` reads of shards meet a fault, from a random one on."""

    def play(stage: Stage) -> None:
        skip = stage.random.randint(0, 8)
        _through(stage, Rule(fault, method="GET", path=SHARD, skip=skip, times=times))

    return play


def answering_503(stage: Stage) -> None:
    """SlowDown to reads of shards and to the upload of checkpoints."""
    _through(
        stage,
        Rule(SLOW_DOWN, method="GET", path=SHARD, skip=stage.random.randint(0, 8), times=6),
        Rule(SLOW_DOWN, method=UPLOADS, path=CHECKPOINT, skip=stage.random.randint(0, 3), times=4),
    )


def resetting_uploads(stage: Stage) -> None:
    """The connection is reset inside the body of an upload, and after an upload before its answer."""
    _through(
        stage,
        Rule(Reset(0.5, "request"), method=UPLOADS, path=CHECKPOINT, times=2),
        Rule(Reset(0, "answer"), method=UPLOADS, path=CHECKPOINT, skip=3, times=2),
    )


def mixed(stage: Stage) -> None:
    """Cut, wrong, reset and refused reads, refused uploads, and a worker killed at a random step: in one command."""
    faults: tuple[Fault, ...] = (Truncate(0.5), Flip(0.5, 4), Reset(0.5), SLOW_DOWN)
    reads = [Rule(fault, method="GET", path=SHARD, skip=2 * place, times=2) for place, fault in enumerate(faults)]
    _through(
        stage,
        *reads,
        Rule(SLOW_DOWN, method=UPLOADS, path=CHECKPOINT, skip=1, times=3),
        train=kill_worker_at_random_step,
    )


def disk_full(stage: Stage) -> None:
    """The store has no space left when a checkpoint comes, and has it again later."""
    _through(stage, Rule(DISK_FULL, method=UPLOADS, path=CHECKPOINT, skip=2, times=DISK_FULL_ANSWERS))


def _finish(stage: Stage) -> None:
    stage.finish(stage.config())


def _through(stage: Stage, *rules: Rule, train: Callable[[Stage], None] = _finish) -> None:
    """The whole training through the proxy with these rules, in one command."""
    proxy = stage.cluster.proxy
    before = len(proxy.injected)
    proxy.add(*rules)
    try:
        train(stage)
    finally:
        proxy.clear()
    met = proxy.injected[before:]
    for one in met:
        stage.injected(1, one.time)
    for rule in rules:
        if not any(one.rule == rule for one in met):
            stage.wrong.append(f"void: no request met {rule.fault}")


def restart(stage: Stage) -> None:
    """SIGKILL to the real server in the training, and its restart some seconds later; checkpoints fall due then."""
    step = stage.random.randint(2, 6)
    config = stage.config(faults=(stage.step_fault(step, "hold"),), step_seconds=0.5)
    command = stage.start(config)
    stage.wait_marker(command)
    killed = stage.cluster.kill_service("s3")
    stage.injected(killed)
    stage.release()
    time.sleep(OUTAGE_S)
    stage.cluster.start_service("s3")
    stage.notes.append(f"killed after step {step}, {OUTAGE_S:.0f} s away")
    stage.ends_well(command)


def kill_during_upload(stage: Stage) -> None:
    """SIGKILL to a worker while its upload of the second checkpoint is under way, which the proxy holds up."""
    proxy = stage.cluster.proxy
    before = len(proxy.injected)
    proxy.add(Rule(Delay(20.0), method=UPLOADS, path=r"/train/step-0000008.*_rank_|/train/step-0000008", times=None))
    config = stage.config(settings={"max_failures": 1}, step_seconds=0.1)
    try:
        command = stage.start(config)
        stage.wait_for("an upload", lambda: len(proxy.injected) > before, command)
        held = proxy.injected[before]
        os.kill(stage.pid_of(rank=1), signal.SIGKILL)
        stage.injected()
    finally:
        proxy.clear()
    stage.notes.append(f"killed {time.time() - held.time:.2f} s into {held.path.rpartition('/train/')[2][:60]}")
    stage.ends_well(command)
    made = max(line.step for line in stage.lines() if line.time < stage.fault_times[0])
    if made >= TOTAL_STEPS:
        stage.wrong.append("void: the training was over before the kill")


RESET = reading(Reset(0.5))
SLOW = reading(Drip(20_000.0), times=8)
TRUNCATED = reading(Truncate(0.5))
WRONG = reading(Flip(0.5, 4))
