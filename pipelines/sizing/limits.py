"""Limits on time that follow from a model's size, so that no default fits one size alone."""

from __future__ import annotations

from pipelines.config.recipe import Recipe
from pipelines.sizing.layout import Layout
from pipelines.sizing.model_size import model_config, model_size

VALIDATION_FLOOR_S = 1800.0
"""The least time that a validation of any size gets."""
SLOW_GPU = 5e12
"""FLOP/s that any GPU which trains reaches."""
SLOW_CPU = 2e9
"""FLOP/s that any CPU core reaches beside others."""
SLOW_STORE = 10e6
"""Bytes a second that any store gives."""


def validation_limit_s(recipe: Recipe) -> float:
    """Seconds that a validation of a recipe's model may take on a slow machine.

    FLOPs are taken as 2 for each parameter and token that it sees, on all tokens of the towers; model, checkpoint and
    held-out losses with true and with other images as `pipelines.sizing.training` has them.
    """
    config = model_config(recipe)
    size, settings = model_size(recipe, config), recipe.training
    sees = {**config.encoder_tokens, "projector": sum(config.encoder_tokens.values())}
    sees["llm"] = config.tokens_per_image + Layout().text_tokens
    flops = sum(2.0 * count * sees[name] for name, count in size.modules.items())
    gpus = settings.gpus_per_validation
    speed = SLOW_GPU if gpus else SLOW_CPU * max(settings.validation_cpus, 0.5)
    moved = 4 * size.total + 12 * size.learning
    return VALIDATION_FLOOR_S + 2 * recipe.data.heldout_samples * flops / speed + moved / SLOW_STORE
