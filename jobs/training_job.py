"""What pretrain and finetune share: a recipe by name, and any of its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, cast

import tyro

from jobs.command_line import Job, chosen
from jobs.recipes import RecipeName, recipe
from jobs.settings import Tracking, check_manifest, check_model
from pipelines.config.recipe import Recipe
from pipelines.io.console import say

JobName = Literal["pretrain", "finetune"]


@dataclass(frozen=True)
class Train:
    """One run."""

    settings: Annotated[Recipe, tyro.conf.arg(name="")]
    recipe: RecipeName = "tiny"
    """Named settings: the defaults of all below."""


def training_job(job: JobName, description: str) -> Job[Train]:
    """The job of this name."""
    return Job(
        job,
        Train,
        partial(_run, job),
        description,
        check=_check,
        needs_ray=True,
        defaults=partial(_defaults, job),
        log=lambda train: Path(output, f"{job}.log") if (output := train.settings.run.output) else None,
    )


def _defaults(job: JobName, arguments: Sequence[str]) -> Train:
    name = chosen(arguments, "--recipe", "tiny")
    return Train(recipe(job, name), cast(RecipeName, name))


def _check(train: Train) -> None:
    settings = train.settings
    if not settings.run.storage:
        raise ValueError(
            "run.storage is not set: give --run.storage s3://BUCKET/PREFIX or set METEOR_STORAGE "
            "(`make up` and `python -m infra.local run -- ...` do it for the local stack; on a cluster, plain `ray job "
            "submit` leaves your variables behind: python jobs/submit.py takes them along)"
        )
    tracking = Tracking(settings.tracking.uri)
    tracking.require()
    if settings.model.start is not None:
        check_model(settings.model.start, tracking, "model.start")
    check_manifest(settings.data.manifest, "data.manifest")
    for address in settings.data.mixture:
        check_manifest(address, "data.mixture")


def _run(job: JobName, train: Train) -> None:
    from pipelines.job.run import run_job  # here: Ray Train and DeepSpeed, which --help does not need

    say(f"  {'MLflow':<14} {train.settings.tracking.uri}")
    run_job(train.settings, job)
