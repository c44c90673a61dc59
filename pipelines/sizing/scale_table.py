"""Scales side by side for people: a column each, and the settings that make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines.config.settings import PARTS
from pipelines.sizing.at_scale import Scale
from pipelines.sizing.table import aligned, size_text, time_text


def duration(seconds: float) -> str:
    """Seconds of a step, in three digits below ten."""
    return f"{seconds:.3g} s" if 0 < seconds < 10 else time_text(seconds) or "-"


def rate(amount: float) -> str:
    """Bytes a second."""
    return f"{size_text(amount)}/s"


LINES: tuple[tuple[str, Callable[[Scale], str]], ...] = (
    ("GPUs", lambda one: str(one.recipe.training.workers)),
    ("nodes", lambda one: str(one.layout.nodes)),
    ("global batch", lambda one: str(one.recipe.training.global_batch)),
    ("micro-batch", lambda one: str(one.recipe.training.micro_batch)),
    ("one after the other", lambda one: str(one.recipe.training.accumulation)),
    ("offloaded", lambda one: one.recipe.training.zero3.offload),
    ("second partition", lambda one: str(one.recipe.training.zero3.secondary_partition)),
    ("data tasks", lambda one: str(one.recipe.data.data_tasks)),
    ("memory of a GPU", lambda one: size_text(one.peak["gpu"])),
    ("  of it in steps", lambda one: size_text(one.found.total("train", "gpu", "gpu"))),
    ("memory of a node", lambda one: size_text(one.peak["ram"])),
    ("step", lambda one: duration(one.step_s)),
    ("  computing", lambda one: duration(one.waits["computing"])),
    ("  network", lambda one: duration(one.waits.get("network", 0.0))),
    ("  store, beside", lambda one: duration(one.waits["store"])),
    ("binds", lambda one: one.binds),
    ("samples/s", lambda one: f"{one.samples_per_s:.3g}"),
    ("read from the store", lambda one: rate(one.read_bytes / one.step_s)),
    ("written, on average", lambda one: rate(one.written_bytes / one.step_s)),
    ("store gives", lambda one: rate(one.store_rate)),
    ("start model fetched", lambda one: time_text(one.start_s)),
    ("steps", lambda one: f"{one.steps:,}"),
    ("training", lambda one: time_text(one.steps * one.step_s)),
)


def scale_table(scales: Sequence[Scale]) -> str:
    """What the model is, a line a quantity and a column a scale, then the settings of each."""
    facts = [f"{name:<10}{text}" for name, text in scales[0].found.facts if name in ("model", "trained")]
    rows = [[title, *(text(one) for one in scales)] for title, text in LINES]
    settings = [f"{one.recipe.training.workers} GPUs: {' '.join(arguments(one))}" for one in scales]
    return "\n".join([*facts, "", *aligned(rows), "", *settings])


def arguments(one: Scale) -> list[str]:
    """The settings of a scale as a command line gives them."""
    training, rates = one.recipe.training, one.recipe.training.optimizer.learning_rates
    given = {
        "training.workers": training.workers,
        "training.gpus-per-worker": 1,
        "training.micro-batch": training.micro_batch,
        "training.global-batch": training.global_batch,
        "training.zero3.secondary-partition": training.zero3.secondary_partition,
        "training.zero3.offload": training.zero3.offload,
        **{f"training.optimizer.learning-rates.{part}": f"{rates.of(part):.4g}" for part in PARTS if rates.of(part)},
        "data.data-tasks": one.recipe.data.data_tasks,
    }
    return [f"--{name} {value}" for name, value in given.items()]
