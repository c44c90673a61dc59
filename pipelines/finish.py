"""After training: one whole model from the shards, proven equal, looked at, and registered."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.visualize import draw_ranks
from pipelines import shards, storage
from pipelines.checkpoint import PARITY_FILE, CheckpointRef, TrainState, consolidate, load_processor, local_copy
from pipelines.evaluate import (
    Answer,
    answer_samples,
    draw_samples,
    readable_samples,
    solve_lambda_on,
    with_lambda,
)
from pipelines.export import RegisteredVersion, check_parity, export_model, register_model
from pipelines.pictures import draw_loss
from pipelines.recipe import Recipe
from pipelines.start import upload_folder
from pipelines.tracking import log_documents, log_files

EXPORT_FOLDER = "export"


def export(recipe: Recipe, run_url: str, manifest: shards.Manifest, checkpoint: CheckpointRef, folder: Path) -> float:
    """Write the trained model to `folder`, with stage 3's lambda, compare it with the training model, and store it as
    the run's `export/`.

    Returns:
        largest difference of the logits of the folder's model, loaded again, to those that training wrote.

    Raises:
        CheckpointError: shards that do not make a whole model.
        ParityError: logits that differ by more than `tracking.parity_tolerance`.
    """
    processor = load_processor(run_url)
    with local_copy(storage.join(run_url, "init")) as init, local_copy(checkpoint.url) as directory:
        model = consolidate(directory, MeteorForConditionalGeneration, init)
        decode = model.config.pruning.decode
        if decode.enabled and decode.target_mean is not None:
            prompts = readable_samples(manifest, recipe.data.train_split, processor)
            lam = solve_lambda_on(model, processor, list(islice(prompts, recipe.calibration.decode_samples)))
            model.config = with_lambda(model.config, lam)
            print(f"  lambda {lam:.4g} for a mean of {decode.target_mean:g} visual tokens", flush=True)
        export_model(model, processor, folder)
        parity = check_parity(folder, directory / PARITY_FILE, recipe.tracking.parity_tolerance)
    upload_folder(folder, storage.join(run_url, EXPORT_FOLDER))
    return parity


def look(
    recipe: Recipe,
    run_id: str,
    manifest: shards.Manifest,
    state: TrainState,
    ranks: dict[str, Any],
    folder: Path,
    pictures: Path,
) -> list[Answer]:
    """Answers to held-out questions and pictures of the kept tokens, logged to MLflow; `pictures` is filled."""
    model = MeteorForConditionalGeneration.from_pretrained(folder).eval()
    processor = MeteorProcessor.from_pretrained(folder)
    available = readable_samples(manifest, recipe.data.heldout_split, processor)
    samples = list(islice(available, recipe.data.heldout_samples))
    answers = answer_samples(model, processor, samples)
    pictures.mkdir(parents=True)
    for name, picture in draw_samples(model, processor, samples, recipe.run.pictures):
        picture.save(pictures / name)
    heldout = {
        "held out": state.final["heldout_loss"],
        "held out, images shuffled": state.final["heldout_loss_shuffled_images"],
    }
    draw_loss(state.losses, pictures / "loss.png", heldout)
    draw_ranks(ranks).save(pictures / "ranks.png")
    log_files(recipe.tracking.uri, run_id, pictures, "pictures")
    log_documents(
        recipe.tracking.uri,
        run_id,
        {
            "ranks.json": ranks,
            "heldout_answers.json": [asdict(answer) for answer in answers],
            "dropped_samples.json": [asdict(sample) for sample in state.dropped_samples],
        },
    )
    return answers


def register(
    recipe: Recipe, job: str, run_id: str, state: TrainState, parity: float, commit: str, run_name: str, folder: Path
) -> RegisteredVersion:
    """A new version in the registry, under the alias `latest-JOB`."""
    return register_model(
        folder,
        uri=recipe.tracking.uri,
        name=recipe.tracking.registered_model,
        alias=f"latest-{job}",
        run_id=run_id,
        tags={
            "job": job,
            "recipe": recipe.name,
            "run_name": run_name,
            "git_commit": commit,
            "parity_max_abs_diff": f"{parity:.3g}",
            "heldout_loss": f"{state.final['heldout_loss']:.4f}",
        },
    )
