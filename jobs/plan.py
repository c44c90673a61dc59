#!/usr/bin/env python
"""Say how large a run will be: `python jobs/plan.py --recipe meteor_x4_7b --nodes 2 --gpus-per-node 8`.

Memory, disk, traffic and time by phase and place, computed from the settings alone: it needs no cluster, no weights and
no data. Takes the settings of pretrain (or of finetune, with `--job finetune`) as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from jobs.command_line import Job, chosen
from jobs.recipes import RecipeName, recipe
from jobs.training_job import JobName
from pipelines.config.recipe import Recipe
from pipelines.io.console import say
from pipelines.sizing.layout import Layout, Speeds
from pipelines.sizing.table import table, terms_text
from pipelines.sizing.terms import Estimate


@dataclass(frozen=True)
class Plan:
    """The cluster and the data that a run is meant for."""

    settings: Annotated[Recipe, tyro.conf.arg(name="")]
    """The run."""
    recipe: RecipeName = "tiny"
    """Named settings: the defaults of all below."""
    job: JobName = "pretrain"
    """Whose recipe it is."""
    nodes: PositiveInt = 1
    """Machines that train."""
    gpus_per_node: NonNegativeInt | None = None
    """GPUs of each; the workers are as many as fit on all of them. None leaves training.workers as it is."""
    samples: PositiveInt | None = 558_128
    """Samples of the training split; the default is the size of LLaVA's pre-training set. None: not known."""
    gigabytes: PositiveFloat | None = None
    """GB of all shards; None: not known."""
    text_tokens: PositiveInt = 40
    """Text tokens of a sample, on average."""
    speeds: Speeds = field(default_factory=Speeds)
    """How fast the cluster is."""
    terms: bool = False
    """Show every term with its formula, too."""
    json: bool = False
    """Write all of it as JSON instead."""


def _defaults(arguments: Sequence[str]) -> Plan:
    name, job = chosen(arguments, "--recipe", "tiny"), chosen(arguments, "--job", "pretrain")
    if job not in ("pretrain", "finetune"):
        raise ValueError(f"job is {job!r}; it must be pretrain or finetune")
    return Plan(recipe(job, name), cast(RecipeName, name), cast(JobName, job))


def check(asked: Plan) -> None:
    """What can be wrong before anything is computed. Raises ValueError."""
    for name in ("nodes", "samples", "gigabytes", "text_tokens"):
        value = getattr(asked, name)
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if asked.gpus_per_node is not None and asked.gpus_per_node < 0:
        raise ValueError(f"gpus_per_node is {asked.gpus_per_node}; it must be at least 0")


def planned(asked: Plan) -> Recipe:
    """The recipe with as many workers as the GPUs that are given."""
    settings, training = asked.settings, asked.settings.training
    if not asked.gpus_per_node:
        return settings
    gpus = max(1.0, training.gpus_per_worker)
    workers = int(asked.nodes * (asked.gpus_per_node // gpus))
    return replace(settings, training=replace(training, workers=workers, gpus_per_worker=gpus))


def estimated(asked: Plan) -> Estimate:
    """What is asked for."""
    from pipelines.sizing.plan import plan_run  # here: torch and transformers, which --help does not need

    data = None if asked.gigabytes is None else round(asked.gigabytes * 1e9)
    gpus = float(asked.gpus_per_node or 0)
    layout = Layout(asked.nodes, gpus, asked.samples, data, asked.text_tokens, speeds=asked.speeds)
    return plan_run(planned(asked), layout)


def run(asked: Plan) -> None:
    """Print the estimate."""
    found = estimated(asked)
    if asked.json:
        say(json.dumps(found.to_dict(), indent=1))
        return
    say(table(found))
    if asked.terms:
        say("\n" + terms_text(found))


JOB = Job("plan", Plan, run, __doc__, check=check, defaults=_defaults)

if __name__ == "__main__":
    sys.exit(JOB.main())
