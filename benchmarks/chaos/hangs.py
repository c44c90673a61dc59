"""Scenarios of processes that are there and do nothing: stopped by SIGSTOP; and of one that takes all memory."""

from __future__ import annotations

import re

import psutil

from benchmarks.chaos.cluster import Command
from benchmarks.chaos.data import TRAIN_SIZES
from benchmarks.chaos.processes import NODE_CPUS, ONE_PER_NODE
from benchmarks.chaos.recorder import MEMORY_LIMIT
from benchmarks.chaos.stage import TOTAL_STEPS, Stage
from pipelines.io import storage
from pipelines.io.run_folder import run_folder

MEMORY_TO_SPARE = 9 * 2**30
"""Room for the processes of the training, before and after the kill; the balloon takes the rest of it."""
TRAIN_SHARDS = tuple(f"train-{place:06d}.tar" for place in range(len(TRAIN_SIZES)))
STUCK_AFTER_S = 15.0
NOTICED_S = STUCK_AFTER_S + 15.0
"""Within which the watchdog's line must come: the limit, a step, and the looks of sender and observer."""


def stop_worker(stage: Stage) -> None:
    """SIGSTOP to a worker after a random step: it is ended, and all begin again from the newest checkpoint."""
    step, rank = stage.random.randint(5, TOTAL_STEPS - 2), stage.random.randint(0, 1)
    settings = {"max_failures": 1, "stuck_after_s": STUCK_AFTER_S}
    command = stage.start(stage.config(faults=(stage.step_fault(step, "stop", rank),), settings=settings))
    stage.ends_well(command)
    stage.injected_by_marker()
    named = _noticed(stage, command, rf"no sign of life .* worker {rank} \(pid .* last in [a-z ]+ of step (\d+)\D")
    # The step of its last beat, which was up to BEAT_S before the stop: several of these short steps.
    if named and not 1 <= int(named.group(1)) <= step:
        stage.wrong.append(f"step {named.group(1)} is named, which is after step {step}, in which it was stopped")
    if len({line.attempt for line in stage.lines()}) != 2:
        stage.wrong.append("the workers were not started a second time")


def stop_data_task(stage: Stage) -> None:
    """SIGSTOP to a data task that reads a shard: it is replaced, and the workers never stop."""
    settings = {"stuck_after_s": STUCK_AFTER_S}
    shard = stage.random.choice([name for name, size in zip(TRAIN_SHARDS, TRAIN_SIZES, strict=True) if size])
    command = stage.start(stage.config(data_task_stop=(shard, stage.marker()), settings=settings))
    stage.ends_well(command)
    stage.injected_by_marker()
    _noticed(stage, command, r"no sign of life .* data task \d+ .*last in reading .*train-\d+\.tar")
    stage.replayed, stage.worlds = 0, (2,)


def _noticed(stage: Stage, command: Command, pattern: str) -> re.Match[str] | None:
    """The watchdog's line must name the process and what it did, and the stacks must be kept. Returns: what matched."""
    output = command.log.read_text(errors="replace")
    found = re.search(pattern, output)
    if found is None:
        stage.wrong.append(f"no line matches {pattern!r}; the output ends: {output[-1000:]}")
        return None
    stage.notes.append(found.group(0)[:300])
    seconds = re.search(r"for (\d+) s", found.group(0))
    if seconds is None or float(seconds.group(1)) > NOTICED_S:
        stage.wrong.append(f"noticed later than {NOTICED_S:.0f} s: {found.group(0)[:300]}")
    stacks = storage.list_files(run_folder(stage.config().storage, stage.name).stuck)
    if not stacks:
        stage.wrong.append("no stacks were kept")
    return found


def out_of_memory(stage: Stage) -> None:
    """A worker takes memory until Ray ends it, on a node that may use little more than it does now."""
    memory = psutil.virtual_memory()
    limit = 1 - (memory.available - MEMORY_TO_SPARE) / memory.total
    stage.cluster.add_node(NODE_CPUS, {MEMORY_LIMIT: f"{limit:.4f}"})
    step = stage.random.randint(5, TOTAL_STEPS - 2)
    settings = {**ONE_PER_NODE, "max_failures": 3}
    faults = tuple(stage.step_fault(step, "balloon", rank) for rank in (0, 1))  # that on the node with the limit acts
    command = stage.start(stage.config(faults=faults, settings=settings))
    stage.ends_well(command)
    stage.injected_by_marker()
    stage.worlds = (2,)
    if len({line.attempt for line in stage.lines()}) < 2:
        stage.wrong.append("void: the workers did not feel it")
