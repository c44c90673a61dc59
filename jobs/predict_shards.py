#!/usr/bin/env python
"""Answer a split: `ray job submit -- python jobs/predict_shards.py --model MODEL --manifest URL --output URL`.

Batch inference: every sample once, to Parquet. Started again, it answers what is missing.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.command_line import Job
from jobs.settings import Device, Tracking, check_gpus, check_manifest, check_model, cluster_gpus
from pipelines.config.workers import Workers
from pipelines.data.shards import BadShards, load_manifest
from pipelines.inference.output import WhichQuestions
from pipelines.io.console import say


@dataclass(frozen=True)
class PredictShards:
    """What is answered, and with what."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of a model that all nodes can read (also s3://)."""
    manifest: str
    """Dataset: s3://BUCKET/PREFIX or a folder."""
    output: str
    """Folder or s3:// prefix for the Parquet parts; one output holds one model's answers to one split."""
    split: str = "heldout"
    """Split of the dataset."""
    prompt: str = ""
    """Asked of every sample with all its images, which stand in front or at its `<image>`; by default the samples' own
    questions."""
    questions: WhichQuestions = "first"
    """Which of a sample's own replies are asked for; each by all that stands before it, earlier replies as the data has
    them."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""
    visual_tokens: int | None = None
    """Most visual tokens that stage 3 keeps of a question; by default lambda alone decides."""
    part_samples: int = 1024
    """Most samples of a part: what a killed job answers again."""
    bad_shards: BadShards = "fail"
    """What to do with a shard that is missing or damaged: fail, or drop it and count its samples."""
    actors: int = 1
    """Copies of the model that answer side by side."""
    device: Device = "auto"
    """Where they run; auto takes a GPU each where the cluster has any."""
    cpus: float = 0.5
    """Ray CPUs that one of them reserves."""
    gpus: float = 0.0
    """GPUs that one of them reserves, fractions of one too; 0 leaves it to device."""
    tracking: Tracking = field(default_factory=Tracking)
    """MLflow."""


def check(settings: PredictShards) -> None:
    """What can be wrong before anything is asked. Raises ValueError."""
    check_model(settings.model, settings.tracking)
    check_manifest(settings.manifest)
    if settings.questions != "first" and settings.prompt:
        raise ValueError("prompt and questions='all' contradict each other: give one of them")
    for name in ("max_new_tokens", "part_samples"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be at least 1")
    Workers(settings.actors, settings.cpus, settings.gpus)
    check_gpus(settings.device, settings.gpus)


def run(settings: PredictShards) -> None:
    """Answer, and show the counts."""
    # Here: torch and Ray, which --help does not need.
    from meteor_model.answering import Budget
    from meteor_model.configuration_meteor import MeteorConfig
    from pipelines.inference.batch import predict_split
    from pipelines.registry.open import open_model
    from pipelines.registry.versions import pin_model

    model = pin_model(settings.model, settings.tracking.uri)
    with open_model(model) as folder:
        wanted = {"max_new_tokens": settings.max_new_tokens, "visual_tokens": settings.visual_tokens}
        budget = Budget.of(wanted, MeteorConfig.from_pretrained(folder))
    done = predict_split(
        model,
        load_manifest(settings.manifest),
        settings.split,
        settings.output.rstrip("/"),
        budget,
        Workers(settings.actors, settings.cpus, cluster_gpus(settings.device, settings.gpus)),
        prompt=settings.prompt,
        questions=settings.questions,
        part_samples=settings.part_samples,
        bad_shards=settings.bad_shards,
    )
    say(f"{done['samples']} samples, {done['rows']} rows, without answer: {done['errors'] or 'none'}")
    say(f"written   {settings.output}")


JOB = Job("predict_shards", PredictShards, run, __doc__, check=check, needs_ray=True)

if __name__ == "__main__":
    sys.exit(JOB.main())
