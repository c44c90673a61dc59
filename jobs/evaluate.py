"""Score a model on a suite of questions: `python jobs/evaluate.py --model models:/NAME@ALIAS`.

Prints accuracy and likelihood of the expected answers with 95 % intervals, visual tokens, and TFLOPs. The score of a
registered model is filed with its version: numbers in its tags and its description, every question as an artifact.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from mlflow import MlflowClient

from pipelines.export import load_registered
from pipelines.registry import get_version, resolve_model
from pipelines.scoring import Score, Suite, score_model
from pipelines.shards import load_manifest
from pipelines.tracking import git_commit, patiently, require_tracking, use_tracking
from pipelines.version_scores import file_score


@dataclass(frozen=True)
class Evaluate:
    """What is scored on what."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of an exported model."""
    manifest: str = ""
    """Dataset: s3://BUCKET/PREFIX or a folder; by default the one that the registered version was trained on."""
    split: str = "heldout"
    """Split of the dataset."""
    questions: int = 256
    """The first question of each of so many samples with images; all of the split's where it has fewer."""
    batch: int = 16
    """Questions at a time."""
    output: Path | None = None
    """JSON file for the score with every question."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model runs."""


def evaluate(settings: Evaluate) -> Score:
    """Pull, score, file, print."""
    uri, registered = os.environ.get("MLFLOW_TRACKING_URI", ""), settings.model.startswith("models:")
    model_address, manifest_address = settings.model, settings.manifest
    name, version = "", 0
    if registered:
        require_tracking(uri)
        use_tracking(uri)
        name, version = resolve_model(settings.model, uri)
        model_address = f"models:/{name}/{version}"  # an alias may move meanwhile
        manifest_address = manifest_address or trained_on(name, version, uri)
    if not manifest_address:
        raise ValueError(f"manifest is missing: {settings.model} does not say what it was trained on")
    manifest = load_manifest(manifest_address)
    suite = Suite.of(manifest, settings.split, min(settings.questions, manifest.samples(settings.split)))
    model, processor = load_registered(model_address, uri, settings.device)
    score = score_model(model, processor, suite.load(processor), suite.digest, settings.batch)
    if registered:
        setting = {"git_commit": git_commit(Path(__file__).resolve().parents[1]), "device": settings.device}
        file_score(uri, name, version, score, suite, setting)
    if settings.output is not None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        document = {"model": model_address, "suite": asdict(suite), "score": score.to_dict(records=True)}
        settings.output.write_text(json.dumps(document, indent=2) + "\n")
    print(readable(model_address, suite, score))
    if registered:
        print(f"  filed with version {version} of {name}")
    return score


def trained_on(name: str, version: int, uri: str) -> str:
    """The manifest that a version's tags name, or those of its run; empty where neither does."""
    found = get_version(name, version, uri)
    if "manifest" in found.tags or not found.run_id:
        return found.tags.get("manifest", "")
    run = patiently(f"run {found.run_id}", lambda: MlflowClient(uri).get_run(found.run_id))
    return str(run.data.tags.get("manifest", ""))


def readable(model: str, suite: Suite, score: Score) -> str:
    """The score for people."""
    accuracy, nll = score.accuracy_interval, score.answer_nll_interval
    lines = [
        ("model", model),
        ("suite", f"{suite.digest}: {suite.questions} questions, split {suite.split} of {suite.manifest}"),
        ("accuracy", f"{score.accuracy:.4f} [{accuracy.low:.4f}, {accuracy.high:.4f}]"),
        ("answer NLL", f"{score.answer_nll:.4f} [{nll.low:.4f}, {nll.high:.4f}] nats per token"),
        ("visual tokens", f"{score.visual_tokens} > {score.visual_tokens_mean:.1f} an image, after stage 3"),
        ("TFLOPs", f"{score.tflops:.4g} an image and prompt"),
    ]
    return "\n".join(f"  {name:<14} {text}" for name, text in lines)


def main() -> int:
    """Command line; a fault of the input is one line on stderr and exit code 2."""
    settings = tyro.cli(Evaluate, description=__doc__)
    try:
        evaluate(settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
