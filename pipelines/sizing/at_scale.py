"""One recipe at any number of GPUs: batches, partitions and offloading by rule, and what a step then waits for.

Nothing is estimated here: every candidate is what `pipelines.sizing.estimate` says of it. The rule is that of
docs/scaling.md: of all settings that fit in memory, those whose step is shortest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pipelines.config.recipe import Recipe
from pipelines.config.settings import PARTS
from pipelines.sizing.layout import GB, Layout
from pipelines.sizing.machines import Machines
from pipelines.sizing.terms import Estimate, Resource
from pipelines.sizing.times import BETWEEN_NODES, COMPUTING
from pipelines.sizing.training import START_MODEL

Offload = Literal["none", "optimizer", "all"]
OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "all")
"""From the fastest to the smallest."""
SPARE_DATA = 1.5
"""How many times the images of the steps the data tasks can decode."""

Estimator = Callable[[Recipe, Layout], Estimate]


@dataclass(frozen=True)
class Scale:
    """A recipe on so many GPUs.

    Attributes:
        recipe: with the settings of the rule.
        layout: of the cluster.
        found: its estimate.
        machines: what the cluster is made of.
        fits: whether it fits in memory; where nothing does, this is the smallest that there is.
    """

    recipe: Recipe
    layout: Layout
    found: Estimate
    machines: Machines
    fits: bool

    @property
    def waits(self) -> dict[str, float]:
        """Seconds of an optimizer step that each thing takes, if it had to be waited for alone.

        Checkpoints go up beside the steps, so each step pays its share of them.
        """
        return {**self.training_s, "store": (self.read_bytes + self.written_bytes) / self.store_rate}

    @property
    def read_bytes(self) -> float:
        """Bytes of the samples of a step, in their shards."""
        return self.recipe.training.global_batch * self.layout.sample_bytes

    @property
    def written_bytes(self) -> float:
        """Bytes of the checkpoints for each step, on average."""
        return self.found.total("checkpoint", "store", "up") / self.steps

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        assert self.found.steps, "the number of samples is given"
        return self.found.steps

    @property
    def training_s(self) -> dict[str, float]:
        """Seconds of an optimizer step by term of `make plan`."""
        named = {COMPUTING: "computing", BETWEEN_NODES: "network"}
        uses = [use for use in self.found.uses if (use.phase, use.resource) == ("train", "time")]
        return {named[term.what]: term.amount / self.steps for use in uses for term in use.terms}

    @property
    def step_s(self) -> float:
        """Seconds of an optimizer step: computing and network in turn, as in `make plan`, and the store beside."""
        return max(sum(self.training_s.values()), self.waits["store"])

    @property
    def binds(self) -> str:
        """What takes the most of a step."""
        return max(self.waits, key=self.waits.__getitem__) if self.fits else "memory: does not fit"

    @property
    def samples_per_s(self) -> float:
        """Of all workers."""
        return self.recipe.training.global_batch / self.step_s

    @property
    def store_rate(self) -> float:
        """Bytes a second between all nodes and the store."""
        return min(self.layout.nodes * self.layout.speeds.store_mb * 1e6, self.machines.store_gb * GB)

    @property
    def start_s(self) -> float:
        """Seconds until every node has the start model."""
        down = [term for use in self.found.uses if use.resource == "down" for term in use.terms]
        return sum(term.amount for term in down if term.formula == START_MODEL) / self.store_rate

    @property
    def peak(self) -> dict[Resource, float]:
        """Bytes of a GPU and of a node's memory, in the phase that takes the most."""
        return {"gpu": self.found.peak("gpu", "gpu")[1], "ram": self.found.peak("node", "ram")[1]}


def at_scale(base: Recipe, gpus: int, data: Layout, machines: Machines, of: Estimator) -> Scale:
    """The settings of the rule for so many GPUs.

    Args:
        base: a recipe; its workers, batches, ZeRO choices and data tasks are chosen anew.
        gpus: one worker each.
        data: the data and how fast things are; its nodes and GPUs are chosen anew.
        machines: what the cluster is made of.
        of: `pipelines.sizing.plan.Counts.estimate`, or another.

    Raises:
        ValueError: for GPUs that fill no whole nodes.
    """
    nodes, each = machines.nodes(gpus)
    layout = replace(data, nodes=nodes, gpus_per_node=float(each))

    def scale(candidate: Recipe) -> Scale:
        found = of(candidate, layout)
        most = {"gpu": machines.gpu_gb * GB, "ram": machines.node_gb * GB}
        made = Scale(candidate, layout, found, machines, True)
        return replace(made, fits=all(made.peak[kind] <= 0.9 * most[kind] for kind in ("gpu", "ram")))

    for offload in OFFLOADS:
        fitting = [one for row in _candidates(base, gpus, layout, offload) if (one := _largest(row, scale)) is not None]
        if fitting:
            return _fed(min(fitting, key=lambda one: round(one.step_s, 9)), scale)
    return scale(next(_candidates(base, gpus, layout, OFFLOADS[-1]))[0])


def _candidates(base: Recipe, gpus: int, layout: Layout, offload: Offload) -> Iterator[list[Recipe]]:
    """For each partition the recipes from the smallest micro-batch to the largest."""
    batch = -(-max(base.training.global_batch, gpus) // gpus) * gpus
    rates = base.training.optimizer.learning_rates
    factor = math.sqrt(batch / base.training.global_batch)
    faster = {part: float(f"{rate * factor:.4g}") for part in PARTS if (rate := rates.of(part)) is not None}
    scaled = replace(base.training.optimizer, learning_rates=replace(rates, **faster))
    for partition in (1, gpus // layout.nodes) if layout.nodes > 1 else (1,):
        zero3 = replace(base.training.zero3, offload=offload, secondary_partition=partition)
        yield [
            replace(
                base,
                training=replace(
                    base.training,
                    workers=gpus,
                    min_workers=None,
                    gpus_per_worker=1.0,
                    micro_batch=micro,
                    global_batch=batch,
                    optimizer=scaled,
                    zero3=zero3,
                ),
            )
            for micro in range(1, batch // gpus + 1)
            if batch // gpus % micro == 0
        ]


def _largest(row: list[Recipe], scale: Callable[[Recipe], Scale]) -> Scale | None:
    """The largest micro-batch that fits, by bisection: a larger one takes no less memory, and no more traffic."""
    best, low, high = None, 0, len(row)
    while low < high:
        middle = (low + high) // 2
        one = scale(row[middle])
        if one.fits:
            best, low = one, middle + 1
        else:
            high = middle
    return best


def _fed(one: Scale, scale: Callable[[Recipe], Scale]) -> Scale:
    """With as many data tasks as its steps need."""
    tasks = math.ceil(SPARE_DATA * one.samples_per_s / one.machines.decoded)
    data = one.recipe.data
    return scale(replace(one.recipe, data=replace(data, data_tasks=max(data.data_tasks, tasks))))
