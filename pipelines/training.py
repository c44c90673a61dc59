"""Training of one model with DeepSpeed ZeRO-3 on Ray Train workers.

`fit` runs on the driver. Each worker goes through these steps (`train_worker`):

    1. join       threads and DeepSpeed, in the process group that Ray Train made
    2. load       the start model from `init/`, its parameters partitioned over the workers
    3. optimise   AdamW with one group per trained part, inside the ZeRO-3 engine
    4. resume     weights, optimizer and counts from the checkpoint that the data stream starts at, too
    5. step       until the last step: read, count, forward and backward, update, report (`Loop.run`)
    6. hold out   loss with the true and with shuffled images, and the parity batch
    7. finish     the last checkpoint, with everything of 6

The position of a training is its number of optimizer steps: step g consumes rows [g * G, (g + 1) * G) of the plan, G
being the global batch. Re-using the name of a run continues it from its newest checkpoint.
"""

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.cloudpickle
import ray.data
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution import context as ray_train_context
from transformers import PreTrainedModel

from pipelines import storage
from pipelines.batches import BatchReader, Collate, Row
from pipelines.checkpoint import (
    TRAIN_NAME,
    ZERO3_TAG,
    CheckpointError,
    CheckpointRef,
    TrainState,
    latest_checkpoint,
    load_state,
    local_copy,
    remaining_stream,
    run_url,
)
from pipelines.failures import root_cause
from pipelines.heldout import evaluate
from pipelines.loop import Loop, MetricLogger, Observer
from pipelines.settings import SettingsError, TrainingSettings
from pipelines.zero3 import (
    checkpoint_activations,
    deepspeed_config,
    import_deepspeed,
    load_sharded,
    parameter_groups,
    weight_dtype,
)


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
    total_rows: int
    """Rows of the plan: steps * global batch."""
    expected_samples: int
    """Samples of the plan, over all epochs: `total_rows` without the void rows."""
    train_data: Callable[[int], ray.data.Dataset]
    """The stream from a given row of the plan on."""
    heldout_rows: int
    """Rows of the held-out stream, void ones included; a multiple of workers * micro_batch."""
    heldout_data: Callable[[], ray.data.Dataset]
    """The held-out stream."""
    iterate: Callable[[ray.data.DataIterator, int], Iterator[Sequence[Row]]]
    """Rows of one worker's share of a stream, in groups of the given size."""
    data_config: ray.train.DataConfig
    """How the dataset "train" is split between the workers, in order; "heldout" must not be split."""
    recipe_hash: str
    """Hash of the settings that decide the result."""
    mlflow_run_id: str | None = None
    """The MLflow run that the metrics go to; kept in every checkpoint."""
    make_logger: Callable[[TrainState], MetricLogger] | None = None
    """Makes rank 0's logger, at every start of the workers, from the state it starts at."""
    observe: Observer | None = None
    """Told of every step on every worker (picklable); for audits."""

    def __post_init__(self) -> None:
        settings = self.settings
        if self.total_rows < 1 or self.total_rows % settings.global_batch:
            raise SettingsError(f"total_rows {self.total_rows} is no multiple of global_batch {settings.global_batch}")
        if self.heldout_rows < 1 or self.heldout_rows % (settings.workers * settings.micro_batch):
            raise SettingsError(
                f"heldout_rows {self.heldout_rows} is no multiple of workers * micro_batch = "
                f"{settings.workers} * {settings.micro_batch}"
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.total_rows // self.settings.global_batch

    @property
    def url(self) -> str:
        """The folder of the run."""
        return run_url(self.storage, self.run_name)

    def start_state(self) -> TrainState:
        """The state before the first step."""
        return TrainState(self.recipe_hash, self.settings.workers, self.total_steps, self.mlflow_run_id)


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
        CheckpointError: if the run was started with other settings, or on another number of workers.
        ValueError: what a worker or a data task raised, as it raised it (TooManyDropped, StreamOrderError, ...).
        TrainingError: any other failure, with the worker and the reason, and what to do.
    """
    before = latest_checkpoint(job.storage, job.run_name)
    if before is not None:
        check_resumable(job, before)
        if before.state.done:
            return TrainingResult(before, 0)
    try:
        _trainer(job).fit()
    except ray.train.TrainingFailedError as error:
        raise root_cause(error, f"run {job.run_name!r}") from error
    after = latest_checkpoint(job.storage, job.run_name)
    if after is None or not after.state.done:
        raise CheckpointError(f"run {job.run_name!r} ended without its last checkpoint in {job.url}")
    return TrainingResult(after, after.state.step - (before.state.step if before else 0))


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
    if state.world_size != job.settings.workers and not state.done:
        raise CheckpointError(
            f"run {job.run_name!r} has a checkpoint of {state.world_size} workers at step {state.step}, and workers is "
            f"{job.settings.workers}: set workers to {state.world_size}, or use another run name"
        )


def _trainer(job: TrainingJob) -> TorchTrainer:
    settings = job.settings
    filesystem, path = storage.arrow_filesystem(job.url)
    resources = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": ray.cloudpickle.dumps(job)},  # bytes: the controller need not import what is in it
        torch_config=TorchConfig(backend="nccl" if settings.uses_gpu else "gloo", timeout_s=settings.timeout_s),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.uses_gpu,
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
        ),
        # Functions, so that every start of the workers reads from where its checkpoint stands.
        datasets={
            "train": partial(remaining_stream, job.storage, job.run_name, job.train_data),
            "heldout": job.heldout_data,
        },
        dataset_config=job.data_config,
        run_config=ray.train.RunConfig(
            name=TRAIN_NAME,
            storage_path=path,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep_checkpoints),
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )


# ---------------------------------------------------------------------------------------------------------- the worker


def train_worker(config: Mapping[str, Any]) -> None:
    """What every worker runs; the steps are those at the top of this file."""
    job: TrainingJob = ray.cloudpickle.loads(config["job"])
    settings = job.settings
    # 1. join
    _quieten()
    if not settings.uses_gpu:
        torch.set_num_threads(settings.threads_per_worker)
    deepspeed = import_deepspeed(settings.uses_gpu)
    deepspeed.init_distributed(dist_backend="nccl" if settings.uses_gpu else "gloo", verbose=False)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # 2. load
    zero3 = deepspeed_config(settings)
    with local_copy(storage.join(job.url, "init")) as directory:
        model = load_sharded(job.model_class, directory, zero3, weight_dtype(settings), settings.uses_gpu)
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    # 3. optimise
    groups = parameter_groups(model, settings.optimizer)
    optimizer = torch.optim.AdamW(
        groups,
        betas=(settings.optimizer.beta1, settings.optimizer.beta2),
        eps=settings.optimizer.epsilon,
        weight_decay=settings.optimizer.weight_decay,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero3, dist_init_required=False)
    # 4. resume
    state = _resume(engine, job)
    logger = job.make_logger(state) if job.make_logger and rank == 0 else None
    reader = BatchReader(job.collate, job.pad_token_id, settings.micro_batch, rank, world)
    loop = Loop(settings, job.expected_samples, engine, state, rank, world, logger, job.observe)
    # 5. step
    rows = job.iterate(ray.train.get_dataset_shard("train"), settings.micro_batch)
    loop.run(reader.read(rows, state.rows))
    # 6. hold out
    # Not split: each worker streams all held-out rows and takes its own, so no worker can make the others wait.
    rows = itertools.islice(
        job.iterate(ray.train.get_dataset_shard("heldout"), settings.micro_batch), rank, None, world
    )
    micro_steps = job.heldout_rows // (world * settings.micro_batch)
    final, parity = evaluate(engine, reader.read(rows, 0), micro_steps)
    # 7. finish
    loop.finish(final, parity)


def _resume(engine: Any, job: TrainingJob) -> TrainState:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return job.start_state()
    with checkpoint.as_directory() as directory:
        engine.load_checkpoint(directory, tag=ZERO3_TAG, load_lr_scheduler_states=False)
        return load_state(Path(directory))


def _quieten() -> None:
    """Leave out what the libraries say in every run: a report's repetition of its metrics, and a deprecation inside
    DeepSpeed."""
    logging.getLogger(ray_train_context.__file__).setLevel(logging.WARNING)
    deprecated = r".*(all_gather_into_tensor|reduce_scatter_tensor).*"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)
