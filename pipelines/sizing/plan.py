"""The whole estimate of a run, everything counted: for `jobs/plan.py`, and for a job before it builds a large model."""

from __future__ import annotations

from pipelines.checkpoint.zero3 import weight_dtype
from pipelines.config.recipe import Recipe
from pipelines.sizing.activations import Activations, count_activations
from pipelines.sizing.estimate import estimate
from pipelines.sizing.layout import Layout
from pipelines.sizing.model_size import model_config, model_size
from pipelines.sizing.terms import Estimate
from pipelines.sizing.work import count_work


class Counts:
    """What is counted on the modules of a recipe's model, once; activations once for each micro-batch.

    Args:
        recipe: whose model, data and training it is; `workers`, batches and `zero3` may differ in what is estimated.
        text_tokens: of a sample, on average.

    Raises:
        ValueError: naming the setting that does not fit the model.
    """

    def __init__(self, recipe: Recipe, text_tokens: int) -> None:
        self._config = model_config(recipe)
        self.size = model_size(recipe, self._config)
        self._work = count_work(self._config, recipe.training, text_tokens)
        self._activations: dict[int, Activations] = {}

    def estimate(self, recipe: Recipe, layout: Layout) -> Estimate:
        """Of this model under other numbers of workers, other batches, another layout."""
        return estimate(recipe, layout, self.size, self._activations_of(recipe), self._work)

    def _activations_of(self, recipe: Recipe) -> Activations:
        training = recipe.training
        if training.micro_batch not in self._activations:
            self._activations[training.micro_batch] = count_activations(
                self._config,
                self.size.trained,
                micro_batch=training.micro_batch,
                length=max(recipe.data.max_length, self._config.tokens_per_image + 1),
                dtype=weight_dtype(training),
                checkpointing=training.gradient_checkpointing,
                loss_chunk=training.loss_chunk,
            )
        return self._activations[training.micro_batch]


def plan_run(recipe: Recipe, layout: Layout) -> Estimate:
    """Sizes, activations and FLOPs of a run; some ten seconds for 7 billion parameters.

    Raises:
        ValueError: naming the setting that does not fit the model.
    """
    return Counts(recipe, layout.text_tokens).estimate(recipe, layout)
