"""Every recipe fits its architecture: budgets and token counts, no weight."""

from __future__ import annotations

import pytest

from jobs.recipes import RECIPES
from tests.meteor_model.test_architectures import DENSE_SHAPES, vicuna_config

EVERY_RECIPE = [(job, name) for job, recipes in RECIPES.items() for name in recipes]
PRUNED_TOKENS = {"meteor_x4_1b": 160, "meteor_x4_7b": 576, "small": 96, "tiny": 32}


@pytest.mark.parametrize(("job", "name"), EVERY_RECIPE)
def test_a_recipe_fits_its_architecture(job: str, name: str) -> None:
    recipe = RECIPES[job][name]()
    config = vicuna_config(recipe.model.architecture, recipe.pruning)
    dense, _ = DENSE_SHAPES[recipe.model.architecture]
    assert config.tokens_per_image == PRUNED_TOKENS.get(recipe.model.architecture, dense)
    encode = recipe.pruning.encode
    if encode.enabled:
        left = [budget[-1] for budget in config.encode_budgets.values()]
        assert sum(left) == encode.totals[-1]
        assert min(left) >= 1
