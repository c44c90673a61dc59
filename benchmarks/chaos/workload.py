"""The training under test: a small model on the real stream, the real loop and the real checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks.chaos.data import IMAGE_SIZE, PAD, ByteProcessor
from benchmarks.chaos.model import ChaosConfig, ChaosModel
from benchmarks.chaos.recorder import KilledInDataStart, Recorder, StepFault, StopsInRead
from meteor_model.collate import collate
from pipelines.checkpoint.zero3 import save_for_sharding
from pipelines.config.settings import LearningRates, OptimizerSettings, TrainingSettings
from pipelines.data.order import StreamPlan
from pipelines.data.shards import fetch_shard, load_manifest
from pipelines.data.stream import Fetch, RowEncoder, build_stream, data_config, rows_from, rows_to
from pipelines.io import storage
from pipelines.io.pulse import mailbox_name
from pipelines.io.run_folder import run_folder
from pipelines.io.upload import upload_folder
from pipelines.training.batches import iterate_rows
from pipelines.training.job import TrainingJob

SETTINGS = TrainingSettings(
    workers=2,
    micro_batch=4,
    global_batch=24,
    epochs=2,
    seed=7,
    # A large epsilon: where a gradient is rounding noise, AdamW's steps would otherwise be noise of full size.
    optimizer=OptimizerSettings(learning_rates=LearningRates(1e-2, 1e-2, 1e-2), epsilon=1e-3),
    checkpoint_every_steps=4,
    log_every_steps=1,
    validate_every_checkpoints=0,
    max_drop_share=0.05,
    timeout_s=60,
    cpus_per_worker=1.0,
)
WINDOW_SHARDS = 3
HELDOUT_ROWS = 24
MAX_LENGTH = 256


@dataclass(frozen=True)
class Config:
    """One run under test, as a JSON file that every command of it is given."""

    storage: str
    run_name: str
    manifest: str
    ray_address: str
    log: str
    """The file that the workers append to."""
    workers: int = SETTINGS.workers
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainingSettings that differ from `SETTINGS`."""
    faults: tuple[StepFault, ...] = ()
    data_start_kill: str | None = None
    """Marker of a kill of worker 1 while it waits for its first batch."""
    data_task_stop: tuple[str, str] | None = None
    """A shard and a marker: the data task that reads it is stopped once."""
    step_seconds: float = 0.0
    bad_shards: Literal["fail", "drop"] = "fail"
    resume_step: int | None = None
    mlflow_uri: str | None = None
    mlflow_run_id: str | None = None


def make_job(config: Config) -> TrainingJob:
    """The training of `config`."""
    settings = replace(SETTINGS, workers=config.workers, **config.settings)
    manifest = load_manifest(config.manifest)
    encoder = RowEncoder(ByteProcessor, PAD, MAX_LENGTH)
    plan = StreamPlan(
        [info.samples for info in manifest.split("train")],
        settings.seed,
        settings.epochs,
        settings.global_batch,
        WINDOW_SHARDS,
    )
    heldout = StreamPlan(
        [info.samples for info in manifest.split("heldout")],
        seed=0,
        epochs=1,
        global_batch=HELDOUT_ROWS,
        window_shards=WINDOW_SHARDS,
    )
    fetch: Fetch = partial(fetch_shard, bad_shards=config.bad_shards)
    if config.data_task_stop is not None:
        fetch = StopsInRead(fetch, *config.data_task_stop)
    stream = partial(
        build_stream,
        manifest,
        encoder=encoder,
        micro_batch=settings.micro_batch,
        mailbox=mailbox_name(run_folder(config.storage, config.run_name).url),
        fetch=fetch,
    )
    return TrainingJob(
        storage=config.storage,
        run_name=config.run_name,
        settings=settings,
        model_class=ChaosModel,
        collate=partial(collate, pad_token_id=PAD, image_size=IMAGE_SIZE),
        pad_token_id=PAD,
        plan=plan,
        train_data=partial(rows_from, partial(stream, spare_rows=settings.spare_rows), "train", plan),
        heldout_rows=HELDOUT_ROWS,
        heldout_data=partial(rows_to, partial(stream, encode_concurrency=1), "heldout", heldout, HELDOUT_ROWS),
        iterate=KilledInDataStart(1, config.data_start_kill) if config.data_start_kill else iterate_rows,
        data_config=data_config(),
        recipe={"name": "chaos"},
        recipe_hash="chaos",
        resume_step=config.resume_step,
        mlflow_run_id=config.mlflow_run_id,
        make_logger=_logger_maker(config),
        observe=Recorder(config.log, config.faults, config.step_seconds),
    )


def _logger_maker(config: Config) -> Callable[..., Any] | None:
    if config.mlflow_uri is None:
        return None
    from pipelines.tracking.metric_logger import (
        MetricLogger,  # it loads MLflow, which most of the commands need not wait for
    )

    return partial(
        MetricLogger, config.mlflow_run_id, config.mlflow_uri, run_folder(config.storage, config.run_name).url
    )


def prepare_init(root: str, run_name: str) -> None:
    """Store the start model of a run, the same for every run; what is there stays."""
    import torch

    run = run_folder(root, run_name)
    if storage.exists(run.init_config):
        return
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="meteor-chaos-") as folder:
        save_for_sharding(ChaosModel(ChaosConfig()), Path(folder))
        upload_folder(Path(folder), run.init)
