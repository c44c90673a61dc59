"""Training one run from its start model on, as pretrain, finetune and the trials of a sweep do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.checkpoint.best import checkpoint_to_export
from pipelines.checkpoint.committed import CheckpointRef
from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.job.assemble import MetricsRun, assemble_training
from pipelines.recovery.lease import Lease
from pipelines.training.trainer import fit


@dataclass(frozen=True)
class Training:
    """A training that has ended.

    Attributes:
        last: its last checkpoint.
        exported: the one that becomes its model (`run.export`); `final` of its state are its own held-out metrics.
        planned_samples: of all epochs.
    """

    last: CheckpointRef
    exported: CheckpointRef
    planned_samples: int


def train(
    recipe: Recipe,
    manifests: Sequence[shards.Manifest],
    run_name: str,
    metrics_run: MetricsRun | None,
    lease: Lease | None = None,
) -> Training:
    """Train, or go on with, the run whose start model is prepared (`start.prepare_start`).

    Args:
        recipe: of the run.
        manifests: of the datasets in their order (`datasets.ensure_shards`).
        run_name: of the run, whose folder is `runs/NAME`.
        metrics_run: where metrics go; None logs nothing.
        lease: of a caller who holds the run; None takes it for the time of the training.

    Raises:
        ValueError: naming the setting, dataset or sample that is wrong.
        CheckpointError: where the best checkpoint is to be exported and there is none.
        TrainingError: a training that ended too often.
    """
    job = assemble_training(recipe, manifests, run_name, metrics_run)
    last = fit(job, lease).checkpoint
    exported = checkpoint_to_export(recipe.run.storage, run_name, last, recipe.run.export)
    return Training(last, exported, job.plan.total_samples)
