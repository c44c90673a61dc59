"""Scenarios that damage the data.

The training must end in an error that names the shard; then the shard is restored and the same command goes on.
"""

from __future__ import annotations

import os
import signal

from benchmarks.chaos.data import FAULTY, TRAIN_SIZES, Dataset, key_of, keys_in, pack, sample
from benchmarks.chaos.stage import Stage
from pipelines.io import storage


def _victim(stage: Stage) -> str:
    """A train shard that has samples."""
    filled = [place for place, size in enumerate(TRAIN_SIZES) if size]
    return f"train-{stage.random.choice(filled):06d}.tar"


def _damaged(stage: Stage, name: str, data: bytes, fault: str, claims: dict[str, bytes] | None = None) -> None:
    """Damage one shard, see the error, restore it, and go on."""
    dataset = stage.own_dataset(claims)
    _put(dataset, name, data)
    stage.fails(stage.config(), name, fault)
    dataset.restore(name)
    stage.injected()  # from the moment at which it can go on
    stage.notes.insert(0, f"{name}, before the first step")
    stage.finish(stage.config())


def _damaged_midway(stage: Stage, name: str, data: bytes | None, fault: str) -> None:
    """The same, but the shard is damaged (None: removed) after some steps.

    It is met when a worker is killed and all read on.
    """
    dataset = stage.own_dataset()
    step = stage.random.randint(5, 7)
    config = stage.config(faults=(stage.step_fault(step, "hold"),), settings={"max_failures": 1})
    command, _ = stage.hold(config, step)
    _put(dataset, name, data)
    os.kill(stage.pid_of(rank=1), signal.SIGKILL)
    stage.ends_in_error(command, name, fault)
    dataset.restore(name)
    stage.injected(2)
    stage.notes.insert(0, f"{name}, after step {step}")
    stage.finish(config)


def _put(dataset: Dataset, name: str, data: bytes | None) -> None:
    if data is None:
        storage.delete(storage.join(dataset.url, name))
    else:
        dataset.put(name, data)


def truncated_shard(stage: Stage) -> None:
    """The object ends before the tar does."""
    name = _victim(stage)
    whole = stage.dataset.shards[name]
    _damaged_midway(stage, name, whole[: len(whole) * 6 // 10], "truncated")


def replaced_shard(stage: Stage) -> None:
    """Another whole tar of as many samples lies in its place; the manifest is from before."""
    name = _victim(stage)
    count = len(keys_in(stage.dataset.shards[name]))
    other = pack((key_of(90000 + number), sample(90000 + number)) for number in range(count))
    _damaged_midway(stage, name, other, "replaced")


def duplicated_key(stage: Stage) -> None:
    """The last sample of the shard has the key of its first one, and the manifest was made of that."""
    name = _victim(stage)
    keys = keys_in(stage.dataset.shards[name])
    numbers = [int(key.removeprefix("sample")) for key in keys]
    twice = pack((key_of(number), sample(number)) for number in [*numbers[:-1], numbers[0]])
    _damaged(stage, name, twice, "is there twice", claims={name: twice})


def empty_shard(stage: Stage) -> None:
    """The object has no bytes.

    A shard without samples that the manifest knows of is part of every scenario.
    """
    _damaged(stage, _victim(stage), b"", "not a tar")


def missing_shard(stage: Stage) -> None:
    """The object is gone."""
    _damaged_midway(stage, _victim(stage), None, "missing")


def dropped_shard(stage: Stage) -> None:
    """The same as a replaced shard under the policy "drop": the training ends well and names every sample given up."""
    faulty = {key_of(number) for number in FAULTY}
    name = _victim(stage)
    while faulty & set(keys_in(stage.dataset.shards[name])):  # a sample is dropped for one reason
        name = _victim(stage)
    keys = keys_in(stage.dataset.shards[name])
    dataset = stage.own_dataset()
    dataset.put(name, pack((key_of(90000 + number), sample(90000 + number)) for number in range(len(keys))))
    stage.injected()
    stage.given_up = {key: f"{name}[{index}]" for index, key in enumerate(keys)}
    stage.finish(stage.config(bad_shards="drop", settings={"max_drop_share": 0.2}))
    dataset.restore(name)  # what the audit reads are the shards as they are to be
    stage.notes.append(f"{name}: {len(keys)} samples given up in each of the epochs, counted and listed")
