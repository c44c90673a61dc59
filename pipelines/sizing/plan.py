"""The whole estimate of a run, everything counted: for `jobs/plan.py`, and for a job before it builds a large model."""

from __future__ import annotations

from pipelines.checkpoint.zero3 import weight_dtype
from pipelines.config.recipe import Recipe
from pipelines.sizing.activations import count_activations
from pipelines.sizing.estimate import estimate
from pipelines.sizing.layout import Layout
from pipelines.sizing.model_size import model_config, model_size
from pipelines.sizing.terms import Estimate
from pipelines.sizing.work import count_work


def plan_run(recipe: Recipe, layout: Layout) -> Estimate:
    """Sizes, activations and FLOPs of a run; some ten seconds for 7 billion parameters.

    Raises:
        ValueError: naming the setting that does not fit the model.
    """
    config = model_config(recipe)
    size = model_size(recipe, config)
    training = recipe.training
    activations = count_activations(
        config,
        size.trained,
        micro_batch=training.micro_batch,
        length=max(recipe.data.max_length, config.tokens_per_image + 1),
        dtype=weight_dtype(training),
        checkpointing=training.gradient_checkpointing,
        loss_chunk=training.loss_chunk,
    )
    work = count_work(config, layout.text_tokens, whole_head=training.loss_chunk is None)
    return estimate(recipe, layout, size, activations, work)
