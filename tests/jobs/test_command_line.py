"""The command line of the training jobs: every setting is there; what is wrong is named, with the nearest right one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.recipes import RECIPES, parse_recipe, recipe
from pipelines.data.build import differences

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What is printed for arguments that must be refused, as one line."""
    with pytest.raises(SystemExit) as stopped:
        parse_recipe("pretrain", "Train.", arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    return " ".join((captured.err + captured.out).replace("│", " ").split())


def test_an_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--recipe", "tinyy")
    assert f"unknown pretrain recipe 'tinyy'; known: {', '.join(sorted(RECIPES['pretrain']))}; " in message
    assert "did you mean 'tiny'?" in message


def test_an_unknown_setting_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--training.global-bach", "64")
    assert "Unrecognized options: --training.global-bach" in message
    assert "--training.global-batch" in message.split("Perhaps you meant")[1]


def test_a_world_size_that_leaves_workers_idle_names_the_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--training.workers", "5")
    assert "training.workers is 5, but training.global_batch 32 has only 2 micro-batches of 16" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--training.workers", "0"), "training.workers is 0; it must be at least 1"),
        (("--training.optimizer.beta1", "1"), "training.optimizer.beta1 is 1.0; it must be in [0, 1)"),
        (("--training.optimizer.learning-rates.llm", "0"), "learning_rates.llm is 0.0; it must be above 0, or None"),
        (("--data.mixture", "s3://b/a", "0"), "data.mixture.s3://b/a is 0.0; it must be above 0"),
        (("--source.image-size", "8"), "image_size is 8; it must be in [16, 2048]"),
        (("--tracking.patience-s", "-1"), "tracking.patience_s is -1.0; it must be at least 0"),
    ],
)
def test_a_value_out_of_range_names_the_setting_and_the_range(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in refused(capsys, *arguments)


def test_a_budget_above_the_tokens_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "--pruning.encode.totals", "300", "64", "64")
    assert "pruning.encode.totals[0]" in message
    assert "300" in message
    assert "128" in message
    assert "fuse.keep 99 exceeds the 64 tokens" in refused(capsys, "--pruning.fuse.keep", "99")


def test_a_value_of_the_wrong_type_names_the_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--training.epochs" in refused(capsys, "--training.epochs", "many")


def test_settings_arrive_and_the_rest_keeps_the_recipe() -> None:
    parsed = parse_recipe("pretrain", "", ["--training.epochs", "2", "--training.optimizer.learning-rates.llm", "None"])
    assert parsed.training.epochs == 2
    assert parsed.training.optimizer.learning_rates.llm is None
    assert parsed.pruning == recipe("pretrain", "tiny").pruning


def test_the_finetune_recipe_starts_from_what_pretrain_registered() -> None:
    assert recipe("finetune", "tiny").model.start == "models:/meteor@latest-pretrain"


def test_every_recipe_is_valid() -> None:
    for job, recipes in RECIPES.items():
        for name in recipes:
            assert recipe(job, name).name == name


def test_identity_ignores_places_and_resources_only() -> None:
    base = recipe("pretrain", "tiny")
    moved = replace(base, run=replace(base.run, storage="s3://elsewhere", name="x", output="/tmp/y"))
    assert moved.digest() == base.digest()
    elsewhere = replace(base.training, timeout_s=5, workers=1, min_workers=1, checkpoint_every_steps=7, max_failures=9)
    assert replace(base, training=elsewhere).digest() == base.digest()
    assert replace(base, data=replace(base.data, bad_shards="drop", data_tasks=9)).digest() == base.digest()
    other = replace(base, training=replace(base.training, seed=7))
    assert other.digest() != base.digest()
    assert differences(base.identity(), other.identity()) == ["training.seed: 0 -> 7"]


@pytest.mark.parametrize("job", ["pretrain", "finetune"])
def test_help_shows_every_setting_with_doc_and_default(job: str) -> None:
    command = [sys.executable, f"jobs/{job}.py", "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    text = " ".join(shown.replace("│", " ").split())
    for flag in (
        "--data.manifest",
        "--pruning.encode.totals",
        "--training.zero3.offload",
        "--run.storage",
        "--tracking.uri",
    ):
        assert flag in text
    assert "Samples of one optimizer step over all workers; a multiple of micro_batch. (default: 32)" in text
