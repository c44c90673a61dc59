"""Training of one model with DeepSpeed ZeRO-3 on Ray Train workers: the driver's side.

The position of a training is its number of optimizer steps: step g consumes rows [g * G, (g + 1) * G) of the plan, G
being the global batch. Re-using the name of a run continues it from its newest checkpoint, on as many workers as
there are then. Workers that fail are started again by `fit` itself (`pipelines.recovery.restart_policy`). What each of
them does is in `pipelines.training.train_worker`.
"""

import dataclasses
import itertools
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import ray.cloudpickle
import ray.exceptions
import ray.train
from ray.train.torch import TorchTrainer

from pipelines.checkpoint.committed import CheckpointRef, latest_checkpoint, remaining_stream
from pipelines.checkpoint.fallback import fall_back, remove_uncommitted, settle_start
from pipelines.checkpoint.state import CheckpointError
from pipelines.checkpoint.zero3 import weight_dtype
from pipelines.compat.ray import ENVIRONMENT_OF_THE_CONTROLLER
from pipelines.compat.ray_torch import StartHookTorchConfig
from pipelines.config.settings import TrainingSettings
from pipelines.io import sealed, storage
from pipelines.io.arrow import arrow_filesystem
from pipelines.io.console import say
from pipelines.io.pulse import mailbox_name
from pipelines.io.run_folder import TRAIN_NAME, RunFolder
from pipelines.recovery.failures import TrainingError, root_cause
from pipelines.recovery.lease import Lease, hold_run
from pipelines.recovery.other_nodes import avoidable, node_selector
from pipelines.recovery.restart_policy import RestartPolicy
from pipelines.recovery.room import Demand, await_nodes
from pipelines.recovery.run_lock import RunLock, StandingCallback, lock_run
from pipelines.recovery.stall import Limits, Stuck
from pipelines.recovery.watchdog import Watchdog, watch
from pipelines.recovery.watched import start_worker, watched_controller
from pipelines.training.job import TrainingJob
from pipelines.training.train_worker import train_worker
from pipelines.training.validation import Validation, validation_config

START_FLOORS = 5.0
"""A part of a start may take so many times `stuck_after_s`, at least."""


@dataclass(frozen=True)
class TrainingResult:
    """A finished training."""

    checkpoint: CheckpointRef
    """The last checkpoint, with its `TrainState`."""
    steps_trained: int
    """Steps made by this call; 0 if the run had ended before."""


def fit(job: TrainingJob, lease: Lease | None = None) -> TrainingResult:
    """Train, or continue, run `job.run_name`; returns at once if it has ended already. Ray must be initialised.

    Args:
        job: the training.
        lease: of the caller, who holds the run already; None takes it for the time of the training.

    Raises:
        CheckpointError: if the run was started with other settings.
        RunInUseError: if another job trains the run.
        LeaseLostError: if another job has taken the run over.
        ValueError: what a worker or a data task raised, as it raised it (TooManyDroppedError, StreamOrderError, ...).
        TrainingError: any other failure, `max_failures` times in a row, with the worker and the reason.
    """
    if (finished := _finished(job)) is not None:
        return TrainingResult(finished, 0)
    held = nullcontext(lease) if lease is not None else hold_run(job.url, f"run {job.run_name!r}")
    with held as mine:
        before = settle_start(job.storage, job.run_name, job.resume_step, say)
        if before is not None:
            check_resumable(job, before)
            if before.state.done:
                return TrainingResult(before, 0)
            if not sealed.open_folder(before.url).sums:
                say(f"  {before.url} was written without checksums, by an earlier version: its bytes are not compared")
        with lock_run(mine) as lock:
            after = _train(job, lock)
    return TrainingResult(after, after.state.step - (before.state.step if before else 0))


def _finished(job: TrainingJob) -> CheckpointRef | None:
    """The last checkpoint of a run that has ended, which nothing is written for; None where there is more to do."""
    if job.resume_step is not None:
        return None
    try:
        latest = latest_checkpoint(job.storage, job.run_name)
    except (CheckpointError, sealed.DamagedFileError, storage.ObjectMissingError):
        return None  # how to go on is decided by `settle_start`
    if latest is None:
        return None
    check_resumable(job, latest)
    return latest if latest.state.done else None


def _train(job: TrainingJob, lock: RunLock) -> CheckpointRef:
    """Start the workers until the last checkpoint is committed."""
    subject, run = f"run {job.run_name!r}", RunFolder(job.url)
    policy = RestartPolicy(job.settings.max_failures)
    avoided: frozenset[str] = frozenset()
    with watch(run, _limits(job.settings), str(_demand(job.settings))) as watchdog:
        for attempt in itertools.count():
            lock.lease.require()  # what follows removes files
            if attempt:  # the workers may have died between their first upload and its commit
                settle_start(job.storage, job.run_name, None, say)
            remove_uncommitted(job.storage, job.run_name)
            await_nodes(_demand(job.settings), job.settings.room_wait_s)
            trainer = _trainer(job, dataclasses.replace(lock, attempt=attempt), avoided)
            cause, stuck = _attempt(trainer, subject, watchdog)
            if isinstance(cause, sealed.DamagedFileError) and cause.folder.startswith(f"{run.train}/"):
                fall_back(run, cause.folder, cause, say)
                continue
            reached = latest_checkpoint(job.storage, job.run_name)
            if reached is not None and reached.state.done:
                return reached  # what failed then, failed after the last step
            if cause is None:
                raise CheckpointError(f"{subject} ended without its last checkpoint in {job.url}")
            restart = policy.after(cause, reached.state.step if reached else -1)
            avoided = _avoided(stuck, job.settings)
            say(f"  {restart.reason}{', on other nodes' if avoided else ''}")
            time.sleep(restart.pause_s)
    raise AssertionError("attempts have no end")


def _attempt(trainer: TorchTrainer, subject: str, watchdog: Watchdog) -> tuple[Exception | None, Stuck | None]:
    """One start of the workers: why it ended before its time, and what the watchdog ended in it, if it did."""
    cause: Exception | None = None
    died: ray.exceptions.RayActorError | None = None
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        cause = root_cause(error, subject)
    except ray.exceptions.RayActorError as error:
        died = error
    stuck = watchdog.attempt_ended()
    if stuck is not None and (died is not None or isinstance(cause, TrainingError)):
        return TrainingError(subject, str(stuck)), stuck
    if died is not None:
        # No restart: an interrupt of the driver may look the same.
        raise TrainingError(subject, f"Ray's controller of the training ended: {died}") from died
    return cause, stuck


def _limits(settings: TrainingSettings) -> Limits:
    start_s = max(float(settings.timeout_s), START_FLOORS * settings.stuck_after_s)
    return Limits(settings.stuck_after_s, start_s, settings.upload_patience_s)


def _per_worker(settings: TrainingSettings) -> dict[str, float]:
    resources = {"CPU": settings.cpus_per_worker, "GPU": settings.gpus_per_worker}
    return {name: amount for name, amount in resources.items() if amount}


def _avoided(stuck: Stuck | None, settings: TrainingSettings) -> frozenset[str]:
    if stuck is None:
        return frozenset()
    return avoidable(stuck.nodes, _per_worker(settings), settings.workers, settings.node_labels)


def _demand(settings: TrainingSettings) -> Demand:
    least = settings.min_workers or settings.workers
    return Demand(least, _per_worker(settings), settings.node_labels, settings.placement)


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


def _trainer(job: TrainingJob, lock: RunLock, avoided: frozenset[str]) -> TorchTrainer:
    settings = job.settings
    filesystem, path = arrow_filesystem(job.url)
    mailbox = mailbox_name(job.url)
    return TorchTrainer(
        train_worker,
        # Bytes: the controller need not import what is in them.
        train_loop_config={"job": ray.cloudpickle.dumps(job), "lease": ray.cloudpickle.dumps(lock.lease)},
        torch_config=StartHookTorchConfig(
            start_hook=partial(start_worker, mailbox),
            backend="nccl" if settings.uses_gpu else "gloo",
            timeout_s=settings.timeout_s,
        ),
        scaling_config=_scaling(settings, avoided),
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
            callbacks=[StandingCallback(lock), watched_controller(mailbox)],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            worker_runtime_env=ENVIRONMENT_OF_THE_CONTROLLER,
        ),
    )


def _scaling(settings: TrainingSettings, avoided: frozenset[str]) -> ray.train.ScalingConfig:
    """Workers, and the nodes that they may be on."""
    elastic = settings.min_workers is not None
    return ray.train.ScalingConfig(
        num_workers=(settings.min_workers, settings.workers) if elastic else settings.workers,
        elastic_resize_monitor_interval_s=settings.resize_interval_s,
        use_gpu=settings.uses_gpu,
        resources_per_worker=_per_worker(settings),
        placement_strategy=settings.placement,
        label_selector=node_selector(settings.node_labels, avoided),
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
        loss_chunk=settings.loss_chunk,
        lease=lock.lease,
    )
    return validation_config(
        validation,
        cpus=settings.validation_cpus,
        gpus=settings.gpus_per_validation,
        timeout_s=settings.validation_timeout_s or job.validation_limit_s,
        log=job.log_validation,
        wait_s=settings.validation_wait_s,
        standing=lock.standing,
    )
