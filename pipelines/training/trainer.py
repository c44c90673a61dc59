"""Training of one model with DeepSpeed ZeRO-3 on Ray Train workers.

`fit` runs on the driver. Each worker goes through these steps (`train_worker`):

    1. join       threads and DeepSpeed, in the process group that Ray Train made
    2. load       the start model from `init/`, its parameters partitioned over the workers
    3. optimise   AdamW with one group per trained part, inside the ZeRO-3 engine
    4. resume     weights, optimizer and counts from the checkpoint that the data stream starts at, too, whatever the
                  number of workers that wrote it
    5. step       until the last step: read, count, forward and backward, update, report (`Loop.run`)
    6. hold out   loss with the true and with shuffled images, and the parity batch
    7. finish     the last checkpoint, with everything of 6

The position of a training is its number of optimizer steps: step g consumes rows [g * G, (g + 1) * G) of the plan, G
being the global batch. Re-using the name of a run continues it from its newest checkpoint, on as many workers as
there are then. Workers that fail are started again by `fit` itself (`pipelines.recovery.restart_policy`).
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray.cloudpickle
import ray.data
import ray.exceptions
import ray.train
import torch
from ray.train.torch import TorchTrainer
from transformers import PreTrainedModel

from pipelines.checkpoint.committed import (
    CheckpointRef,
    latest_checkpoint,
    remaining_stream,
    remove_uncommitted,
)
from pipelines.checkpoint.local import local_copy
from pipelines.checkpoint.losses import LossLog
from pipelines.checkpoint.reshard import load_resharded
from pipelines.checkpoint.state import POINTS_FILE, CheckpointError, TrainState, load_ledger, load_state
from pipelines.checkpoint.zero3 import (
    checkpoint_activations,
    deepspeed_config,
    load_sharded,
    parameter_groups,
    weight_dtype,
)
from pipelines.compat.deepspeed import ignore_deprecated_collectives, import_deepspeed
from pipelines.compat.ray import log_no_reports
from pipelines.compat.ray_torch import StartHookTorchConfig
from pipelines.config.settings import SettingsError, TrainingSettings
from pipelines.data.ledger import Ledger
from pipelines.data.sample_id import Int64s
from pipelines.data.schema import Row
from pipelines.io import storage
from pipelines.io.console import say, warn_from_worker
from pipelines.io.run_folder import TRAIN_NAME, RunFolder, run_folder
from pipelines.io.upload import CheckpointUpload
from pipelines.recovery.failures import TrainingError, root_cause
from pipelines.recovery.preemption import PreemptionWatch, listen
from pipelines.recovery.restart_policy import RestartPolicy
from pipelines.recovery.run_lock import FailureCallback, RunLock, lock_run
from pipelines.tracking.metric_points import MetricPoint, points_from_jsonl
from pipelines.training.batches import BatchReader, Collate, Share
from pipelines.training.checkpoint_saver import CheckpointSaver
from pipelines.training.heldout_loss import evaluate_heldout
from pipelines.training.loop import Loop, MetricLogger, Observer
from pipelines.training.validation import Log, Validation, validation_config
from pipelines.training.worker import Worker

ABANDONED_S = 2.0
"""Seconds that a worker which failed gives its metrics."""


class Plan(Protocol):
    """The order of a training's data (`pipelines.data.order`, `pipelines.data.mixture`)."""

    @property
    def total_rows(self) -> int:
        """Rows of the stream, void ones included; a multiple of the global batch."""

    @property
    def total_samples(self) -> int:
        """Samples of all epochs."""

    @property
    def sizes(self) -> Sequence[Sequence[int] | Int64s]:
        """Samples of every shard, by dataset."""

    def consumed(self, rows: int) -> Ledger:
        """The samples of the first `rows` rows."""


@dataclass(frozen=True)
class TrainingJob:
    """Everything that a training needs; it travels to the controller and to every worker."""

    storage: str
    """Root of the object store; the run lives in `{storage}/runs/{run_name}`."""
    run_name: str
    """Name of the run; re-using one continues it."""
    settings: TrainingSettings
    """Sizes, optimizer, resources."""
    model_class: type[PreTrainedModel]
    """Class of the model in `init/`."""
    collate: Collate
    """Examples to the arguments of the model's forward."""
    pad_token_id: int
    """Token of a batch without any sample."""
    plan: Plan
    """The order of the training data."""
    train_data: Callable[[int], ray.data.Dataset]
    """The stream from a given row of the plan on."""
    heldout_rows: int
    """Rows of the held-out stream, void ones included; a multiple of micro_batch."""
    heldout_data: Callable[[], ray.data.Dataset]
    """The held-out stream."""
    iterate: Callable[[ray.data.DataIterator, int], Iterator[Sequence[Row]]]
    """Rows of one worker's share of a stream, in groups of the given size."""
    data_config: ray.train.DataConfig
    """How the dataset "train" is split between the workers, in order; "heldout" must not be split."""
    recipe: Mapping[str, Any]
    """Every setting of the run, kept in every checkpoint."""
    recipe_hash: str
    """Hash of the settings that decide the result."""
    mlflow_run_id: str | None = None
    """The MLflow run that the metrics go to; kept in every checkpoint."""
    make_logger: Callable[[Sequence[MetricPoint]], MetricLogger] | None = None
    """Makes rank 0's logger, at every start of the workers, from the metrics that the checkpoint still held."""
    log_validation: Log | None = None
    """Gets the metrics of every validation during training (picklable)."""
    observe: Observer | None = None
    """Told of every step on every worker (picklable); for audits."""

    def __post_init__(self) -> None:
        settings = self.settings
        if self.heldout_rows < 1 or self.heldout_rows % settings.micro_batch:
            raise SettingsError(
                f"heldout_rows {self.heldout_rows} is no multiple of micro_batch {settings.micro_batch}"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.plan.total_rows // self.settings.global_batch

    @property
    def url(self) -> str:
        """The folder of the run."""
        return run_folder(self.storage, self.run_name).url

    def start_state(self) -> TrainState:
        """The state before the first step; an elastic training may begin on fewer workers."""
        return TrainState(
            self.recipe_hash,
            self.settings.workers,
            self.total_steps,
            self.mlflow_run_id,
            seed=self.settings.seed,
        )


@dataclass(frozen=True)
class TrainingResult:
    """A finished training."""

    checkpoint: CheckpointRef
    """The last checkpoint, with its `TrainState`."""
    steps_trained: int
    """Steps made by this call; 0 if the run had ended before."""


# ---------------------------------------------------------------------------------------------------------- the driver


def fit(job: TrainingJob) -> TrainingResult:
    """Train, or continue, run `job.run_name`; returns at once if it has ended already. Ray must be initialised.

    Raises:
        CheckpointError: if the run was started with other settings.
        RunInUseError: if another job trains the run.
        ValueError: what a worker or a data task raised, as it raised it (TooManyDroppedError, StreamOrderError, ...).
        TrainingError: any other failure, `max_failures` times in a row, with the worker and the reason.
    """
    before = latest_checkpoint(job.storage, job.run_name)
    if before is not None:
        check_resumable(job, before)
        if before.state.done:
            return TrainingResult(before, 0)
    with lock_run(job.url, f"run {job.run_name!r}") as lock:
        after = _train(job, lock)
    return TrainingResult(after, after.state.step - (before.state.step if before else 0))


def _train(job: TrainingJob, lock: RunLock) -> CheckpointRef:
    """Start the workers until the last checkpoint is committed."""
    subject = f"run {job.run_name!r}"
    policy = RestartPolicy(job.settings.max_failures)
    for attempt in itertools.count():
        remove_uncommitted(job.storage, job.run_name)
        cause: Exception | None = None
        try:
            _trainer(job, dataclasses.replace(lock, attempt=attempt)).fit()
        except ray.train.TrainingFailedError as error:
            cause = root_cause(error, subject)
        except ray.exceptions.RayActorError as error:
            # No restart: an interrupt of the driver may look the same.
            raise TrainingError(subject, f"Ray's controller of the training ended: {error}") from error
        reached = latest_checkpoint(job.storage, job.run_name)
        if reached is not None and reached.state.done:
            return reached  # what failed then, failed after the last step
        if cause is None:
            raise CheckpointError(f"{subject} ended without its last checkpoint in {job.url}")
        restart = policy.after(cause, reached.state.step if reached else -1)
        say(f"  {restart.reason}")
        time.sleep(restart.pause_s)
    raise AssertionError("attempts have no end")


def check_resumable(job: TrainingJob, checkpoint: CheckpointRef) -> None:
    """Refuse to continue a run that `job` would continue differently.

    Raises:
        CheckpointError: naming both sides.
    """
    state = checkpoint.state
    if state.recipe_hash != job.recipe_hash:
        raise CheckpointError(
            f"run {job.run_name!r} was started with recipe {state.recipe_hash}, now it is {job.recipe_hash}: use the "
            f"settings in {storage.join(job.url, 'recipe.json')}, or another run name"
        )
    if state.total_steps != job.total_steps:
        raise CheckpointError(
            f"run {job.run_name!r} was started for {state.total_steps} steps, now the plan has {job.total_steps}: use "
            "the data and settings it was started with, or another run name"
        )


def _trainer(job: TrainingJob, lock: RunLock) -> TorchTrainer:
    settings = job.settings
    filesystem, path = storage.arrow_filesystem(job.url)
    resources = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
    elastic = settings.min_workers is not None
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": ray.cloudpickle.dumps(job)},  # bytes: the controller need not import what is in it
        torch_config=StartHookTorchConfig(
            start_hook=listen, backend="nccl" if settings.uses_gpu else "gloo", timeout_s=settings.timeout_s
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(settings.min_workers, settings.workers) if elastic else settings.workers,
            elastic_resize_monitor_interval_s=settings.resize_interval_s,
            use_gpu=settings.uses_gpu,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        # Functions, so that every start of the workers reads from where its checkpoint stands.
        datasets={
            "train": partial(remaining_stream, job.storage, job.run_name, job.train_data),
            "heldout": job.heldout_data,
        },
        dataset_config=job.data_config,
        validation_config=_validation(job, lock) if settings.validate_every_checkpoints else None,
        run_config=ray.train.RunConfig(
            name=TRAIN_NAME,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
            # Failures are judged by `fit`, which knows those that would only happen again.
            failure_config=ray.train.FailureConfig(max_failures=0),
            callbacks=[FailureCallback(lock)],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


def _validation(job: TrainingJob, lock: RunLock) -> ray.train.ValidationConfig:
    settings = job.settings
    validation = Validation(
        run=job.url,
        model_class=job.model_class,
        dtype=weight_dtype(settings),
        collate=job.collate,
        pad_token_id=job.pad_token_id,
        micro_batch=settings.micro_batch,
        rows=job.heldout_rows,
        data=job.heldout_data,
        iterate=job.iterate,
    )
    return validation_config(
        validation,
        cpus=settings.validation_cpus,
        gpus=settings.validation_gpus,
        timeout_s=settings.validation_timeout_s,
        log=job.log_validation,
        abandoned=lock.failed,
    )


# ---------------------------------------------------------------------------------------------------------- the worker


def train_worker(config: Mapping[str, Any]) -> None:
    """What every worker runs; the steps are those at the top of this file."""
    job: TrainingJob = ray.cloudpickle.loads(config["job"])
    settings = job.settings
    # 1. join
    warn_from_worker()
    log_no_reports()
    ignore_deprecated_collectives()
    if not settings.uses_gpu:
        torch.set_num_threads(settings.threads_per_worker)
    import_deepspeed(settings.uses_gpu).init_distributed(
        dist_backend="nccl" if settings.uses_gpu else "gloo", verbose=False
    )
    worker = _make_worker(job)
    # 4. resume
    start = _resume(worker, job)
    logger = job.make_logger(start.points) if job.make_logger and worker.rank == 0 else None
    loop = Loop(
        settings,
        job.plan.total_samples,
        worker,
        start.state,
        _saver(job, worker, start),
        PreemptionWatch(worker.rank, settings.preemption_grace_s),
        logger,
        job.observe,
    )
    try:
        _steps(job, loop)
    except BaseException:
        if logger is not None:
            logger.close(ABANDONED_S)
        raise


def _make_worker(job: TrainingJob) -> Worker:
    """This process as a worker: the start model partitioned over all of them, inside the engine."""
    settings = job.settings
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # 2. load
    config = deepspeed_config(settings.at_world(world))
    with local_copy(RunFolder(job.url).init) as directory:
        model = load_sharded(job.model_class, directory, config, weight_dtype(settings), settings.uses_gpu)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    # 3. optimise
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.optimizer),
        betas=(settings.optimizer.beta1, settings.optimizer.beta2),
        eps=settings.optimizer.epsilon,
        weight_decay=settings.optimizer.weight_decay,
    )
    deepspeed = import_deepspeed(settings.uses_gpu)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return Worker(engine, rank, world)


def _steps(job: TrainingJob, loop: Loop) -> None:
    """Steps 5 to 7 of a worker."""
    settings, rank, world = job.settings, loop.worker.rank, loop.worker.world
    # 5. step
    share = Share(rank, world, settings.micro_batches_per_step)
    reader = BatchReader(job.collate, job.pad_token_id, settings.micro_batch, share, settings.batching == "length")
    rows = job.iterate(ray.train.get_dataset_shard("train"), settings.micro_batch)
    loop.run(reader.read(rows, loop.state.rows, job.plan.total_rows))
    # 6. hold out
    # Not split: each worker streams all held-out rows and takes its own, so no worker can make the others wait.
    rows = itertools.islice(
        job.iterate(ray.train.get_dataset_shard("heldout"), settings.micro_batch), rank, None, world
    )
    heldout = BatchReader(job.collate, job.pad_token_id, settings.micro_batch, Share(rank, world, world))
    final, parity = evaluate_heldout(
        loop.worker.engine, itertools.chain.from_iterable(heldout.read(rows, 0, job.heldout_rows))
    )
    # 7. finish
    loop.finish(final, parity)


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
    with checkpoint.as_directory() as name:
        # Ray downloads it once for all workers of a node, and again over the same files for one that comes late.
        torch.distributed.barrier()
        directory = Path(name)
        state = load_state(directory)
        ledger = Ledger(job.plan.sizes)
        if worker.rank == 0:
            ledger = load_ledger(directory, job.plan.sizes)
            ledger.require_equal(job.plan.consumed(state.rows), f"the checkpoint of step {state.step}")
        load_resharded(worker.engine, directory)
        points = points_from_jsonl((directory / POINTS_FILE).read_text(), POINTS_FILE)
    losses = LossLog(state)
    state = dataclasses.replace(state, world_size=worker.world, restarts=state.restarts + 1, losses_in_version_2=())
    return ResumePoint(state, ledger, losses, points)


def _saver(job: TrainingJob, worker: Worker, start: ResumePoint) -> CheckpointSaver:
    settings = job.settings
    return CheckpointSaver(
        worker=worker,
        run_url=job.url,
        precision=settings.precision,
        recipe=job.recipe,
        ledger=start.ledger,
        losses=start.losses,
        upload=CheckpointUpload(RunFolder(job.url).train, settings.upload_patience_s),
        retry_s=settings.upload_patience_s,
        validate_every=settings.validate_every_checkpoints,
        saved=start.state.step // settings.checkpoint_every_steps,
    )
