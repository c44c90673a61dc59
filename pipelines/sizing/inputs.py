"""What all formulas of an estimate share, under one name each."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config.recipe import Recipe
from pipelines.sizing.activations import Activations
from pipelines.sizing.layout import Layout
from pipelines.sizing.model_size import ModelSize
from pipelines.sizing.work import Work


def task_cpus(recipe: Recipe) -> int:
    """CPUs of a task that holds a whole model: those of one worker where it has a GPU, else those of all of them.

    The workers have ended by then, or not begun.
    """
    training = recipe.training
    return max(1, round(training.cpus_per_worker * (1 if training.uses_gpu else training.workers)))


@dataclass(frozen=True)
class Inputs:
    """Everything that is known of a run before it begins."""

    recipe: Recipe
    layout: Layout
    size: ModelSize
    activations: Activations | None
    work: Work | None

    @property
    def workers(self) -> int:
        """W."""
        return self.recipe.training.workers

    @property
    def on_node(self) -> int:
        """w: the most workers of one node."""
        return self.layout.workers_per_node(self.recipe)

    @property
    def task_cpus(self) -> int:
        """CPUs that a phase's task reserves."""
        return task_cpus(self.recipe)

    @property
    def weight_bytes(self) -> int:
        """B."""
        return 2 if self.recipe.training.precision == "bf16" else 4

    @property
    def whole(self) -> float:
        """Bytes of the stored start model, fp32: 4 P."""
        return 4.0 * self.size.total

    @property
    def exported(self) -> float:
        """Bytes of the exported model: e P, adapters merged."""
        return (2.0 if self.recipe.export_precision == "bf16" else 4.0) * (self.size.total - self.size.adapters)

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint: fp32 weights and both moments of AdamW of what is trained. The rest is in `init/`."""
        return 12.0 * self.size.learning

    @property
    def steps(self) -> int | None:
        """Optimizer steps; None where the number of samples is not known."""
        return self.layout.steps(self.recipe)

    @property
    def checkpoints(self) -> int:
        """How many the training writes, the last one included; 1 where its length is not known."""
        every = self.recipe.training.checkpoint_every_steps
        return 1 if self.steps is None else -(-self.steps // every)

    @property
    def validations(self) -> int:
        """How many are asked for; the last checkpoint needs none."""
        every = self.recipe.training.validate_every_checkpoints
        return (self.checkpoints - 1) // every if every else 0

    @property
    def on_gpu(self) -> bool:
        """Whether the workers train on GPUs."""
        return self.recipe.training.uses_gpu
