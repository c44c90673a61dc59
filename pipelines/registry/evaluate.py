"""Score a model on a suite of questions, and file the score of a registered one with its version."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipelines.data.shards import load_manifest
from pipelines.evaluation.breakdown import by_tag, tag_lines
from pipelines.evaluation.evaluate import score_model
from pipelines.evaluation.groups import Part
from pipelines.evaluation.scorers import Scorer
from pipelines.evaluation.scores import Replies, Score
from pipelines.evaluation.suite import Suite
from pipelines.io.console import say
from pipelines.io.git import git_commit
from pipelines.io.redact import redact, redact_text
from pipelines.registry.open import apply_pruner, load_model
from pipelines.registry.scores import store_score
from pipelines.registry.versions import pin_model, training_manifest


@dataclass(frozen=True)
class Wanted:
    """Which questions of a dataset make the suite (`pipelines.evaluation.suite.Suite`), all there are where fewer."""

    split: str = "heldout"
    questions: int = 256
    part: Part = "final"
    every: int | None = None
    replies: Replies = "all"
    scorer: Scorer = "exact"


def evaluate(
    model: str,
    manifest: str,
    wanted: Wanted,
    *,
    batch: int,
    device: str,
    pruner: tuple[str, int, Mapping[str, float]] = ("", 0, {}),
    output: Path | None = None,
    uri: str | None = None,
) -> Score:
    """Pull, score, file, and say what was found.

    Args:
        model: models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of an exported model.
        manifest: of the dataset; empty: the one that the registered version was trained on.
        wanted: which questions of it.
        batch: questions at a time.
        device: where the model runs.
        pruner: name, tokens kept and numbers of another pruner than the model's own; its score is not filed.
        output: JSON file for the score with every question.
        uri: of the MLflow server; None takes MLFLOW_TRACKING_URI.

    Raises:
        ValueError: of several kinds, naming the model or dataset that is wrong.
    """
    pinned = pin_model(model, uri)
    address = manifest or training_manifest(pinned)
    if not address:
        raise ValueError(f"manifest is missing: {model} does not say what it was trained on")
    suite = Suite.of(load_manifest(address), **asdict(wanted))
    loaded, processor = load_model(pinned, device)
    apply_pruner(loaded, processor, *pruner)
    found = suite.read(processor, loaded.config.text_config.max_position_embeddings)
    suite = replace(suite, questions=found.drawn)
    score = score_model(loaded, processor, found, suite, batch)
    registry = None if pruner[0] else pinned.registry
    if registry is not None:
        setting = {"git_commit": git_commit(Path(__file__).resolve().parents[2]), "device": device}
        store_score(registry, pinned.version, score, suite, setting)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        name, keep, options = pruner
        other = {"pruner": {"name": name, "keep": keep, "options": dict(options)}} if name else {}
        shown = redact({"model": pinned.address, "suite": asdict(suite), **other})
        document = {**shown, "score": score.to_dict(records=True)}
        output.write_text(json.dumps(document, indent=2) + "\n")
    say(score_text(pinned.address, suite, score))
    if registry is not None:
        say(f"  filed with version {pinned.version} of {registry.name}")
    return score


def score_text(model: str, suite: Suite, score: Score) -> str:
    """The score for people."""
    groups = len({record.group for record in score.records})
    which = f"part {suite.part} of split {suite.split} of {redact_text(suite.manifest)}"
    lines = [
        ("model", model),
        ("suite", f"{suite.digest}: {suite.replies} replies, {which}, scorer {suite.scorer}"),
        ("questions", f"{score.coverage}; {groups} groups"),
        ("accuracy", score.accuracy_text),
        ("answer NLL", f"{score.answer_nll_interval.beside(score.answer_nll)} nats per token"),
        ("visual tokens", f"{score.tokens_per_image} > {score.kept_per_image:.1f} per image, after stage 3"),
        ("TFLOPs", f"{score.tflops:.4g} an image and prompt"),
    ]
    shown = [f"  {name:<14} {text}" for name, text in lines]
    return "\n".join([*shown, *(f"    {line}" for line in tag_lines(by_tag(score.records)))])
