"""Training one run from its start model on, as pretrain, finetune and the trials of a sweep do it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pipelines.checkpoint.committed import CheckpointRef
from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.job.assemble import MetricsRun, assemble_training
from pipelines.training.trainer import fit


class Training(NamedTuple):
    """A training that has ended: its last checkpoint, and the samples that its plan holds."""

    checkpoint: CheckpointRef
    planned_samples: int


def train(
    recipe: Recipe, manifests: Sequence[shards.Manifest], run_name: str, metrics_run: MetricsRun | None
) -> Training:
    """Train, or go on with, the run whose start model is prepared (`start.prepare_start`).

    Args:
        recipe: of the run.
        manifests: of the datasets in their order (`datasets.ensure_shards`).
        run_name: of the run, whose folder is `runs/NAME`.
        metrics_run: where metrics go; None logs nothing.

    Raises:
        ValueError: naming the setting, dataset or sample that is wrong.
        TrainingError: a training that ended too often.
    """
    job = assemble_training(recipe, manifests, run_name, metrics_run)
    return Training(fit(job).checkpoint, job.plan.total_samples)
