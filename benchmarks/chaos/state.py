"""Scenarios of the run's own state: damaged checkpoints, a lost snapshot, a second cluster, a full local disk."""

from __future__ import annotations

import re

from benchmarks.chaos.processes import LASTING_STEP_S
from benchmarks.chaos.stage import STORAGE, Stage
from benchmarks.chaos.workload import SETTINGS
from infra.faults import Flip, Rule
from pipelines.checkpoint.committed import latest_checkpoint
from pipelines.io import storage
from pipelines.io.run_folder import run_folder

SECOND_CHECKPOINT = 2 * SETTINGS.checkpoint_every_steps


def _stopped_after_two_checkpoints(stage: Stage) -> int:
    """SIGKILL to the driver once the second checkpoint is committed; the steps that are rolled back."""
    step = stage.random.randint(SECOND_CHECKPOINT + 1, SECOND_CHECKPOINT + SETTINGS.checkpoint_every_steps - 1)
    command, rolled_back = stage.hold(stage.config(faults=(stage.step_fault(step, "hold"),)), step)
    command.kill()
    stage.notes.append(f"driver killed after step {step}")
    return rolled_back


def damaged_on_the_wire(stage: Stage) -> None:
    """Reads of the checkpoint meet wrong bytes; they are read again."""
    stage.replayed = _stopped_after_two_checkpoints(stage)
    proxy = stage.cluster.proxy
    before = len(proxy.injected)
    proxy.add(
        Rule(Flip(0.5, 4), method="GET", path=r"/train/step-.*\.pt", times=3),
        Rule(Flip(0.5, 4), method="GET", path=r"/train/step-.*ledger", times=2),
    )
    try:
        stage.finish(stage.config())
    finally:
        proxy.clear()
    for one in proxy.injected[before:]:
        stage.injected(1, one.time)


def damaged_at_rest(stage: Stage) -> None:
    """A byte of the newest checkpoint's weights changes; the one before is resumed from."""
    rolled_back = _stopped_after_two_checkpoints(stage)
    checkpoint = latest_checkpoint(STORAGE, stage.name)
    assert checkpoint is not None
    names = [name for name in storage.list_files(checkpoint.url) if name.endswith("optim_states.pt")]
    url = storage.join(checkpoint.url, stage.random.choice(names))
    data = bytearray(storage.read_bytes(url))
    data[stage.random.randrange(len(data))] ^= 1
    storage.write_bytes(url, bytes(data))
    stage.injected()
    stage.replayed = rolled_back + SETTINGS.checkpoint_every_steps
    stage.notes.append(f"one bit of {url.rpartition('/')[2]}")
    stage.finish(stage.config())


def lost_snapshot(stage: Stage) -> None:
    """Ray's list of committed checkpoints is gone: refused, and brought back by naming the step."""
    stage.replayed = _stopped_after_two_checkpoints(stage)
    run = run_folder(STORAGE, stage.name)
    storage.delete(run.snapshot)
    stage.fails(stage.config(), "is gone", "Nothing was removed", f"--run.resume-step {SECOND_CHECKPOINT}")
    stage.injected()
    stage.finish(stage.config(resume_step=SECOND_CHECKPOINT))


def second_cluster(stage: Stage) -> None:
    """The same run from a Ray cluster of its own: refused by name, and the first is not disturbed."""
    step = stage.random.randint(5, 8)
    config = stage.config(faults=(stage.step_fault(step, "hold"),), step_seconds=LASTING_STEP_S)
    command, _ = stage.hold(config, step)
    stage.replayed = 0
    stage.injected()
    stage.fails(stage.config(ray_address="local"), "is being trained by another job", f"process {command.process.pid}")
    stage.release()
    stage.ends_well(command)


def full_local_disk(stage: Stage) -> None:
    """A worker's disk has no room for its next checkpoint: said by folder and need, then begun again elsewhere."""
    step = stage.random.randint(SETTINGS.checkpoint_every_steps + 1, SECOND_CHECKPOINT - 1)
    faults = (stage.step_fault(step, "fill", stage.random.randint(0, 1)),)
    command = stage.start(stage.config(faults=faults, settings={"max_failures": 1}))
    stage.ends_well(command)
    stage.injected_by_marker()
    stage.worlds = (2,)
    found = re.search(r"no room on this machine for [^\n]*Make room", command.log.read_text(errors="replace"))
    if found is None:
        stage.wrong.append(f"no line says which disk has no room: {command.tail(1000)}")
    else:
        stage.notes.append(found.group(0)[:300])
