"""Score a model on a suite of questions, and file the score of a registered one with its version."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from pipelines.data.shards import load_manifest
from pipelines.evaluation.evaluate import score_model
from pipelines.evaluation.questions import read_questions
from pipelines.evaluation.scores import Replies, Score, ScoringError, counted
from pipelines.evaluation.suite import Suite
from pipelines.io.console import say
from pipelines.io.git import git_commit
from pipelines.io.redact import redact
from pipelines.registry.open import load_model
from pipelines.registry.scores import store_score
from pipelines.registry.versions import pin_model, training_manifest


def evaluate(  # noqa: PLR0913 - the settings of an evaluation, by name
    model: str,
    manifest: str,
    split: str,
    questions: int,
    *,
    replies: Replies = "all",
    batch: int,
    device: str,
    output: Path | None = None,
    uri: str | None = None,
) -> Score:
    """Pull, score, file, and say what was found.

    Args:
        model: models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of an exported model.
        manifest: of the dataset; empty: the one that the registered version was trained on.
        split: of the dataset.
        questions: most that are asked.
        replies: which replies of a sample are questions.
        batch: questions at a time.
        device: where the model runs.
        output: JSON file for the score with every question.
        uri: of the MLflow server; None takes MLFLOW_TRACKING_URI.

    Raises:
        ValueError: of several kinds, naming the model or dataset that is wrong.
    """
    pinned = pin_model(model, uri)
    address = manifest or training_manifest(pinned)
    if not address:
        raise ValueError(f"manifest is missing: {model} does not say what it was trained on")
    shards = load_manifest(address)
    loaded, processor = load_model(pinned, device)
    positions = loaded.config.text_config.max_position_embeddings
    found = read_questions(shards, split, processor, questions, positions=positions, replies=replies)
    if not found.asked:
        raise ScoringError(
            f"split {split!r} of {shards.url} has no question about a readable image (left out: "
            f"{counted(found.left_out)})"
        )
    suite = Suite.of(shards, split, len(found.asked), replies)
    score = score_model(loaded, processor, found, suite.digest, batch)
    if pinned.registry is not None:
        setting = {"git_commit": git_commit(Path(__file__).resolve().parents[2]), "device": device}
        store_score(pinned.registry, pinned.version, score, suite, setting)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        shown = redact({"model": pinned.address, "suite": asdict(suite)})
        document = {**shown, "score": score.to_dict(records=True)}
        output.write_text(json.dumps(document, indent=2) + "\n")
    say(score_text(pinned.address, suite, score))
    if pinned.registry is not None:
        say(f"  filed with version {pinned.version} of {pinned.registry.name}")
    return score


def score_text(model: str, suite: Suite, score: Score) -> str:
    """The score for people."""
    lines = [
        ("model", model),
        ("suite", f"{suite.digest}: {suite.replies} replies, split {suite.split} of {suite.manifest}"),
        ("questions", score.coverage),
        ("accuracy", score.accuracy_interval.beside(score.accuracy)),
        ("answer NLL", f"{score.answer_nll_interval.beside(score.answer_nll)} nats per token"),
        ("visual tokens", f"{score.visual_tokens} > {score.visual_tokens_mean:.1f} an image, after stage 3"),
        ("TFLOPs", f"{score.tflops:.4g} an image and prompt"),
    ]
    return "\n".join(f"  {name:<14} {text}" for name, text in lines)
