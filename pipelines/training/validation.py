"""Validation on held-out data beside the training, and the best checkpoint.

Ray Train starts `validation_config` for a checkpoint that was reported with `validation=True`; the workers train on.

Which checkpoints are, is decided by `pipelines.training.validation_turn`.

1. watch     a task without reservations: waits for 2, turns whatever happens to it into a logged failure
2. validate  a task with the reservations: one whole model from the shards, its loss on held-out rows
3. keep      the checkpoint is copied to `{run}/best/` if no validated one has a lower loss (`keep_best`)

Two tasks, because Ray's controller (2.60) ends the whole training when the process of a validation is killed, and
waits for ever for one that the cluster has no room for. It also makes every validation that was ever asked for before
it ends a training, so 1 passes over those that newer ones wait behind, and gives up what lasts long beyond the last
step.

Ray's controller imports this module, so it loads neither torch nor transformers; what a validation needs travels as
bytes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import ray
import ray.cloudpickle
import ray.exceptions
import ray.train
from ray.train import ValidationConfig, ValidationTaskConfig

from pipelines.checkpoint.best import keep_best
from pipelines.checkpoint.local import local_copy
from pipelines.checkpoint.state import STATE_FILE, TrainState, load_state
from pipelines.compat.ray import parse_snapshot
from pipelines.io import storage
from pipelines.io.console import say_from_worker
from pipelines.io.run_folder import RunFolder
from pipelines.recovery.lease import LeaseToken
from pipelines.recovery.run_lock import Standing

if TYPE_CHECKING:
    import torch
    from ray.data import DataIterator, Dataset
    from transformers import PreTrainedModel

    from pipelines.data.schema import Row
    from pipelines.training.batches import Collate

PREFIX = "validation/"
FAILED = PREFIX + "failed"
PASSED_OVER = PREFIX + "passed_over"
POLL_S = 1.0
TOLD_AFTER_S = 15.0
"""Seconds after the last step after which people hear that a validation is waited for."""
BACKSTOP_S = 120.0  # beyond its own limit, for a watching task that hangs

Log = Callable[[Mapping[str, float], int], None]
"""Takes metrics and the checkpoint's step; must not fail, and should import little: a task without torch calls it."""


class ValidationError(RuntimeError):
    """A validation came to no result; the training goes on. The message names the checkpoint and the reason."""


@dataclass(frozen=True)
class Validation:
    """Everything that the validation of a checkpoint needs."""

    run: str
    """Folder of the run."""
    model_class: type[PreTrainedModel]
    """Class of the model in `init/`."""
    dtype: torch.dtype
    """Number format that the model trains in."""
    collate: Collate
    """Examples to the arguments of the model's forward."""
    pad_token_id: int
    """Token of a batch without any sample."""
    micro_batch: int
    """Samples that go through the model at a time; images are shuffled within them."""
    rows: int
    """Held-out rows to validate on, from the first on; a multiple of `micro_batch`."""
    data: Callable[[], Dataset]
    """The held-out stream."""
    iterate: Callable[[DataIterator, int], Iterator[Sequence[Row]]]
    """Rows of a stream, in groups of the given size."""
    loss_chunk: int | None = None
    """Supervised tokens whose logits exist at a time; None: those of all tokens."""
    lease: LeaseToken | None = None
    """The job's claim on the run, asked before anything is stored; None where nobody else can have it."""

    def __post_init__(self) -> None:
        if self.rows < 1 or self.rows % self.micro_batch:
            raise ValueError(f"{self.rows} rows to validate on are no multiple of micro_batch {self.micro_batch}")


def validation_config(
    validation: Validation,
    *,
    cpus: float,
    gpus: float,
    timeout_s: float,
    log: Log | None,
    wait_s: float = inf,
    standing: Callable[[], Standing] = Standing,
) -> ValidationConfig:
    """The argument `validation_config` of `TorchTrainer`.

    Args:
        validation: what is measured on a checkpoint.
        cpus: that a validation reserves; its data tasks reserve their own.
        gpus: that it reserves; above 0 the model runs on a GPU.
        timeout_s: seconds after which a validation is given up, those it waits for resources included.
        log: gets the metrics of every validation (`validation/failed` is 0 or 1), in a task's process.
        wait_s: seconds after the last step after which it is given up, whenever it began.
        standing: whether the training has failed or ended. Ray's controller ends only after its validations: a restart
            would wait for them. They stop instead, and Ray makes them when the training goes on.
    """
    asked = _Asked(validation.run, ray.cloudpickle.dumps(validation), cpus, gpus, timeout_s, wait_s)
    return ValidationConfig(
        fn=partial(_watch, asked=asked, log_bytes=ray.cloudpickle.dumps(log), standing=standing),
        task_config=ValidationTaskConfig(timeout_s=timeout_s + BACKSTOP_S),
        ray_remote_kwargs={"num_cpus": 0},  # it waits only; Ray repeats it if its process or its node dies
    )


# ------------------------------------------------------------------------------------------------------------ the tasks


@dataclass(frozen=True)
class _Asked:
    """What a watching task needs."""

    run: str
    payload: bytes
    cpus: float
    gpus: float
    timeout_s: float
    wait_s: float


class _EndedError(ray.exceptions.RayError):
    """The training ended long enough ago."""


def _watch(
    checkpoint: ray.train.Checkpoint, *, asked: _Asked, log_bytes: bytes, standing: Callable[[], Standing]
) -> dict[str, float]:
    log: Log | None = ray.cloudpickle.loads(log_bytes)
    name = PurePosixPath(checkpoint.path).name
    if (newer := _newer(asked.run, name)) is not None:
        say_from_worker(f"  {name} is not validated: {newer}, which is newer, waits for its validation")
        if log is not None:
            log({PASSED_OVER: 1.0}, _step_of(checkpoint))
        return {PASSED_OVER: 1.0}
    # No retry: a validation that ran out of memory once would do so again.
    options = _validate_task.options(num_cpus=asked.cpus, num_gpus=asked.gpus, max_retries=0)
    task = options.remote(checkpoint, asked.payload, asked.gpus > 0)
    try:
        metrics, step = _result(task, asked, standing)
    except ray.exceptions.TaskCancelledError:
        raise  # the training is aborted: Ray validates this checkpoint when the run goes on
    except ray.exceptions.RayError as error:
        ray.cancel(task, force=True)
        failure = f"the validation of {name} {_reason(error, asked)}"
        say_from_worker(f"  warning: {failure}; the training goes on")
        if log is not None:
            log({FAILED: 1.0}, _step_of(checkpoint))
        raise ValidationError(failure) from error
    if log is not None:
        log(metrics, step)
    return dict(metrics)


def _newer(run: str, name: str) -> str | None:
    """A newer checkpoint that waits for its validation; a queue comes from a start before, or an earlier version."""
    try:
        pending = parse_snapshot(storage.read_bytes(RunFolder(run).snapshot)).pending
    except ValueError:  # storage fails, or there is no such file: then this one is validated
        return None
    return pending[-1] if name in pending[:-1] else None


def _result(task: ray.ObjectRef, asked: _Asked, standing: Callable[[], Standing]) -> tuple[dict[str, float], int]:
    deadline, told = time.monotonic() + asked.timeout_s, False
    while not ray.wait([task], timeout=min(POLL_S, asked.timeout_s))[0]:
        now = standing()
        if now.failed:
            ray.cancel(task, force=True)
            raise ray.exceptions.TaskCancelledError
        if now.ended_s is not None and now.ended_s > asked.wait_s:
            raise _EndedError
        if now.ended_s is not None and now.ended_s > TOLD_AFTER_S and not told:
            told = True
            say_from_worker(f"  all steps are made; a validation still runs and has {asked.wait_s:.0f} s from then on")
        if time.monotonic() > deadline:
            raise ray.exceptions.GetTimeoutError
    result: tuple[dict[str, float], int] = ray.get(task)
    return result


def _reason(error: ray.exceptions.RayError, asked: _Asked) -> str:
    if isinstance(error, _EndedError):
        return f"was given up {asked.wait_s:.0f} s after the last step (training.validation_wait_s)"
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return (
            f"was given up after {asked.timeout_s:.0f} s: it ran too long, or the cluster never had {asked.cpus} CPUs "
            f"and {asked.gpus} GPUs free for it, or none for its data tasks"
        )
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return f"failed: {type(cause).__name__}: {cause}"


def _step_of(checkpoint: ray.train.Checkpoint) -> int:
    path = f"{checkpoint.path}/{STATE_FILE}"
    with checkpoint.filesystem.open_input_file(path) as stream:
        return TrainState.from_json(bytes(stream.read()).decode(), path).step


@ray.remote
def _validate_task(checkpoint: ray.train.Checkpoint, payload: bytes, use_gpu: bool) -> tuple[dict[str, float], int]:
    validation: Validation = ray.cloudpickle.loads(payload)
    metrics, step = validate(checkpoint, validation, use_gpu)
    url = RunFolder(validation.run).checkpoint(PurePosixPath(checkpoint.path).name)
    if validation.lease is not None:
        validation.lease.require()
    keep_best(validation.run, url, step, heldout_metrics(metrics))
    return metrics, step


def heldout_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a validation that are of the model, under the names that the end of a training gives them."""
    names = {name: name.removeprefix(PREFIX) for name in metrics if name.startswith(PREFIX + "heldout_")}
    return {short: metrics[name] for name, short in names.items()}


def validate(checkpoint: ray.train.Checkpoint, validation: Validation, use_gpu: bool) -> tuple[dict[str, float], int]:
    """The held-out loss of one checkpoint, on any node.

    Returns:
        metrics as of `pipelines.training.heldout_loss.evaluate_heldout`, and the seconds all of it took, their names
        after `validation/`; and the checkpoint's optimizer step.

    Raises:
        CheckpointError, StorageError: if the checkpoint is damaged or storage fails.
    """
    import torch

    from pipelines.checkpoint.consolidate import consolidate
    from pipelines.checkpoint.shards import ZeroFiles
    from pipelines.training.batches import BatchReader, Share
    from pipelines.training.heldout_loss import heldout_loss

    started = time.monotonic()
    device = torch.device("cuda" if use_gpu else "cpu")
    url = RunFolder(validation.run).checkpoint(PurePosixPath(checkpoint.path).name)
    with local_copy(url, keep=False) as directory:  # a later validation is one of another checkpoint
        step = load_state(directory).step
        with local_copy(RunFolder(validation.run).init, weights=ZeroFiles(directory).needs_start) as init:
            model = consolidate(directory, validation.model_class, init, validation.dtype)
    model.to(device)
    share = Share(rank=0, world=1, per_step=1)
    reader = BatchReader(validation.collate, validation.pad_token_id, validation.micro_batch, share)
    rows = validation.iterate(validation.data().iterator(), validation.micro_batch)
    batches = itertools.chain.from_iterable(reader.read(rows, 0, validation.rows))
    metrics = heldout_loss(model, batches, device, validation.loss_chunk)
    named = {PREFIX + name: value for name, value in metrics.items()}
    return {**named, PREFIX + "seconds": time.monotonic() - started, FAILED: 0.0}, step
