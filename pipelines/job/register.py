"""A trained run in MLflow's registry, and the metrics that MLflow still lacks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from mlflow.entities.model_registry import ModelVersion

from pipelines.checkpoint.committed import CheckpointRef
from pipelines.checkpoint.local import local_copy
from pipelines.checkpoint.state import POINTS_FILE
from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.io import sealed, storage
from pipelines.io.console import say
from pipelines.job.answers import HeldoutAnswers
from pipelines.job.starts import Start, start_tags
from pipelines.job.train import Training
from pipelines.registry.aliases import move_alias
from pipelines.registry.proof import Parity
from pipelines.registry.provenance import training_tags
from pipelines.registry.publish import publish_version
from pipelines.registry.scores import store_score, stored_scores
from pipelines.registry.tags import BASE_TAG, COMMIT_TAG, STEP_TAG, WEIGHTS_TAG
from pipelines.registry.versions import RegisteredVersion, Registry
from pipelines.tracking.metric_points import MetricPoint, points_from_jsonl


def undelivered_points(checkpoint: CheckpointRef) -> list[MetricPoint]:
    """The metric points that the last checkpoint holds, and its held-out metrics.

    What MLflow lacks where rank 0 ended before its logger was done. Points that MLflow has by now are left out when
    they are delivered.
    """
    now_ms = time.time_ns() // 1_000_000
    points = [MetricPoint(name, value, now_ms, checkpoint.state.step) for name, value in checkpoint.state.final.items()]
    try:
        kept = sealed.read_file(checkpoint.url, POINTS_FILE)
    except storage.ObjectMissingError:
        return points
    return points_from_jsonl(kept.decode(), storage.join(checkpoint.url, POINTS_FILE)) + points


@dataclass(frozen=True)
class TrainedRun:
    """A finished training, as its version in the registry tells of it.

    Attributes:
        recipe: of the training.
        job: pretrain or finetune.
        run_name: of the run.
        run_id: its run in MLflow.
        commit: of the code.
        training: that has ended.
        parity: of its export.
        manifests: of the data.
        starts: every start of the run, oldest first.
        started_from: the version or folder behind `model.start`, pinned when the run was begun; None where it was not.
    """

    recipe: Recipe
    job: str
    run_name: str
    run_id: str
    commit: str
    training: Training
    parity: Parity
    manifests: Sequence[shards.Manifest]
    starts: Sequence[Start] = ()
    started_from: str | None = None


def register_run(trained: TrainedRun, export_url: str, answers: HeldoutAnswers) -> RegisteredVersion:
    """A version in the registry with its card and its score, under the alias `latest-JOB`.

    A new one, or the one that an earlier start made of this run's checkpoint. The alias moves last.

    Args:
        trained: what is registered.
        export_url: folder of its export in storage.
        answers: with its score.
    """
    tracking, run_id = trained.recipe.tracking, trained.run_id
    registry, alias = Registry(tracking.uri, tracking.registered_model), f"latest-{trained.job}"
    # Variants may be filed under the training's run, too.
    of_training = [item for item in registry.versions(run_id) if BASE_TAG not in item.tags]
    step = trained.training.exported.state.step
    precision = trained.parity.exported
    found = [
        item
        for item in of_training
        if _exported_step(item, trained.training) == step and item.tags.get(WEIGHTS_TAG, "fp32") == precision
    ]
    score, suite = answers.score, answers.suite
    if not found:
        tags = _version_tags(trained)
        with local_copy(export_url) as folder:
            return publish_version(
                folder, registry, run_id=run_id, tags=tags, score=score, suite=suite, aliases=(alias,)
            )
    number, model_id = int(found[-1].version), str(found[-1].source).removeprefix("models:/")
    say(f"  registered by an earlier start as version {number}")
    if score is not None and score.suite not in stored_scores(found[-1]):
        store_score(registry, number, score, suite, {"git_commit": trained.commit})
    move_alias(registry, alias, number)
    return RegisteredVersion(registry.name, number, (alias,), run_id, model_id)


def _exported_step(version: ModelVersion, training: Training) -> int:
    """Step of the checkpoint that a version of this training holds; the first versions did not say: the last."""
    return int(version.tags.get(STEP_TAG, training.last.state.step))


def _version_tags(trained: TrainedRun) -> dict[str, str]:
    recipe, exported = trained.recipe, trained.training.exported.state
    return {
        "job": trained.job,
        "run_name": trained.run_name,
        "run_id": trained.run_id,
        COMMIT_TAG: trained.commit,
        **trained.parity.tags(),
        STEP_TAG: str(exported.step),
        "heldout_loss": f"{exported.final['heldout_loss']:.4f}",
        **start_tags(trained.starts),
        **training_tags(recipe, trained.manifests, trained.started_from),
    }
