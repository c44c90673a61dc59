"""A recipe is the same one for ever: the digests of the named recipes are those under which runs are stored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.recipes import RECIPES, recipe
from pipelines.config.settings import LoraSettings
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
    assert digest(SweepSettings(storage="s3://anywhere")) == "72251e"
    assert digest(SweepSettings(budgets=(8.0, 16.0), kind="finetune")) == "db87cc"
    assert digest(SweepSettings(budgets=(8, 16), kind="finetune")) == "db87cc"


def test_a_default_that_came_later_is_left_out_and_another_value_is_not() -> None:
    plain = recipe("pretrain", "tiny")
    other = replace(plain, data=replace(plain.data, too_long="drop"))
    assert "too_long" not in plain.identity()["data"]
    assert other.identity()["data"]["too_long"] == "drop"
    assert other.digest() != plain.digest()


def test_adapters_are_a_part_of_what_is_trained_once_they_have_a_rank() -> None:
    plain = recipe("finetune", "tiny")
    without = replace(plain, training=replace(plain.training, lora=LoraSettings(alpha=8)))
    adapted = replace(plain, training=replace(plain.training, lora=LoraSettings(rank=4)))
    assert without.digest() == plain.digest() != adapted.digest()
    assert adapted.identity()["training"]["lora"]["rank"] == 4


def test_a_run_goes_on_with_another_second_partition() -> None:
    plain = recipe("pretrain", "tiny")
    zero3 = replace(plain.training.zero3, secondary_partition=2)
    assert replace(plain, training=replace(plain.training, zero3=zero3)).digest() == plain.digest()
