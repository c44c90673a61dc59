"""From the checkpoint of a training to one whole model, proven equal: for pretrain, finetune and a sweep's trials.

1. consolidate  one model from the ZeRO-3 shards
2. lambda       stage 3's, for its target mean on prompts
3. export       a folder that stands alone
4. parity       the folder, loaded again, gives the logits that the training left in the checkpoint
5. upload       to where the run or the sweep keeps it
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.checkpoint.committed import CheckpointRef
from pipelines.checkpoint.consolidate import consolidate
from pipelines.checkpoint.local import load_processor, local_copy
from pipelines.checkpoint.state import PARITY_FILE, CheckpointError
from pipelines.checkpoint.weight_sums import DTYPES, Precision
from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.evaluation.questions import Question, read_prompts
from pipelines.evaluation.scores import counted
from pipelines.evaluation.target_mean import solve_for_target
from pipelines.io import sealed, storage
from pipelines.io.console import say
from pipelines.io.run_folder import RunFolder
from pipelines.io.upload import upload_folder
from pipelines.registry.folder import export_model, verify_checksums
from pipelines.registry.parity import check_parity
from pipelines.registry.proof import Parity

Prompts = Callable[[MeteorForConditionalGeneration, MeteorProcessor], Sequence[Question]]
"""Gives the questions that lambda is solved on."""


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        config: of the model, with its lambda.
        parity: of the folder, loaded again, and the training model.
    """

    config: MeteorConfig
    parity: Parity


def export_checkpoint(
    run: RunFolder,
    checkpoint_url: str,
    prompts: Prompts,
    folder: Path,
    to_url: str,
    *,
    precision: Precision,
    tolerance: float | None,
    device: str = "cpu",
) -> Exported:
    """Write the model of a run's checkpoint to `folder`, prove it and store it.

    At most one model is in memory at a time: the one that was exported is gone before the folder is loaded.

    Args:
        run: folder of the run, which holds the start model's configuration and processor.
        checkpoint_url: of the checkpoint.
        prompts: gives the questions that lambda is solved on; asked only where stage 3 has a target mean.
        folder: is made, or empty.
        to_url: where the folder is stored.
        tolerance: largest difference of a logit that is allowed; None takes that of the precision.
        precision: number format of the exported weights.
        device: where lambda is solved and the folder, loaded again, runs.

    Raises:
        CheckpointError: shards that do not make a whole model.
        ParityError: weights that differ, or logits by more than the tolerance.
        ValueError: a target mean that no lambda reaches.
    """
    processor = load_processor(run.url)
    with local_copy(run.init) as init, local_copy(checkpoint_url) as directory:
        model = consolidate(directory, MeteorForConditionalGeneration, init, DTYPES[precision]).to(device)
        config = _solved_and_written(model, processor, prompts, folder)
        del model
        parity = check_parity(folder, directory / PARITY_FILE, tolerance, device)
    upload_folder(folder, to_url)
    return Exported(config, parity)


def _solved_and_written(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, prompts: Prompts, folder: Path
) -> MeteorConfig:
    """Solve lambda and write the folder; the configuration with lambda."""
    solve_for_target(model, processor, lambda: prompts(model, processor))
    export_model(model, processor, folder)
    return model.config


def export_run(
    recipe: Recipe, run: RunFolder, manifest: shards.Manifest, checkpoint: CheckpointRef, device: str = "cpu"
) -> Exported:
    """Export a run's checkpoint as its `export/`; what an earlier start has exported is checked and taken.

    One of another precision than the recipe asks for now is made anew.

    Raises:
        ExportError: an earlier export that is not whole.
        CheckpointError, ParityError, ValueError: as `export_checkpoint`.
    """
    precision = recipe.export_precision
    done = completed(run.exported, checkpoint)
    if done is not None and (parity := Parity.from_dict(done["parity"], run.exported)).exported == precision:
        with local_copy(run.export) as folder:
            verify_checksums(folder)
            config = MeteorConfig.from_pretrained(folder)
        say("  exported by an earlier start")
        return Exported(config, parity)

    def prompts(model: MeteorForConditionalGeneration, processor: MeteorProcessor) -> Sequence[Question]:
        positions = model.config.text_config.max_position_embeddings
        count = recipe.calibration.decode_samples
        found = read_prompts(manifest, recipe.data.train_split, processor, count, positions=positions)
        say(f"  lambda is solved on {len(found.asked)} prompts, left out: {counted(found.left_out)}")
        return found.asked

    try:
        with tempfile.TemporaryDirectory(prefix="meteor-export-") as name:
            exported = export_checkpoint(
                run,
                checkpoint.url,
                prompts,
                Path(name) / "model",
                run.export,
                precision=precision,
                tolerance=recipe.tracking.parity_tolerance,
                device=device,
            )
    except sealed.DamagedFileError as error:
        raise CheckpointError(
            f"{error}. Where an older checkpoint is kept, --run.resume-step trains on from it; --run.export best takes "
            "the best validated one"
        ) from error
    decode = exported.config.pruning.decode
    if decode.enabled and decode.lam is not None and decode.target_mean is not None:
        say(f"  lambda {decode.lam:.4g} for a mean of {decode.target_mean:g} visual tokens per image")
    complete(run.exported, checkpoint, {"parity": exported.parity.to_dict()})
    return exported


def completed(url: str, checkpoint: CheckpointRef) -> dict[str, Any] | None:
    """What the file at `url` says of a phase after training, if that was completed for this checkpoint."""
    if not storage.exists(url):
        return None
    done = sealed.read_document(url)
    return done if done["checkpoint"] == checkpoint.url else None


def complete(url: str, checkpoint: CheckpointRef, result: dict[str, Any]) -> None:
    """Keep the result of a phase after training: the last that it does."""
    sealed.write_document(url, {**result, "checkpoint": checkpoint.url})
