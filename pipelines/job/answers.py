"""What a trained model says to held-out questions, with its score, and pictures of the tokens that it keeps."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from meteor_model.loading import load_model_and_processor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.visualize import draw_ranks
from pipelines.checkpoint.local import local_copy
from pipelines.checkpoint.losses import read_losses
from pipelines.checkpoint.state import CheckpointError
from pipelines.config.recipe import Recipe
from pipelines.data import shards
from pipelines.evaluation.evaluate import score_model
from pipelines.evaluation.pictures import draw_questions
from pipelines.evaluation.questions import Questions, read_questions
from pipelines.evaluation.scores import Score
from pipelines.evaluation.suite import ASKED_AS, Suite
from pipelines.io import codec
from pipelines.io.console import say
from pipelines.io.run_folder import RunFolder
from pipelines.io.upload import upload_folder
from pipelines.job.export import complete, completed
from pipelines.job.pictures import draw_loss
from pipelines.job.train import Training
from pipelines.tracking.run_tracker import RunTracker

PICTURES_FOLDER = "pictures"
"""Of the MLflow run's artifacts."""


@dataclass(frozen=True)
class HeldoutAnswer:
    """One held-out question, what the data says, what the model said, and what that earns (0 to 1)."""

    key: str
    question: str
    expected: str
    answer: str
    credit: float


@dataclass(frozen=True)
class HeldoutAnswers:
    """The answers to held-out questions; no score where there was no question.

    Attributes:
        answers: to the suite's questions.
        left_out: what could not be asked, by reason.
        suite: the questions.
        score: of the answers.
    """

    answers: tuple[HeldoutAnswer, ...]
    left_out: dict[str, int]
    suite: Suite | None = None
    score: Score | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary."""
        return {
            "answers": [asdict(answer) for answer in self.answers],
            "left_out": self.left_out,
            "suite": None if self.suite is None else asdict(self.suite),
            "score": None if self.score is None else self.score.to_dict(records=True),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> HeldoutAnswers:
        """What `to_dict` gave, among what else `data` holds. Raises ValueError that names `where` and the field."""
        return codec.from_plain(cls, {item.name: data[item.name] for item in fields(cls)}, where)


def answer_heldout(
    recipe: Recipe,
    run: RunFolder,
    manifest: shards.Manifest,
    training: Training,
    ranks: dict[str, Any],
    device: str = "cpu",
) -> HeldoutAnswers:
    """Ask the exported model held-out questions and draw what it keeps; both are stored with the run.

    What an earlier start has done is taken from storage.

    Args:
        recipe: of the run.
        run: its folder in storage, with its export.
        manifest: of its first dataset.
        training: that was exported.
        ranks: content of `ranks.json`.
        device: where the model runs.
    """
    done = completed(run.answers, training.exported)
    precision = recipe.export_precision
    if done is not None and done.get("asked_as") == ASKED_AS and done.get("precision", "fp32") == precision:
        say("  answered by an earlier start")
        return HeldoutAnswers.from_dict(done, run.answers)
    with local_copy(run.export) as folder:
        model, processor = load_model_and_processor(folder)
    model.to(device)
    split, positions = recipe.data.heldout_split, model.config.text_config.max_position_embeddings
    count = recipe.data.heldout_samples
    questions = read_questions(manifest, split, processor, count, positions=positions, part="final")
    answers = _ask(model, processor, manifest, split, questions)
    with tempfile.TemporaryDirectory(prefix="meteor-pictures-") as name:
        pictures = Path(name)
        for file, picture in draw_questions(model, processor, questions.asked, recipe.run.pictures):
            picture.save(pictures / file)
        _draw_training(run, training, ranks, pictures)
        upload_folder(pictures, run.pictures)
    complete(run.answers, training.exported, {**answers.to_dict(), "asked_as": ASKED_AS, "precision": precision})
    return answers


def log_answers(
    tracker: RunTracker, training: Training, ranks: dict[str, Any], answers: HeldoutAnswers, pictures: Path
) -> None:
    """Log what a run has answered, its pictures and what was dropped to MLflow."""
    tracker.log_files(pictures, PICTURES_FOLDER)
    tracker.log_documents(
        {
            "ranks.json": ranks,
            "heldout_answers.json": [asdict(answer) for answer in answers.answers],
            "dropped_samples.json": [dropped.to_dict() for dropped in training.last.state.dropped_samples],
        }
    )


def _draw_training(run: RunFolder, training: Training, ranks: dict[str, Any], pictures: Path) -> None:
    final = training.exported.state.final
    heldout = {
        "held out": final["heldout_loss"],
        "held out, images shuffled": final["heldout_loss_shuffled_images"],
    }
    try:
        losses = read_losses(run, training.last.state)
    except CheckpointError as error:  # a picture is no reason to keep a trained model out of the registry
        say(f"  loss.png is left out: {error}")
    else:
        draw_loss(losses, pictures / "loss.png", heldout)
    draw_ranks(ranks).save(pictures / "ranks.png")


def _ask(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    manifest: shards.Manifest,
    split: str,
    questions: Questions,
) -> HeldoutAnswers:
    left_out = dict(questions.left_out)
    if not questions.asked:
        return HeldoutAnswers((), left_out)
    config, decode = model.config, model.config.pruning.decode
    if decode.enabled and not decode.acts:  # without a target there is no lambda: the model answers unpruned
        model.config = config.with_pruning(replace(config.pruning, decode=replace(decode, enabled=False)))
    suite = Suite.of(manifest, split, questions.drawn, part="final")
    score = score_model(model, processor, questions, suite)
    model.config = config
    answers = [
        HeldoutAnswer(record.key, question.text, record.expected, record.answer or "", record.credit or 0.0)
        for question, record in zip(questions.asked, score.records, strict=True)
    ]
    return HeldoutAnswers(tuple(answers), left_out, suite, score)
