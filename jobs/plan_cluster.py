#!/usr/bin/env python
"""Say what a recipe becomes on many GPUs: `python jobs/plan_cluster.py --gpus 512 --recipe meteor_x4_7b`.

For each number of GPUs: batches, partitions and offloading by the rule of docs/scaling.md, memory, the time of a step
and what it waits for, what the data and the object store must give. It needs no cluster, no weights and no data.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from pydantic import PositiveFloat, PositiveInt

from jobs.command_line import Job, chosen
from jobs.recipes import RecipeName, recipe
from jobs.training_job import JobName
from pipelines.config.recipe import Recipe
from pipelines.io.console import say
from pipelines.sizing.layout import SAMPLE_BYTES, Layout, Speeds
from pipelines.sizing.machines import Machines

if TYPE_CHECKING:
    from pipelines.sizing.at_scale import Scale


@dataclass(frozen=True)
class PlanCluster:
    """How many GPUs, of which machines, for which run."""

    settings: Annotated[Recipe, tyro.conf.arg(name="")]
    """The run."""
    recipe: RecipeName = "meteor_x4_7b"
    """Named settings: the defaults of all below."""
    job: JobName = "pretrain"
    """Whose recipe it is."""
    gpus: tuple[PositiveInt, ...] = (1, 8, 64, 512)
    """GPUs that train, one worker each; a column each."""
    samples: PositiveInt = 558_128
    """Samples of the training split; the default is the size of LLaVA's pre-training set."""
    sample_kb: PositiveFloat = SAMPLE_BYTES / 1e3
    """kB of a sample in its shard."""
    text_tokens: PositiveInt = 40
    """Text tokens of a sample, on average."""
    machines: Machines = field(default_factory=Machines)
    """What the cluster is made of."""
    speeds: Speeds = field(default_factory=Speeds)
    """How fast the cluster is."""


def _defaults(arguments: Sequence[str]) -> PlanCluster:
    name, job = chosen(arguments, "--recipe", "meteor_x4_7b"), chosen(arguments, "--job", "pretrain")
    if job not in ("pretrain", "finetune"):
        raise ValueError(f"job is {job!r}; it must be pretrain or finetune")
    return PlanCluster(recipe(job, name), cast(RecipeName, name), cast(JobName, job))


def check(asked: PlanCluster) -> None:
    """What can be wrong before anything is computed. Raises ValueError."""
    for name in ("samples", "sample_kb", "text_tokens"):
        if getattr(asked, name) <= 0:
            raise ValueError(f"{name} is {getattr(asked, name)}; it must be above 0")
    if not asked.gpus:
        raise ValueError("gpus is empty; give at least one number, such as 8")
    for gpus in asked.gpus:
        asked.machines.nodes(gpus)


def scales(asked: PlanCluster) -> list[Scale]:
    """What is asked for."""
    from pipelines.sizing.at_scale import at_scale  # here: torch and transformers, which --help does not need
    from pipelines.sizing.plan import Counts

    counts = Counts(asked.settings, asked.text_tokens)
    stored = round(asked.samples * asked.sample_kb * 1e3)
    data = Layout(samples=asked.samples, data_bytes=stored, text_tokens=asked.text_tokens, speeds=asked.speeds)
    return [at_scale(asked.settings, gpus, data, asked.machines, counts.estimate) for gpus in asked.gpus]


def run(asked: PlanCluster) -> None:
    """Print the table."""
    from pipelines.sizing.scale_table import scale_table

    say(scale_table(scales(asked)))


JOB = Job("plan_cluster", PlanCluster, run, __doc__, check=check, defaults=_defaults)

if __name__ == "__main__":
    sys.exit(JOB.main())
