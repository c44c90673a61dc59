"""A recipe is the same one for ever: the digests of the named recipes are those under which runs are stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.recipes import RECIPES, recipe
from pipelines.io.fingerprint import sha256
from tune.settings import SweepSettings

DIGESTS = json.loads(Path(__file__).with_name("recipe_digests.json").read_text())


@pytest.mark.parametrize(("job", "name"), [(job, name) for job, recipes in RECIPES.items() for name in recipes])
def test_the_digest_of_a_stored_run_is_found_again(job: str, name: str) -> None:
    assert recipe(job, name).digest() == DIGESTS[job][name], (
        f"runs of {job} {name} that are stored would not go on; a new setting that changes no training belongs to "
        "recipe.OPERATION, and one that does needs a default that identity() leaves out"
    )


def digest(settings: SweepSettings) -> str:
    return sha256(json.dumps(settings.identity(), sort_keys=True))[:6]


def test_the_identity_of_a_stored_sweep_is_found_again() -> None:
    assert digest(SweepSettings(pareto=True, storage="s3://anywhere")) == "8aa9c7"
    assert digest(SweepSettings(budgets=(8.0, 16.0), kind="finetune")) == "17bcd1"
    assert digest(SweepSettings(budgets=(8, 16), kind="finetune")) == "17bcd1"
