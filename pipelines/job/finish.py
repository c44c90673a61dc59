"""After training: one whole model from the shards, proven equal, looked at, and registered.

Each of these is done once per last checkpoint: what an earlier start of the job completed is taken from storage.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.visualize import draw_ranks
from pipelines.checkpoint.committed import CheckpointRef
from pipelines.checkpoint.consolidate import consolidate
from pipelines.checkpoint.local import load_processor, local_copy
from pipelines.checkpoint.losses import read_losses
from pipelines.checkpoint.state import PARITY_FILE, POINTS_FILE, TrainState
from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.data.schema import RawSample
from pipelines.evaluation.questions import (
    Answer,
    draw_samples,
    question_of,
    readable_samples,
    solve_lambda_on,
    with_lambda,
)
from pipelines.evaluation.scores import Score
from pipelines.evaluation.scoring import Suite, score_model
from pipelines.io import storage
from pipelines.io.run_folder import RunFolder
from pipelines.io.upload import upload_folder
from pipelines.job.pictures import draw_loss
from pipelines.registry.card import BASE_TAG, PARITY_TAG, card
from pipelines.registry.folder import verify_checksums, write_card
from pipelines.registry.provenance import training_tags
from pipelines.registry.publish import RegisteredVersion, check_parity, export_model, register_model
from pipelines.registry.scores import file_score, stored_scores, suite_name
from pipelines.registry.versions import list_versions, move_alias
from pipelines.tracking.points import Point, points_from_jsonl
from pipelines.tracking.run_tracker import Tracker

PICTURES_FOLDER = "pictures"
"""Of the MLflow run's artifacts."""


@dataclass(frozen=True)
class Looked:
    """What a trained model says on held-out questions; no score where there was no question."""

    answers: tuple[Answer, ...] = ()
    suite: Suite | None = None
    score: Score | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary."""
        return {
            "answers": [asdict(answer) for answer in self.answers],
            "suite": None if self.suite is None else asdict(self.suite),
            "score": None if self.score is None else self.score.to_dict(records=True),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Looked:
        """What `to_dict` gave."""
        answers = tuple(Answer(**answer) for answer in data["answers"])
        if data["score"] is None:
            return cls(answers)
        return cls(answers, Suite(**data["suite"]), Score.from_dict(data["score"]))


def export(recipe: Recipe, run_url: str, manifest: shards.Manifest, checkpoint: CheckpointRef, folder: Path) -> float:
    """Write the trained model to `folder`, with stage 3's lambda, and store it as the run's `export/`.

    It is compared with the training model before. Where an earlier start has done that, the export is brought to
    `folder`.

    Returns:
        Largest difference of the logits of the folder's model, loaded again, to those that training wrote.

    Raises:
        CheckpointError: shards that do not make a whole model.
        ParityError: logits that differ by more than `tracking.parity_tolerance`.
    """
    run = RunFolder(run_url)
    if done := _completed(run.exported, checkpoint):
        with local_copy(run.export) as exported:
            shutil.copytree(exported, folder)
        verify_checksums(folder)
        print("  exported by an earlier start", flush=True)
        return float(done["parity"])
    processor = load_processor(run_url)
    with local_copy(run.init) as init, local_copy(checkpoint.url) as directory:
        model = consolidate(directory, MeteorForConditionalGeneration, init)
        decode = model.config.pruning.decode
        if decode.enabled and decode.target_mean is not None:
            prompts = readable_samples(manifest, recipe.data.train_split, processor)
            lam = solve_lambda_on(model, processor, list(islice(prompts, recipe.calibration.decode_samples)))
            model.config = with_lambda(model.config, lam)
            print(f"  lambda {lam:.4g} for a mean of {decode.target_mean:g} visual tokens", flush=True)
        export_model(model, processor, folder)
        parity = check_parity(folder, directory / PARITY_FILE, recipe.tracking.parity_tolerance)
    upload_folder(folder, run.export)
    _complete(run.exported, checkpoint, {"parity": parity})
    return parity


def _completed(url: str, checkpoint: CheckpointRef) -> dict[str, Any] | None:
    """What the file at `url` says of a phase, if that was completed for this checkpoint."""
    if not storage.exists(url):
        return None
    done: dict[str, Any] = storage.read_json(url)
    return done if done["checkpoint"] == checkpoint.url else None


def _complete(url: str, checkpoint: CheckpointRef, result: dict[str, Any]) -> None:
    storage.write_json(url, {**result, "checkpoint": checkpoint.url})


def look(
    recipe: Recipe,
    run_url: str,
    tracker: Tracker,
    manifest: shards.Manifest,
    checkpoint: CheckpointRef,
    ranks: dict[str, Any],
    folder: Path,
    pictures: Path,
) -> Looked:
    """Answers to held-out questions with their score, and pictures of the kept tokens.

    Stored with the run and logged to MLflow; the folder `pictures` is filled. What an earlier start has done is brought
    from storage.
    """
    run = RunFolder(run_url)
    if (done := _completed(run.looked, checkpoint)) and "score" in done:
        with local_copy(run.pictures) as earlier:
            shutil.copytree(earlier, pictures)
        print("  looked at by an earlier start", flush=True)
        return Looked.from_dict(done)
    state = checkpoint.state
    model = MeteorForConditionalGeneration.from_pretrained(folder).eval()
    processor = MeteorProcessor.from_pretrained(folder)
    available = readable_samples(manifest, recipe.data.heldout_split, processor)
    samples = list(islice(available, recipe.data.heldout_samples))
    looked = _ask(model, processor, manifest, recipe.data.heldout_split, samples)
    pictures.mkdir(parents=True)
    for name, picture in draw_samples(model, processor, samples, recipe.run.pictures):
        picture.save(pictures / name)
    heldout = {
        "held out": state.final["heldout_loss"],
        "held out, images shuffled": state.final["heldout_loss_shuffled_images"],
    }
    draw_loss(read_losses(run, state), pictures / "loss.png", heldout)
    draw_ranks(ranks).save(pictures / "ranks.png")
    upload_folder(pictures, run.pictures)
    tracker.log_files(pictures, PICTURES_FOLDER)
    tracker.log_documents(
        {
            "ranks.json": ranks,
            "heldout_answers.json": [asdict(answer) for answer in looked.answers],
            "dropped_samples.json": [asdict(sample) for sample in state.dropped_samples],
        }
    )
    _complete(run.looked, checkpoint, looked.to_dict())
    return looked


def _ask(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    manifest: shards.Manifest,
    split: str,
    samples: Sequence[RawSample],
) -> Looked:
    if not samples:
        return Looked()
    config, decode = model.config, model.config.pruning.decode
    if decode.enabled and decode.lam is None:  # without a target there is no lambda: the model answers unpruned
        pruning = replace(config.pruning, decode=replace(decode, enabled=False))
        model.config = MeteorConfig(**{**config.to_dict(), "pruning": pruning})
    suite = Suite.of(manifest, split, len(samples))
    score = score_model(model, processor, samples, suite.digest)
    model.config = config
    answers = [
        Answer(
            record.key, question_of(sample).replace("<image>", "").strip(), record.expected, record.answer, record.kept
        )
        for sample, record in zip(samples, score.records, strict=True)
    ]
    return Looked(tuple(answers), suite, score)


def undelivered_points(checkpoint: CheckpointRef) -> list[Point]:
    """The metric points that the last checkpoint holds, and its held-out metrics.

    What MLflow lacks where rank 0 ended before its logger was done. Points that MLflow has by now are left out when
    they are delivered.
    """
    now_ms = time.time_ns() // 1_000_000
    points = [Point(name, value, now_ms, checkpoint.state.step) for name, value in checkpoint.state.final.items()]
    url = storage.join(checkpoint.url, POINTS_FILE)
    if storage.exists(url):
        points = points_from_jsonl(storage.read_bytes(url).decode(), url) + points
    return points


@dataclass(frozen=True)
class Trained:
    """A finished training, as its version in the registry tells of it.

    Attributes:
        recipe: of the training.
        job: pretrain or finetune.
        run_name: of the run.
        run_id: its run in MLflow.
        commit: of the code.
        state: of the last checkpoint.
        parity: largest difference of a logit between export and training.
        manifests: of the data.
    """

    recipe: Recipe
    job: str
    run_name: str
    run_id: str
    commit: str
    state: TrainState
    parity: float
    manifests: Sequence[shards.Manifest]


def register(trained: Trained, folder: Path, looked: Looked) -> RegisteredVersion:
    """A version in the registry with its card and its score, under the alias `latest-JOB`.

    A new one, or the one that an earlier start made of this run. The alias moves last.

    Args:
        trained: what is registered.
        folder: its export.
        looked: its score.
    """
    tracking, run_id, commit = trained.recipe.tracking, trained.run_id, trained.commit
    name, uri, alias = tracking.registered_model, tracking.uri, f"latest-{trained.job}"
    # Variants may be filed under the training's run, too.
    found = [item for item in list_versions(name, uri, run_id=run_id) if BASE_TAG not in item.tags]
    scores = stored_scores(found[-1]) if found else {}
    if found:
        model_id = str(found[-1].source).removeprefix("models:/")
        version = RegisteredVersion(name, int(found[-1].version), (), run_id, model_id)
        print(f"  registered by an earlier start as version {version.version}", flush=True)
    else:
        tags = _version_tags(trained)
        whole = {} if looked.score is None else {suite_name(looked.suite): looked.score}
        write_card(folder, card(MeteorConfig.from_pretrained(folder), tags, whole))
        version = register_model(folder, uri=uri, name=name, aliases=(), run_id=run_id, tags=tags)
    if looked.score is not None and looked.score.suite not in scores:
        file_score(uri, name, version.version, looked.score, looked.suite, {"git_commit": commit})
    move_alias(name, alias, version.version, uri)
    return replace(version, aliases=(alias,))


def _version_tags(trained: Trained) -> dict[str, str]:
    recipe = trained.recipe
    return {
        "job": trained.job,
        "run_name": trained.run_name,
        "run_id": trained.run_id,
        "git_commit": trained.commit,
        PARITY_TAG: f"{trained.parity:.3g}",
        "parity_tolerance": f"{recipe.tracking.parity_tolerance:g}",
        "heldout_loss": f"{trained.state.final['heldout_loss']:.4f}",
        **training_tags(recipe, trained.manifests),
    }
