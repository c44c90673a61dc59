"""A variant: a registered model under another pruning, as a version of its own.

Weights stay what they are; budgets, ranks and lambda are the configuration's. So a variant is made without training:

1. `apply_pruning`     the pulled base under the new settings, in memory
2. `export_model`      written out whole
3. `check_parity`      the folder, loaded again, gives the logits of the model in memory
4. `publish_version`   card, version, score; the aliases move last
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion

from meteor_model.configuration_meteor import MeteorConfig, PruningConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.towers import of_towers, towers_of, with_towers
from pipelines.checkpoint.best import best_checkpoint
from pipelines.checkpoint.committed import latest_checkpoint
from pipelines.checkpoint.local import local_copy
from pipelines.checkpoint.state import PARITY_FILE
from pipelines.evaluation.evaluate import measured_cost
from pipelines.evaluation.scores import Score, ScoringError
from pipelines.evaluation.suite import Suite
from pipelines.io import storage
from pipelines.io.run_folder import split_run_url
from pipelines.registry.folder import ExportError, export_model
from pipelines.registry.open import load_model, load_registered
from pipelines.registry.parity import ParityError, check_parity, write_parity_batch
from pipelines.registry.proof import Parity
from pipelines.registry.publish import publish_version, pull_model
from pipelines.registry.tags import (
    BASE_TAG,
    COMMIT_TAG,
    DATA_TAGS,
    LICENCE_TAG,
    STEP_TAG,
    TRAINING_COMMIT_TAG,
    TRAINING_TAGS,
)
from pipelines.registry.versions import PinnedModel, RegisteredVersion, Registry, pin_model
from pipelines.tracking.server import TrackingError, call_mlflow


def apply_pruning(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    pruning: PruningConfig,
    ranks: Mapping[str, Sequence[float]] | None,
) -> None:
    """Put a model and its processor under another pruning, in place.

    Args:
        model: any.
        processor: the model's; it writes as many placeholders as tokens survive fusion.
        pruning: the three stages.
        ranks: expected ranks by encoder, one per boundary; None keeps those that the model has.

    Raises:
        ValueError: settings that contradict the model or one another; nothing is changed then.
    """
    model.config = config = model.config.with_pruning(pruning, "keep" if ranks is None else ranks)
    processor.tokens_per_image = config.tokens_per_image


def under_settings(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    pruning: PruningConfig,
    ranks: Mapping[str, Sequence[float]] | None,
    towers: Mapping[str, int] | None,
) -> MeteorForConditionalGeneration:
    """The model under another pruning and some of its towers; modules are shared (`meteor_model.towers.of_towers`).

    Args:
        model: any.
        processor: the model's, which is put under the settings in place.
        pruning: the three stages.
        ranks: expected ranks of the towers that are kept; None keeps those that the model has, where all towers stay as
            they are, else it shares budgets by token count.
        towers: image side of each tower that is kept; None keeps all as they are.

    Raises:
        ValueError: as `apply_pruning`, or for towers that the model does not have.
    """
    if towers is None:
        apply_pruning(model, processor, pruning, ranks)
        return model
    config = with_towers(model.config, towers).with_pruning(pruning, ranks)
    processor.tokens_per_image = config.tokens_per_image
    return of_towers(model, config)


def register_variant(  # noqa: PLR0913 - what a version is made of, by name
    base: str,
    pruning: PruningConfig,
    score: Score,
    *,
    ranks: dict[str, list[float]] | None,
    registry: Registry,
    aliases: Sequence[str],
    run_id: str,
    tags: Mapping[str, str],
    towers: Mapping[str, int] | None = None,
    suite: Suite | None = None,
    tolerance: float | None = None,
) -> RegisteredVersion:
    """Register a base model under another pruning, with its score.

    Args:
        base: models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of an exported model (also s3://).
        pruning: the three stages; lambda solved where stage 3 is on.
        score: of the base under this pruning, with its questions.
        ranks: expected ranks that decide the budgets; None keeps the base's.
        registry: of the registered model that gets a version.
        aliases: that move to it, e.g. budget-64, champion.
        run_id: the MLflow run that it is filed under, e.g. the trial that found it.
        tags: of the version, e.g. git_commit; recipe, data and licences are taken over from a registered base, and are
            to be given for a folder (`pipelines.registry.provenance.training_tags`).
        towers: image side of each tower that is kept; None keeps all as they are.
        suite: that the score is of, for its name in the card.
        tolerance: largest difference of a logit that parity may show; None takes that of the precision.

    Raises:
        ValueError: a pruning that contradicts the base, or stage 3 without its lambda.
        ParityError: the folder, loaded again, does not compute what the variant computes.
        ScoringError: a score of another pruning, or without its questions.
        ExportError, TrackingError: base or server cannot be used.
    """
    if pruning.decode.enabled and not pruning.decode.acts:
        raise ValueError(
            "pruning.decode.lam is not set: stage 3 of a registered variant needs its lambda; solve it for "
            "pruning.decode.target_mean first (pipelines.evaluation.target_mean.solve_lambda_on)"
        )
    pinned = pin_model(base, registry.uri)
    base_tags = _inherited(pinned)
    whole, processor = load_model(pinned)
    model = under_settings(whole, processor, pruning, ranks, towers)
    _check_score(score, model.config)
    with tempfile.TemporaryDirectory(prefix="meteor-variant-") as scratch:
        folder = export_model(model, processor, Path(scratch) / "model")
        parity = _parity_of(model, processor, folder, tolerance)
        all_tags = {
            **base_tags,
            "run_id": run_id,
            **parity.tags(),
            **tags,
        }
        return publish_version(
            folder, registry, run_id=run_id, tags=all_tags, score=score, suite=suite, aliases=aliases
        )


def _inherited(base: PinnedModel) -> dict[str, str]:
    """Tags that a variant takes over from its base, and which that is; none from a folder."""
    if base.registry is None:
        return {}
    found = base.registry.version(base.version).tags
    kept = (*DATA_TAGS, *TRAINING_TAGS)  # the same weights: its training is this version's
    tags = {key: text for key, text in found.items() if key in kept or key.startswith(LICENCE_TAG)}
    if commit := found.get(TRAINING_COMMIT_TAG, found.get(COMMIT_TAG)):
        tags[TRAINING_COMMIT_TAG] = commit
    return {**tags, BASE_TAG: base.address}


def _check_score(score: Score, config: MeteorConfig) -> None:
    """Raise ScoringError where the score's tokens or cost are not those of this pruning: it is another variant's."""
    expected = measured_cost(config, score.kept_per_image).total / 1e12
    same_tokens = score.tokens_per_image == config.tokens_per_image
    if not same_tokens or not math.isclose(score.tflops, expected, rel_tol=1e-9):
        raise ScoringError(
            f"the score is of {score.tokens_per_image} visual tokens and {score.tflops:.6g} TFLOPs an image, this "
            f"pruning has {config.tokens_per_image} and {expected:.6g}: score the variant that is registered"
        )


def _parity_of(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, folder: Path, tolerance: float | None
) -> Parity:
    """The folder against the model, on fresh inputs. Raises ParityError."""
    written = MeteorConfig.from_pretrained(folder)
    if written.pruning != model.config.pruning or written.ranks != model.config.ranks:
        raise ParityError(f"{folder} holds another pruning than the model that was exported: {written.pruning}")
    with tempfile.TemporaryDirectory(prefix="meteor-parity-") as scratch:
        batch = Path(scratch) / PARITY_FILE
        write_parity_batch(model, processor, batch)
        return check_parity(folder, batch, tolerance)


def measure_parity(registry: Registry, version: int, tolerance: float | None = None) -> Parity:
    """Measure the parity of a version that is registered, and file it in its tags.

    A variant is compared with its base under the variant's settings; what a training made with what the training left
    in the checkpoint that was exported.

    Raises:
        ParityError: another model, or a difference above the tolerance; the tag stays as it was.
        ExportError: a version of which neither base nor checkpoint is known.
        TrackingError: an unknown version, or a server that is away.
    """
    found = registry.version(version)
    with tempfile.TemporaryDirectory(prefix="meteor-parity-") as scratch:
        folder = pull_model(PinnedModel(registry.address(version), registry, version), Path(scratch) / "model")
        if base := found.tags.get(BASE_TAG):
            whole, processor = load_registered(base, registry.uri)
            config = MeteorConfig.from_pretrained(folder)
            towers = None if towers_of(config) == towers_of(whole.config) else towers_of(config)
            model = under_settings(whole, processor, config.pruning, config.ranks, towers)
            parity = _parity_of(model, processor, folder, tolerance)
        else:
            with local_copy(_training_checkpoint(registry, found)) as checkpoint:
                parity = check_parity(folder, checkpoint / PARITY_FILE, tolerance)
    registry.describe_version(version, tags=parity.tags())
    return parity


def _training_checkpoint(registry: Registry, version: ModelVersion) -> str:
    """Address of the checkpoint that a version was exported from."""
    which, client, run_id = f"version {version.version} of {registry.name}", registry.client, version.run_id
    unknown = f"{which} names neither a base nor a training: register it again from its run"
    if not run_id:
        raise ExportError(unknown)
    run = call_mlflow(f"run {run_id}", lambda: client.get_run(run_id))
    try:
        root, run_name = split_run_url(run.data.tags.get("run_url", ""))
    except storage.StorageError as error:
        raise ExportError(unknown) from error
    last = latest_checkpoint(root, run_name)
    if last is None:
        raise TrackingError(f"run {run_name} of {root}, which made {which}, has no checkpoint")
    step = int(version.tags.get(STEP_TAG, last.state.step))
    if step == last.state.step:
        return last.url
    best = best_checkpoint(root, run_name)
    if best is None or best.state.step != step:
        raise ExportError(
            f"{which} was exported from the checkpoint of step {step}, which run {run_name} keeps no more"
        )
    return best.url
