"""After training: one whole model from the shards, proven equal, looked at, and registered.

Each of these is done once per last checkpoint: what an earlier start of the job completed is taken from storage.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.visualize import draw_ranks
from pipelines import shards, storage
from pipelines.checkpoint import (
    PARITY_FILE,
    POINTS_FILE,
    CheckpointRef,
    TrainState,
    consolidate,
    load_processor,
    local_copy,
)
from pipelines.evaluate import (
    Answer,
    answer_samples,
    draw_samples,
    readable_samples,
    solve_lambda_on,
    with_lambda,
)
from pipelines.export import RegisteredVersion, check_parity, export_model, register_model
from pipelines.model_folder import verify_checksums
from pipelines.pictures import draw_loss
from pipelines.points import Point, points_from_jsonl
from pipelines.recipe import Recipe
from pipelines.tracker import Tracker
from pipelines.tracking import patiently
from pipelines.uploads import upload_folder

EXPORT_FOLDER, PICTURES_FOLDER = "export", "pictures"
EXPORTED_FILE, LOOKED_FILE = "exported.json", "looked.json"
"""In a run's folder: written last, with the checkpoint that `export` and `look` are complete for."""


def export(recipe: Recipe, run_url: str, manifest: shards.Manifest, checkpoint: CheckpointRef, folder: Path) -> float:
    """Write the trained model to `folder`, with stage 3's lambda, compare it with the training model, and store it as
    the run's `export/`; where an earlier start has done that, bring it to `folder`.

    Returns:
        largest difference of the logits of the folder's model, loaded again, to those that training wrote.

    Raises:
        CheckpointError: shards that do not make a whole model.
        ParityError: logits that differ by more than `tracking.parity_tolerance`.
    """
    if done := _completed(run_url, EXPORTED_FILE, checkpoint):
        with local_copy(storage.join(run_url, EXPORT_FOLDER)) as exported:
            shutil.copytree(exported, folder)
        verify_checksums(folder)
        print("  exported by an earlier start", flush=True)
        return float(done["parity"])
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
    _complete(run_url, EXPORTED_FILE, checkpoint, {"parity": parity})
    return parity


def _completed(run_url: str, file: str, checkpoint: CheckpointRef) -> dict[str, Any] | None:
    url = storage.join(run_url, file)
    if not storage.exists(url):
        return None
    done: dict[str, Any] = storage.read_json(url)
    return done if done["checkpoint"] == checkpoint.url else None


def _complete(run_url: str, file: str, checkpoint: CheckpointRef, result: dict[str, Any]) -> None:
    storage.write_json(storage.join(run_url, file), {**result, "checkpoint": checkpoint.url})


def look(
    recipe: Recipe,
    run_url: str,
    tracker: Tracker,
    manifest: shards.Manifest,
    checkpoint: CheckpointRef,
    ranks: dict[str, Any],
    folder: Path,
    pictures: Path,
) -> list[Answer]:
    """Answers to held-out questions and pictures of the kept tokens, stored with the run and logged to MLflow; the
    folder `pictures` is filled. What an earlier start has done is brought from storage."""
    stored = storage.join(run_url, PICTURES_FOLDER)
    if done := _completed(run_url, LOOKED_FILE, checkpoint):
        with local_copy(stored) as earlier:
            shutil.copytree(earlier, pictures)
        print("  looked at by an earlier start", flush=True)
        return [Answer(**answer) for answer in done["answers"]]
    state = checkpoint.state
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
    upload_folder(pictures, stored)
    tracker.log_files(pictures, PICTURES_FOLDER)
    tracker.log_documents(
        {
            "ranks.json": ranks,
            "heldout_answers.json": [asdict(answer) for answer in answers],
            "dropped_samples.json": [asdict(sample) for sample in state.dropped_samples],
        }
    )
    _complete(run_url, LOOKED_FILE, checkpoint, {"answers": [asdict(answer) for answer in answers]})
    return answers


def undelivered_points(checkpoint: CheckpointRef) -> list[Point]:
    """The metric points that the last checkpoint holds, and its held-out metrics: what MLflow lacks where rank 0 ended
    before its logger was done. Points that MLflow has by now are left out when they are delivered."""
    now_ms = time.time_ns() // 1_000_000
    points = [Point(name, value, now_ms, checkpoint.state.step) for name, value in checkpoint.state.final.items()]
    url = storage.join(checkpoint.url, POINTS_FILE)
    if storage.exists(url):
        points = points_from_jsonl(storage.read_bytes(url).decode(), url) + points
    return points


def register(
    recipe: Recipe, job: str, run_id: str, state: TrainState, parity: float, commit: str, run_name: str, folder: Path
) -> RegisteredVersion:
    """A version in the registry, under the alias `latest-JOB`: a new one, or the one that an earlier start made of this
    run."""
    name, alias, client = recipe.tracking.registered_model, f"latest-{job}", MlflowClient(recipe.tracking.uri)
    found = patiently(
        f"the question for versions of {name}",
        lambda: client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"),
        recipe.tracking.patience_s,
    )
    if found:
        version = max(found, key=lambda item: int(item.version))
        patiently(f"alias {alias}", lambda: client.set_registered_model_alias(name, alias, str(version.version)))
        print(f"  registered by an earlier start as version {version.version}", flush=True)
        model_id = str(version.source).removeprefix("models:/")
        return RegisteredVersion(name, int(version.version), alias, run_id, model_id)
    return register_model(
        folder,
        uri=recipe.tracking.uri,
        name=name,
        alias=alias,
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
