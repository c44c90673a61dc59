"""Score a model on a suite of questions: `python jobs/evaluate.py --model models:/NAME@ALIAS`.

Prints accuracy and likelihood of the expected answers with 95 % intervals, visual tokens, and TFLOPs. The score of a
registered model is filed with its version: numbers in its tags and its description, every question as an artifact.
"""

import json
import sys
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from jobs.command_line import run_command
from pipelines.data.shards import load_manifest
from pipelines.evaluation.questions import readable_samples
from pipelines.evaluation.scores import Score
from pipelines.evaluation.scoring import Suite, score_model
from pipelines.registry.publish import load_model
from pipelines.registry.scores import file_score
from pipelines.registry.versions import pin_model, trained_on
from pipelines.tracking.mlflow_run import git_commit


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
    """The first question of so many samples with readable images each; all of the split's where it has fewer."""
    batch: int = 16
    """Questions at a time."""
    output: Path | None = None
    """JSON file for the score with every question."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model runs."""


def evaluate(settings: Evaluate) -> Score:
    """Pull, score, file, print."""
    pinned = pin_model(settings.model)
    manifest_address = settings.manifest or trained_on(pinned)
    if not manifest_address:
        raise ValueError(f"manifest is missing: {settings.model} does not say what it was trained on")
    manifest = load_manifest(manifest_address)
    model, processor = load_model(pinned, settings.device)
    samples = list(islice(readable_samples(manifest, settings.split, processor), settings.questions))
    suite = Suite.of(manifest, settings.split, len(samples))
    score = score_model(model, processor, samples, suite.digest, settings.batch)
    if pinned.registry is not None:
        setting = {"git_commit": git_commit(Path(__file__).resolve().parents[1]), "device": settings.device}
        file_score(pinned.registry, pinned.version, score, suite, setting)
    if settings.output is not None:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        document = {"model": pinned.address, "suite": asdict(suite), "score": score.to_dict(records=True)}
        settings.output.write_text(json.dumps(document, indent=2) + "\n")
    print(readable(pinned.address, suite, score))
    if pinned.registry is not None:
        print(f"  filed with version {pinned.version} of {pinned.registry.name}")
    return score


def readable(model: str, suite: Suite, score: Score) -> str:
    """The score for people."""
    lines = [
        ("model", model),
        ("suite", f"{suite.digest}: {suite.questions} questions, split {suite.split} of {suite.manifest}"),
        ("accuracy", score.accuracy_interval.beside(score.accuracy)),
        ("answer NLL", f"{score.answer_nll_interval.beside(score.answer_nll)} nats per token"),
        ("visual tokens", f"{score.visual_tokens} > {score.visual_tokens_mean:.1f} an image, after stage 3"),
        ("TFLOPs", f"{score.tflops:.4g} an image and prompt"),
    ]
    return "\n".join(f"  {name:<14} {text}" for name, text in lines)


def main() -> int:
    """Command line; a fault of the input is one line on stderr and exit code 2."""
    settings = tyro.cli(Evaluate, description=__doc__)
    return run_command(lambda: evaluate(settings))


if __name__ == "__main__":
    sys.exit(main())
