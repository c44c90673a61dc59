#!/usr/bin/env python
"""Search the pruning of a registered model: `ray job submit -- python jobs/sweep.py --budgets 64 128 256`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from jobs.command_line import Job, chosen
from jobs.recipes import RecipeName, recipe
from jobs.settings import Tracking, check_manifest, check_model
from pipelines.io.console import say
from tune.settings import SweepSettings


@dataclass(frozen=True)
class Sweep:
    """One sweep."""

    settings: Annotated[SweepSettings, tyro.conf.arg(name="")]
    train_recipe: RecipeName = "tiny"
    """Named settings: the defaults of --train."""


def defaults(arguments: Sequence[str]) -> Sweep:
    """Those of the recipe that is named."""
    name = chosen(arguments, "--train-recipe", "tiny")
    return Sweep(SweepSettings(train=recipe("finetune", name)), cast(RecipeName, name))


def check(sweep: Sweep) -> None:
    """What can be wrong before anything is asked. Raises ValueError."""
    settings = sweep.settings
    tracking = Tracking(settings.tracking.uri)
    tracking.require()
    check_model(settings.model, tracking)
    check_manifest(settings.manifest)
    if not settings.storage:
        raise ValueError("storage is not set: give --storage s3://BUCKET/PREFIX or set METEOR_STORAGE")


def run(sweep: Sweep) -> None:
    """Search, and say where it is tracked."""
    from tune.sweep import run_sweep  # here: Ray Tune and the model, which --help does not need

    say(f"  {'MLflow':<14} {sweep.settings.tracking.uri}")
    run_sweep(sweep.settings)


DESCRIPTION = "Search a pruning of a registered model that costs less and is no worse, and the best of each budget."
JOB = Job("sweep", Sweep, run, DESCRIPTION, check=check, needs_ray=True, defaults=defaults)

if __name__ == "__main__":
    sys.exit(JOB.main())
