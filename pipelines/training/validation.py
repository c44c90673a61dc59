"""Validation on held-out data beside the training, and the best checkpoint.

Ray Train starts `validation_config` for a checkpoint that was reported with `validation=True`; the workers train on.

1. watch     a task without reservations: waits for 2, turns whatever happens to it into a logged failure
2. validate  a task with the reservations: one whole model from the shards, its loss on held-out rows
3. keep      the checkpoint is copied to `{run}/best/` if no validated one has a lower loss (`keep_best`)

Two tasks, because Ray's controller (2.60) ends the whole training when the process of a validation is killed, and
waits for ever for one that the cluster has no room for.

Ray's controller imports this module, so it loads neither torch nor transformers; what a validation needs travels as
bytes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from pipelines.io.console import say_from_worker
from pipelines.io.run_folder import RunFolder
from pipelines.recovery.lease import LeaseToken

if TYPE_CHECKING:
    import torch
    from ray.data import DataIterator, Dataset
    from transformers import PreTrainedModel

    from pipelines.data.schema import Row
    from pipelines.training.batches import Collate

PREFIX = "validation/"
FAILED = PREFIX + "failed"
POLL_S = 1.0
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
    abandoned: Callable[[], bool] = bool,
) -> ValidationConfig:
    """The argument `validation_config` of `TorchTrainer`.

    Args:
        validation: what is measured on a checkpoint.
        cpus: that a validation reserves; its data tasks reserve their own.
        gpus: that it reserves; above 0 the model runs on a GPU.
        timeout_s: seconds after which a validation is given up, those it waits for resources included.
        log: gets the metrics of every validation (`validation/failed` is 0 or 1), in a task's process.
        abandoned: whether the training has failed. Ray's controller ends only after its validations: a restart would
            wait for them. They stop instead, and Ray makes them when the training goes on.
    """
    payload, log_bytes = ray.cloudpickle.dumps(validation), ray.cloudpickle.dumps(log)
    watch = partial(_watch, payload=payload, log_bytes=log_bytes, cpus=cpus, gpus=gpus, timeout_s=timeout_s)
    return ValidationConfig(
        fn=partial(watch, abandoned=abandoned),
        task_config=ValidationTaskConfig(timeout_s=timeout_s + BACKSTOP_S),
        ray_remote_kwargs={"num_cpus": 0},  # it waits only; Ray repeats it if its process or its node dies
    )


# ------------------------------------------------------------------------------------------------------------ the tasks


def _watch(
    checkpoint: ray.train.Checkpoint,
    *,
    payload: bytes,
    log_bytes: bytes,
    cpus: float,
    gpus: float,
    timeout_s: float,
    abandoned: Callable[[], bool],
) -> dict[str, float]:
    log: Log | None = ray.cloudpickle.loads(log_bytes)
    name = PurePosixPath(checkpoint.path).name
    # No retry: a validation that ran out of memory once would do so again.
    task = _validate_task.options(num_cpus=cpus, num_gpus=gpus, max_retries=0).remote(checkpoint, payload, gpus > 0)
    try:
        metrics, step = _result(task, timeout_s, abandoned)
    except ray.exceptions.TaskCancelledError:
        raise  # the training is aborted: Ray validates this checkpoint when the run goes on
    except ray.exceptions.RayError as error:
        ray.cancel(task, force=True)
        failure = f"the validation of {name} {_reason(error, cpus, gpus, timeout_s)}"
        say_from_worker(f"  warning: {failure}; the training goes on")
        if log is not None:
            log({FAILED: 1.0}, _step_of(checkpoint))
        raise ValidationError(failure) from error
    if log is not None:
        log(metrics, step)
    return dict(metrics)


def _result(task: ray.ObjectRef, timeout_s: float, abandoned: Callable[[], bool]) -> tuple[dict[str, float], int]:
    deadline = time.monotonic() + timeout_s
    while not ray.wait([task], timeout=min(POLL_S, timeout_s))[0]:
        if abandoned():
            ray.cancel(task, force=True)
            raise ray.exceptions.TaskCancelledError
        if time.monotonic() > deadline:
            raise ray.exceptions.GetTimeoutError
    result: tuple[dict[str, float], int] = ray.get(task)
    return result


def _reason(error: ray.exceptions.RayError, cpus: float, gpus: float, timeout_s: float) -> str:
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return (
            f"was given up after {timeout_s:.0f} s: it ran too long, or the cluster never had {cpus} CPUs and {gpus} "
            "GPUs free for it, or none for its data tasks"
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
    with local_copy(url) as directory:
        step = load_state(directory).step
        with local_copy(RunFolder(validation.run).init, weights=ZeroFiles(directory).needs_start) as init:
            model = consolidate(directory, validation.model_class, init, validation.dtype)
    model.to(device)
    share = Share(rank=0, world=1, per_step=1)
    reader = BatchReader(validation.collate, validation.pad_token_id, validation.micro_batch, share)
    rows = validation.iterate(validation.data().iterator(), validation.micro_batch)
    batches = itertools.chain.from_iterable(reader.read(rows, 0, validation.rows))
    metrics = heldout_loss(model, batches, device)
    named = {PREFIX + name: value for name, value in metrics.items()}
    return {**named, PREFIX + "seconds": time.monotonic() - started, FAILED: 0.0}, step
