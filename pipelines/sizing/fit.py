"""Whether a run fits the cluster: what cannot be is refused with the setting to change, what is doubtful is said."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipelines.config.recipe import Recipe
from pipelines.config.settings import SettingsError
from pipelines.io.console import say
from pipelines.sizing.cluster import Node, look_at_nodes
from pipelines.sizing.estimate import estimate
from pipelines.sizing.layout import Layout
from pipelines.sizing.model_size import model_config, model_size
from pipelines.sizing.plan import plan_run
from pipelines.sizing.store_speed import measure_store_mb
from pipelines.sizing.table import size_text, table
from pipelines.sizing.terms import Estimate, Place

LARGE = 1_000_000_000
"""Parameters from which activations and FLOPs are counted, too; it takes seconds, and a smaller model fits anyway."""
SURE = 1.25
"""Memory is estimated within 20 %: what surely takes more than so many times what is there is refused. Less, and what
only the longest samples take, is doubted."""

ON_GPU: tuple[Place, ...] = ("gpu",)
SAVES_GPU = (
    "training.micro_batch, training.gradient_checkpointing, more training.workers, training.zero3.offload or "
    "data.max_length"
)


@dataclass(frozen=True)
class Finding:
    """One thing that does not fit, or may not."""

    level: Literal["refused", "doubtful"]
    text: str


def check_fit(recipe: Recipe, samples: int, data_bytes: int, tell: Callable[[str], None] = say) -> Estimate:
    """The size of a run, compared with the cluster that this process is connected to; one line where it fits.

    Raises:
        SettingsError: naming what does not fit, with both numbers and the settings to change.
    """
    nodes = look_at_nodes()
    layout = Layout(max(1, _training_nodes(recipe, nodes)), 0.0, samples, data_bytes)
    size = model_size(recipe, model_config(recipe))
    if size.total >= LARGE:
        measured = measure_store_mb(recipe.run.storage)
        tell(f"  store     {measured:.0f} MB/s between {recipe.run.storage} and this machine, measured just now")
        found = plan_run(recipe, replace(layout, speeds=replace(layout.speeds, store_mb=measured)))
    else:
        found = estimate(recipe, layout, size)
    judged = list(findings(recipe, found, nodes))
    if refused := [one.text for one in judged if one.level == "refused"]:
        tell(table(found))
        raise SettingsError("this run does not fit the cluster: " + "; ".join(refused))
    if size.total >= LARGE:
        tell(table(found))
    for one in judged:
        tell(f"  warning: {one.text}")
    if not judged:
        tell(f"  fits      {summary(found, nodes)}")
    return found


def _training_nodes(recipe: Recipe, nodes: Sequence[Node]) -> int:
    """Nodes that the workers are spread over when Ray packs them."""
    training, left, used = recipe.training, recipe.training.workers, 0
    for node in sorted(nodes, key=lambda one: (one.gpus, one.cpus), reverse=True):
        has, needs = (
            (node.gpus, training.gpus_per_worker) if training.uses_gpu else (node.cpus, training.cpus_per_worker)
        )
        room = int(has / needs + 1e-9) if needs else left
        if left > 0 and room > 0:
            left, used = left - room, used + 1
    return used


def findings(recipe: Recipe, found: Estimate, nodes: Sequence[Node]) -> Iterator[Finding]:
    """Everything that does not fit these nodes, or may not."""
    yield from _counts(recipe, nodes)
    workers = [node for node in nodes if node.gpus] if recipe.training.uses_gpu else nodes
    disk = found.peak("task", "temp")[1]
    roomiest = max(nodes, key=lambda node: (node.temp_free >= disk, node.ram))  # for the tasks of the phases
    for node in nodes:
        places: list[Place] = [
            *(("head",) if node.head else ()),
            *(("task",) if node is roomiest else ()),
            *(("node",) if node in workers else ()),
        ]
        for need in (_memory(found, node, places), _disk(found, node, places)):
            if need is not None:
                yield need
    yield from _gpu(found, workers)
    yield from _validation(recipe, found, nodes)


def _counts(recipe: Recipe, nodes: Sequence[Node]) -> Iterator[Finding]:
    training, data = recipe.training, recipe.data
    cpus = sum(node.cpus for node in nodes)
    least = (training.min_workers or training.workers) * training.cpus_per_worker
    if least <= cpus < least + data.data_task_cpus:
        yield Finding(
            "refused",
            f"the workers reserve {least:g} of the cluster's {cpus:g} CPUs, which leaves no data task its "
            f"{data.data_task_cpus:g}, so they would wait for data for ever: lower training.cpus_per_worker, "
            "training.workers or data.data_task_cpus",
        )


def _memory(found: Estimate, node: Node, places: Sequence[Place]) -> Finding | None:
    phase, need = found.peak_of(places, "ram")
    if need <= 0.9 * node.ram:
        return None
    sure = found.peak_of(places, "ram", bounds=False)[1]
    level: Literal["refused", "doubtful"] = "refused" if sure > SURE * node.ram else "doubtful"
    return Finding(
        level,
        f"{node.name} has {size_text(node.ram)} of memory, {phase} takes about {size_text(need)} there: give it more, "
        "or change training.workers, training.micro_batch or data.data_tasks",
    )


def _disk(found: Estimate, node: Node, places: Sequence[Place]) -> Finding | None:
    phase, need = found.peak_of(places, "temp", bounds=False)
    if need <= node.temp_free:
        return None
    return Finding(
        "refused",
        f"{node.name} has {size_text(node.temp_free)} free in {node.temp}, {phase} takes {size_text(need)} there: make "
        "room, or set TMPDIR to a folder on a larger disk where Ray is started",
    )


def _gpu(found: Estimate, workers: Sequence[Node]) -> Iterator[Finding]:
    phase, need = found.peak("gpu", "gpu")
    known = [node for node in workers if node.gpu_memory is not None]
    if not known or not need:
        return
    least = min(known, key=lambda node: node.gpu_memory or 0.0)
    assert least.gpu_memory is not None
    if need > 0.9 * least.gpu_memory:
        sure = found.peak_of(ON_GPU, "gpu", bounds=False)[1]
        level: Literal["refused", "doubtful"] = "refused" if sure > SURE * least.gpu_memory else "doubtful"
        has = size_text(least.gpu_memory)
        yield Finding(
            level, f"a GPU of {least.name} has {has}, {phase} takes about {size_text(need)}: change {SAVES_GPU}"
        )


def _validation(recipe: Recipe, found: Estimate, nodes: Sequence[Node]) -> Iterator[Finding]:
    training = recipe.training
    if not training.validate_every_checkpoints:
        return
    gpus = sum(node.gpus for node in nodes)
    wanted = training.gpus_per_validation
    if wanted and gpus - training.workers * training.gpus_per_worker < wanted:
        yield Finding(
            "doubtful",
            f"a validation wants {wanted:g} GPU beside those of {training.workers} workers, the cluster has {gpus:g} "
            "in all, so none will be made: use fewer training.workers, training.validation_gpus 0 (on a CPU), or "
            "training.validate_every_checkpoints 0",
        )
    every, steps = training.checkpoint_every_steps, found.steps
    took, all_steps = found.total("validation", "node", "time"), found.total("train", "node", "time")
    if (
        took
        and steps
        and all_steps
        and took > (interval := all_steps / steps * every * training.validate_every_checkpoints)
    ):
        yield Finding(
            "doubtful",
            f"a validation takes about {took / interval:.1f} times as long as the steps between two of them, so some "
            "checkpoints are passed over: give it more (training.validation_gpus, training.validation_cpus), or ask "
            "for fewer (training.validate_every_checkpoints, data.heldout_samples)",
        )


def summary(found: Estimate, nodes: Sequence[Node]) -> str:
    """Peaks beside what is there, on one line."""
    places: list[Place] = ["head", "task", "node"]
    if len(nodes) > 1:
        places = ["task", "node"]
    ram, temp = found.peak_of(places, "ram")[1], found.peak_of(places, "temp")[1]
    has, free = min(node.ram for node in nodes), min(node.temp_free for node in nodes)
    many = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    return (
        f"{many}: memory {size_text(ram)} of {size_text(has)}, temporary files {size_text(temp)} of {size_text(free)}, "
        f"to the store {size_text(found.moved('up'))} (make plan shows it by phase)"
    )
