"""What one training of a recipe needs: its plan, its data streams, and its logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from meteor_model.collate import collate
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.flops import TrainingFlops
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.packing import collate_packed
from pipelines.checkpoint.local import load_processor, load_sample_encoder, local_copy
from pipelines.config.recipe import Recipe
from pipelines.config.settings import TrainingSettings
from pipelines.data import shards
from pipelines.data.mixture import make_plan
from pipelines.data.order import StreamPlan
from pipelines.data.stream import RowEncoder, build_stream, data_config, rows_from, rows_to
from pipelines.io.console import say
from pipelines.io.fingerprint import canonical_json, sha256
from pipelines.io.pulse import mailbox_name
from pipelines.io.run_folder import RunFolder, run_folder
from pipelines.sizing.limits import validation_limit_s
from pipelines.sizing.work import training_flops
from pipelines.tracking.metric_logger import MetricLogger
from pipelines.training.batches import Packing, iterate_rows
from pipelines.training.job import TrainingJob


class MetricsRun(NamedTuple):
    """The MLflow run that a training's metrics go to; its id is None while MLflow is away."""

    uri: str
    run_id: str | None


def assemble_training(
    recipe: Recipe, manifests: Sequence[shards.Manifest], run_name: str, metrics_run: MetricsRun | None
) -> TrainingJob:
    """The data streams and settings of `fit`.

    Args:
        recipe: of the run.
        manifests: of the datasets in their order (`datasets.ensure_shards`).
        run_name: of the run, whose start model is there.
        metrics_run: where metrics go; None logs nothing.

    Raises:
        ValueError: naming the dataset that gives no sample under its weight.
    """
    training, data = recipe.training, recipe.data
    url = run_folder(recipe.run.storage, run_name).url
    processor = load_processor(url)
    encoder = RowEncoder(
        partial(load_sample_encoder, url),
        processor.tokenizer.pad_token_id,
        data.max_length,
        data.too_long,
        data.limits.image,
        data.limits.characters,
    )
    plan = make_plan(
        [[info.samples for info in manifest.split(data.train_split)] for manifest in manifests],
        data.weights,
        training.seed,
        training.epochs,
        training.global_batch,
        data.window_shards,
    )
    heldout = plan_heldout(recipe, manifests[0])
    stream = partial(
        build_stream,
        manifests[0],
        encoder=encoder,
        micro_batch=training.micro_batch,
        cpus_per_task=data.data_task_cpus,
        read_concurrency=data.data_tasks,
        mailbox=mailbox_name(url),
        fetch=partial(shards.fetch_shard, retry_s=data.read_patience_s, bad_shards=data.bad_shards),
    )
    made = {"pad_token_id": processor.tokenizer.pad_token_id, "image_size": processor.image_size}
    packed = training.batching == "packed"
    train_stream = partial(stream, others=manifests[1:], spare_rows=training.spare_rows)
    return TrainingJob(
        storage=recipe.run.storage,
        run_name=run_name,
        settings=training,
        model_class=MeteorForConditionalGeneration,
        collate=partial(collate, **made),
        pad_token_id=processor.tokenizer.pad_token_id,
        plan=plan,
        train_data=partial(rows_from, train_stream, data.train_split, plan),
        heldout_rows=heldout.rows,
        heldout_data=partial(
            rows_to, stream, data.heldout_split, heldout.plan, heldout.samples, heldout.rows - heldout.samples
        ),
        iterate=iterate_rows,
        data_config=data_config(),
        recipe=recipe.to_dict(),
        recipe_hash=training_hash(recipe, manifests),
        resume_step=recipe.run.resume_step,
        mlflow_run_id=metrics_run.run_id if metrics_run else None,
        make_logger=partial(MetricLogger, metrics_run.run_id, metrics_run.uri, url) if metrics_run else None,
        validation_limit_s=validation_limit_s(recipe) if training.validate_every_checkpoints else 0.0,
        log_validation=partial(_log_validation, metrics_run, url) if metrics_run else None,
        packing=Packing(partial(collate_packed, **made), data.max_length) if packed else None,
        flops=_flops(url, training),
    )


def _flops(url: str, training: TrainingSettings) -> TrainingFlops | None:
    """FLOPs of training the run's start model; None, which is said, where they hang on the data."""
    with local_copy(RunFolder(url).init, weights=False) as folder:
        config = MeteorConfig.from_pretrained(folder)
    if config.pruning.decode.enabled and config.pruning.decode.train:
        say("  MFU is not measured: with pruning.decode.train the FLOPs of a sample are not known beforehand")
        return None
    return training_flops(config, training)


class Heldout(NamedTuple):
    """What held-out losses are measured on: the first samples of a plan, whatever the micro-batch and the workers."""

    plan: StreamPlan
    samples: int
    """Rows of the plan that are measured, from the first on; each is a sample."""
    rows: int
    """The same and the void rows behind them, which fill the last micro-batch."""


def plan_heldout(recipe: Recipe, manifest: shards.Manifest) -> Heldout:
    """The first `data.heldout_samples` samples of the held-out split, in a fixed order.

    A run may go on with another micro-batch, and the best of its checkpoints is the one with the lowest held-out loss:
    so the samples must stay the same.
    """
    plan = StreamPlan(
        [info.samples for info in manifest.split(recipe.data.heldout_split)],
        seed=0,
        epochs=1,
        global_batch=1,
        window_shards=recipe.data.window_shards,
    )
    samples = min(plan.total_samples, recipe.data.heldout_samples)
    micro = recipe.training.micro_batch
    return Heldout(plan, samples, -(-samples // micro) * micro)


def training_hash(recipe: Recipe, manifests: Sequence[shards.Manifest]) -> str:
    """Short hash of all that decides what is trained: the recipe's identity and the data."""
    text = recipe.digest() + canonical_json([manifest.sha256 for manifest in manifests])
    return sha256(text)[:12]


def _log_validation(metrics_run: MetricsRun, run_url: str, metrics: Mapping[str, float], step: int) -> None:
    logger = MetricLogger(metrics_run.run_id, metrics_run.uri, run_url)
    logger.log(metrics, step)
    logger.close()
