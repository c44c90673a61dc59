#!/usr/bin/env python
"""Score a model on a suite of questions: `python jobs/evaluate.py --model models:/NAME@ALIAS`.

Shows what was asked, answered and left out, accuracy and likelihood of the expected answers with 95 % intervals, visual
tokens, and TFLOPs. The score of a registered model is filed with its version: numbers in its tags and its description,
every question as an artifact.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.command_line import Job
from jobs.settings import Device, OtherPruner, Tracking, check_device, check_manifest, check_model, torch_device
from pipelines.evaluation.groups import Part
from pipelines.evaluation.scorers import Scorer
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
    part: Part = "final"
    """Which questions of the split: those that a search chooses on, those that a final comparison stands on, or all.
    Questions about the same thing lie in one part."""
    questions: int = 256
    """So many of the part's questions about images, spread evenly over all of them; all where it has fewer. What cannot
    be asked is counted by reason."""
    every: int | None = None
    """Take every so many-th question of the part from the first on, in place of spreading them."""
    replies: Replies = "all"
    """Which replies of a sample are questions: all, each asked for by what stands before it, or the first alone."""
    scorer: Scorer = "exact"
    """How an answer is held against the expected one: equal (exact), as the VQA evaluation (vqa), by its first yes or
    no (yesno), by the letter of a choice (letter), or by edit distance (anls)."""
    batch: int = 16
    """Questions at a time."""
    pruner: OtherPruner = field(default_factory=OtherPruner)
    """Another way to drop visual tokens than the model's own; the score is then shown and not filed."""
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
    for name in ("questions", "batch", "every"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    settings.pruner.check()
    check_device(settings.device)


def run(settings: Evaluate) -> None:
    """Score, file, and say what was found."""
    from pipelines.registry.evaluate import Wanted, evaluate

    evaluate(
        settings.model,
        settings.manifest,
        Wanted(settings.split, settings.questions, settings.part, settings.every, settings.replies, settings.scorer),
        batch=settings.batch,
        device=torch_device(settings.device),
        pruner=settings.pruner.chosen,
        output=settings.output,
        uri=settings.tracking.uri,
    )


JOB = Job("evaluate", Evaluate, run, __doc__, check=check)

if __name__ == "__main__":
    sys.exit(JOB.main())
