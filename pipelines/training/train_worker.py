"""What every worker of a training does.

1. join       threads and DeepSpeed, in the process group that Ray Train made; the first rows are asked for
2. load       the start model from `init/`, its parameters partitioned over the workers
3. optimise   AdamW with one group per trained part, inside the ZeRO-3 engine
4. resume     weights, optimizer and counts from the checkpoint that the stream starts at, of any number of workers
5. step       until the last step: read, count, forward and backward, update, report (`Loop.run`)
6. hold out   loss with the true and with shuffled images, and the parity batch
7. finish     the last checkpoint, with everything of 6
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import ray.cloudpickle
import ray.train
import torch

from pipelines.checkpoint.local import local_copy
from pipelines.checkpoint.lora import add_adapters
from pipelines.checkpoint.losses import LossLog
from pipelines.checkpoint.reshard import load_resharded
from pipelines.checkpoint.start_weights import StartWeights
from pipelines.checkpoint.state import POINTS_FILE, TrainState, load_ledger, load_state
from pipelines.checkpoint.zero3 import (
    adamw,
    checkpoint_activations,
    deepspeed_config,
    load_sharded,
    parameter_groups,
    weight_dtype,
)
from pipelines.compat.deepspeed import ignore_deprecated_collectives, import_deepspeed
from pipelines.compat.ray import log_no_reports
from pipelines.data.ledger import Ledger
from pipelines.data.schema import Row
from pipelines.io.console import warn_from_worker
from pipelines.io.pulse import Phase, mark, pulse
from pipelines.io.run_folder import RunFolder
from pipelines.io.upload import CheckpointUpload
from pipelines.recovery.lease import LeaseToken
from pipelines.recovery.preemption import PreemptionWatch
from pipelines.tracking.metric_points import MetricPoint, points_from_jsonl
from pipelines.training.batches import BatchReader, MicroBatch, Share, first_ahead
from pipelines.training.checkpoint_saver import CheckpointSaver
from pipelines.training.heldout_loss import evaluate_heldout
from pipelines.training.job import TrainingJob
from pipelines.training.loop import Loop, last_sample
from pipelines.training.pace import Device, Pace
from pipelines.training.peak import peak_flops
from pipelines.training.validation_turn import ValidationTurn
from pipelines.training.worker import Worker

ABANDONED_S = 2.0
"""Seconds that a worker which failed gives its metrics."""


def train_worker(config: Mapping[str, Any]) -> None:
    """What every worker runs; the steps are those at the top."""
    job: TrainingJob = ray.cloudpickle.loads(config["job"])
    lease: LeaseToken = ray.cloudpickle.loads(config["lease"])
    settings = job.settings
    # 1. join
    warn_from_worker()
    log_no_reports()
    ignore_deprecated_collectives()
    if not settings.uses_gpu:
        torch.set_num_threads(settings.threads_per_worker)
    # The data tasks start while the model is loaded; where they begin was settled before the workers were started.
    rows = first_ahead(job.iterate(ray.train.get_dataset_shard("train"), settings.micro_batch))
    import_deepspeed(settings.uses_gpu).init_distributed(
        dist_backend="nccl" if settings.uses_gpu else "gloo", verbose=False
    )
    worker = _make_worker(job)
    # 4. resume
    mark(Phase.LOAD, detail="the checkpoint")
    start = _resume(worker, job)
    logger = job.make_logger(start.points) if job.make_logger and worker.rank == 0 else None
    loop = Loop(
        settings,
        job.plan.total_samples,
        worker,
        start.state,
        _saver(job, worker, start, lease),
        PreemptionWatch(worker.rank, settings.preemption_grace_s),
        logger,
        job.observe,
        pulse(),
        Pace(None if job.flops is None else Device(job.flops, peak_flops(worker.device, weight_dtype(settings)))),
    )
    try:
        _steps(job, loop, rows)
    except BaseException:
        if logger is not None:
            logger.close(ABANDONED_S)
        raise
    finally:
        mark(Phase.ENDED)


def _make_worker(job: TrainingJob) -> Worker:
    """This process as a worker: the start model partitioned over all of them, inside the engine."""
    settings = job.settings
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # 2. load
    mark(Phase.LOAD, detail="the start model")
    config = deepspeed_config(settings.at_world(world))
    with local_copy(RunFolder(job.url).init) as directory:
        model = load_sharded(job.model_class, directory, config, weight_dtype(settings), settings.uses_gpu)
        start = StartWeights(directory).digest
    if settings.lora.rank is not None:
        add_adapters(model, settings.lora, settings.seed)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    # 3. optimise
    optimizer = adamw(parameter_groups(model, settings.optimizer, settings.lora.rank is not None), settings)
    deepspeed = import_deepspeed(settings.uses_gpu)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return Worker(engine, rank, world, start)


def _steps(job: TrainingJob, loop: Loop, rows: Iterator[Sequence[Row]]) -> None:
    """Steps 5 to 7 of a worker, from its share of the training rows on."""
    settings, rank, world = job.settings, loop.worker.rank, loop.worker.world
    # 5. step
    share = Share(rank, world, settings.micro_batches_per_step)
    by_length = settings.batching == "length"
    reader = BatchReader(job.collate, job.pad_token_id, settings.micro_batch, share, by_length, job.packing)
    loop.run(reader.read(rows, loop.state.rows, job.plan.total_rows))
    # 6. hold out
    # Not split: each worker streams all held-out rows and takes its own, so no worker can make the others wait.
    mark(Phase.VALIDATION, 0, "the first batch")
    heldout_rows = itertools.islice(
        job.iterate(ray.train.get_dataset_shard("heldout"), settings.micro_batch), rank, None, world
    )
    heldout = BatchReader(job.collate, job.pad_token_id, settings.micro_batch, Share(rank, world, world))
    batches = itertools.chain.from_iterable(heldout.read(heldout_rows, 0, job.heldout_rows))
    final, parity = evaluate_heldout(loop.worker.engine, _marked(batches), settings.precision, settings.loss_chunk)
    # 7. finish
    loop.finish(final, parity)


def _marked(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The same batches; each that is asked for is progress."""
    for batch in batches:
        mark(Phase.VALIDATION, detail=last_sample([batch]))
        yield batch


@dataclass(frozen=True)
class ResumePoint:
    """Where a worker begins."""

    state: TrainState
    """The counts."""
    ledger: Ledger
    """The samples that are consumed; worker 0 alone knows."""
    losses: LossLog
    """Losses that no file holds."""
    points: list[MetricPoint]
    """Metrics that were not delivered."""


def _resume(worker: Worker, job: TrainingJob) -> ResumePoint:
    """Load the newest checkpoint into the worker's engine.

    Raises:
        CheckpointError: if the samples that were trained are not those that the plan puts before it.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        state = dataclasses.replace(job.start_state(), world_size=worker.world)
        return ResumePoint(state, Ledger(job.plan.sizes), LossLog(state), [])
    url = RunFolder(job.url).checkpoint(PurePosixPath(checkpoint.path).name)
    with local_copy(url) as directory:
        state = load_state(directory)
        ledger = Ledger(job.plan.sizes)
        if worker.rank == 0:
            ledger = load_ledger(directory, job.plan.sizes)
            ledger.require_equal(job.plan.consumed(state.rows), f"the checkpoint of step {state.step}")
        load_resharded(worker.engine, directory, worker.start)
        points = points_from_jsonl((directory / POINTS_FILE).read_text(), POINTS_FILE)
    losses = LossLog(state)
    state = dataclasses.replace(state, world_size=worker.world, restarts=state.restarts + 1, losses_in_version_2=())
    return ResumePoint(state, ledger, losses, points)


def _saver(job: TrainingJob, worker: Worker, start: ResumePoint, lease: LeaseToken) -> CheckpointSaver:
    settings = job.settings
    return CheckpointSaver(
        worker=worker,
        run_url=job.url,
        precision=settings.precision,
        lora_scale=settings.lora.scale,
        recipe=job.recipe,
        ledger=start.ledger,
        losses=start.losses,
        upload=CheckpointUpload(RunFolder(job.url).train, settings.upload_patience_s, worker.rank, worker.world),
        retry_s=settings.upload_patience_s,
        require_lease=lease.require,
        validation=ValidationTurn(settings.validate_every_checkpoints),
        saved=start.state.step // settings.checkpoint_every_steps,
    )
