"""What one training of a recipe needs: its plan, its data streams, and its logger."""

from __future__ import annotations

from functools import partial

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import collate
from pipelines import shards
from pipelines.batches import iterate_rows
from pipelines.checkpoint import TrainState, load_processor
from pipelines.metric_log import MetricLogger
from pipelines.order import StreamPlan
from pipelines.recipe import Recipe
from pipelines.stream import RowEncoder, build_stream, data_config, rows_from, rows_to
from pipelines.training import TrainingJob


def assemble_training(
    recipe: Recipe, manifest: shards.Manifest, run_name: str, run_url: str, mlflow_run_id: str
) -> TrainingJob:
    """The data streams and settings of `fit`."""
    training, data = recipe.training, recipe.data
    processor = load_processor(run_url)
    encoder = RowEncoder(partial(load_processor, run_url), processor.tokenizer.pad_token_id, data.max_length)
    samples = [info.samples for info in manifest.split(data.train_split)]
    plan = StreamPlan(samples, training.seed, training.epochs, training.global_batch, data.window_shards)
    heldout = StreamPlan(
        [info.samples for info in manifest.split(data.heldout_split)],
        seed=0,
        epochs=1,
        global_batch=training.workers * training.micro_batch,
        window_shards=data.window_shards,
    )
    heldout_rows = min(heldout.total_rows, -(-data.heldout_samples // heldout.global_batch) * heldout.global_batch)
    stream = partial(
        build_stream,
        manifest,
        encoder=encoder,
        micro_batch=training.micro_batch,
        cpus_per_task=data.data_task_cpus,
        read_concurrency=data.data_tasks,
    )
    return TrainingJob(
        storage=recipe.run.storage,
        run_name=run_name,
        settings=training,
        model_class=MeteorForConditionalGeneration,
        collate=partial(collate, pad_token_id=processor.tokenizer.pad_token_id, image_size=processor.image_size),
        pad_token_id=processor.tokenizer.pad_token_id,
        total_rows=plan.total_rows,
        expected_samples=plan.total_samples,
        train_data=partial(rows_from, stream, data.train_split, plan),
        heldout_rows=heldout_rows,
        heldout_data=partial(rows_to, stream, data.heldout_split, heldout, heldout_rows),
        iterate=iterate_rows,
        data_config=data_config(),
        recipe_hash=recipe.digest(),
        mlflow_run_id=mlflow_run_id,
        make_logger=partial(_logger, mlflow_run_id, recipe.tracking.uri),
    )


def _logger(run_id: str, uri: str, state: TrainState) -> MetricLogger:
    return MetricLogger(run_id, uri)
