#!/usr/bin/env python
"""Score a model on a suite of questions: `python jobs/evaluate.py --model models:/NAME@ALIAS`.

Shows what was asked, answered and left out, accuracy and likelihood of the expected answers with 95 % intervals, visual
tokens, and TFLOPs. The score of a
registered model is filed with its version: numbers in its tags and its description, every question as an artifact.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.command_line import Job
from jobs.settings import Device, Tracking, check_device, check_manifest, check_model, torch_device
from pipelines.evaluation.scores import Replies


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
    """So many of the split's questions about readable images, the first ones; all where it has fewer. What was left out
    on the way is counted by reason."""
    replies: Replies = "all"
    """Which replies of a sample are questions: all, each asked for by what stands before it, or the first alone. The
    replies of one sample resemble one another, which the intervals do not know."""
    batch: int = 16
    """Questions at a time."""
    output: Path | None = None
    """JSON file for the score with every question."""
    device: Device = "auto"
    """Where the model runs; auto takes a GPU where there is one."""
    tracking: Tracking = field(default_factory=Tracking)
    """MLflow."""


def check(settings: Evaluate) -> None:
    """What can be wrong before anything is asked. Raises ValueError."""
    check_model(settings.model, settings.tracking)
    check_manifest(settings.manifest)
    for name in ("questions", "batch"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    check_device(settings.device)


def run(settings: Evaluate) -> None:
    """Score, file, and say what was found."""
    from pipelines.registry.evaluate import evaluate

    evaluate(
        settings.model,
        settings.manifest,
        settings.split,
        settings.questions,
        replies=settings.replies,
        batch=settings.batch,
        device=torch_device(settings.device),
        output=settings.output,
        uri=settings.tracking.uri,
    )


JOB = Job("evaluate", Evaluate, run, __doc__, check=check)

if __name__ == "__main__":
    sys.exit(JOB.main())
