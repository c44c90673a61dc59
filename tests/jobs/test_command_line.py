"""The command line of every job: what is wrong is named before anything starts, and the exit status says which kind."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tyro

from jobs.command_line import Job, chosen
from jobs.pretrain import JOB as PRETRAIN
from jobs.recipes import RECIPES, recipe
from pipelines.config.recipe import Recipe
from pipelines.data.build import differences
from pipelines.io.console import say

ROOT = Path(__file__).resolve().parents[2]
NO_MODEL = ("--model", "no/such/model")
IMAGE = ("--prompt", "What?", "--image", __file__)
REGISTERED = ("--model", "models:/meteor@champion", "--tracking.uri", "http://u:secret@127.0.0.1:9")
STORAGE = ("--run.storage", "s3://x", "--tracking.uri", "http://127.0.0.1:9")


@dataclass(frozen=True)
class Line:
    """What a job says to a command line."""

    job: str
    misspelt: tuple[str, ...]
    nearest: str
    wrong: tuple[str, ...]
    message: str
    failing: tuple[str, ...] = ()


LINES = (
    Line(
        "pretrain",
        misspelt=("--training.global-bach", "64"),
        nearest="--training.global-batch",
        wrong=("--training.workers", "5"),
        message="workers is 5",
    ),
    Line(
        "finetune",
        misspelt=("--run.nam", "x"),
        nearest="--run.name",
        wrong=(*STORAGE, "--model.start", "models:/x"),
        message="models:/x is no address",
    ),
    Line("sweep", ("--budget", "8"), "--budgets", wrong=("--trials", "0"), message="trials is 0"),
    Line("calibrate", ("--modl", "x"), "--model", (*REGISTERED, "--samples", "1"), "samples is 1"),
    Line("evaluate", ("--modl", "x"), "--model", (*REGISTERED, "--questions", "0"), "questions is 0", REGISTERED),
    Line(
        "predict",
        misspelt=("--promt", "x"),
        nearest="--prompt",
        wrong=(*NO_MODEL, *IMAGE),
        message="no/such/model is no folder",
        failing=(*REGISTERED, *IMAGE),
    ),
    Line(
        "predict_shards",
        misspelt=("--manifst", "x"),
        nearest="--manifest",
        wrong=(*REGISTERED, "--output", "out", "--manifest", "nowhere"),
        message="manifest nowhere does not exist",
    ),
    Line("serve", (*REGISTERED, "--prt", "1"), "--port", (*REGISTERED, "--port", "0"), "port is 0"),
    Line(
        "visualize",
        misspelt=("--imag", "x"),
        nearest="--image",
        wrong=(*REGISTERED, "--image", "no.png", "--output", "out"),
        message="image no.png does not exist",
        failing=(*REGISTERED, *IMAGE, "--output", "out"),
    ),
    Line(
        "register",
        misspelt=("list", "--tracking.url", "x"),
        nearest="--tracking.uri",
        wrong=("promote",),
        message="tracking.uri is not set",
        failing=("list", "--tracking.uri", "http://u:secret@127.0.0.1:9"),
    ),
    Line("make_shards", ("openmoji", "--output", "x", "--varaints", "3"), "--variants", ("openmoji",), "--output"),
    Line("plan", ("--nods", "2"), "--nodes", ("--nodes", "0"), "nodes is 0"),
    Line("plan_cluster", ("--gpuz", "2"), "--gpus", ("--gpus", "12"), "gpus is 12; above machines.gpus-per-node, 8"),
    Line("submit", ("--addres", "x"), "--address", ("--address", "http://127.0.0.1:9"), "there is no command"),
    Line("make_parts", ("--outputt", "x"), "--output", ("dinov2-smal",), "did you mean 'dinov2-small'?"),
)
HEAVY: set[str] = set()
"""Not light yet."""
FILES = {path.stem for path in (ROOT / "jobs").glob("*.py") if "JOB = " in path.read_text()}


@pytest.fixture(autouse=True)
def no_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MLFLOW_TRACKING_URI", "METEOR_STORAGE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("METEOR_LOG_DIR", str(tmp_path / "logs"))


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started for settings that are wrong")

    monkeypatch.setattr(ray, "init", refuse)


def job_of(name: str) -> Job[Any]:
    job: Job[Any] = importlib.import_module(f"jobs.{name}").JOB
    return job


def said(capfd: pytest.CaptureFixture[str], name: str, *arguments: str) -> tuple[int, str]:
    """Exit status and standard error as one line; nothing else is printed."""
    status = job_of(name).main(arguments)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return status, " ".join(captured.err.split())


def test_every_job_is_in_the_table() -> None:
    assert {line.job for line in LINES} == FILES


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.job)
def test_a_misspelt_setting_names_the_nearest(line: Line, capfd: pytest.CaptureFixture[str], no_ray: None) -> None:
    status, message = said(capfd, line.job, *line.misspelt)
    assert status == 2
    assert line.nearest in message.split("Perhaps you meant" if "Perhaps" in message else "Missing from")[1]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.job)
def test_wrong_settings_are_told_before_anything_starts(
    line: Line, capfd: pytest.CaptureFixture[str], no_ray: None
) -> None:
    status, message = said(capfd, line.job, *line.wrong)
    assert (status, line.message in message) == (2, True), message


@pytest.mark.parametrize("line", [line for line in LINES if line.failing], ids=lambda line: line.job)
def test_what_fails_exits_with_1_and_hides_passwords(
    line: Line, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """MLflow is not where it should be."""
    status, message = said(capfd, line.job, *line.failing)
    assert (status, "127.0.0.1:9" in message) == (1, True), message
    assert "secret" not in message
    (log,) = (tmp_path / "logs").iterdir()
    assert str(log) in message
    assert "Traceback" in log.read_text()


@cache
def help_of(job: str) -> str:
    """What `--help` prints, and after it which heavy libraries it loaded."""
    code = (
        f"import sys; sys.argv = ['{job}.py', '--help']; from jobs.{job} import JOB\n"
        "try: JOB.main()\n"
        "finally: print('loaded', *sorted({'ray', 'mlflow', 'deepspeed'} & set(sys.modules)))"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("job", sorted(FILES - HEAVY))
def test_help_takes_no_ray_and_says_what_the_job_does(job: str) -> None:
    shown = help_of(job)
    assert shown.startswith(f"usage: {job}.py [-h]")
    assert "--verbose, --no-verbose" in shown
    assert shown.splitlines()[-1].split() == ["loaded"]


@pytest.mark.parametrize("job", sorted(FILES))
def test_the_completion_script_is_bash(job: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        job_of(job).main(["--tyro-print-completion", "bash"])
    assert not stopped.value.code
    script = capfd.readouterr().out
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert f"{job}.py" in script.split("complete -F")[1]


def test_the_completion_script_completes() -> None:
    shell = (
        f"source <({sys.executable} jobs/make_parts.py --tyro-print-completion bash)\n"
        "spec=$(complete -p make_parts.py) && COMP_WORDS=(jobs/make_parts.py --out) COMP_CWORD=1\n"
        '${spec#*-F } && echo "${COMPREPLY[@]}"'
    )
    shell = shell.replace("${spec#*-F }", "$(echo $spec | sed 's/.*-F \\([^ ]*\\).*/\\1/')")
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--output"]


# ------------------------------------------------------------------------------------------------------------- a job


@dataclass(frozen=True)
class Settings:
    """What is done."""

    number: int = 1
    """A number."""
    flag: bool = False
    """A flag."""
    more: tuple[str, ...] = field(default=())
    """More."""


def job(run: Any = lambda _: say("done"), **more: Any) -> Job[Settings]:
    return Job("example", Settings, run, "An example.", **more)


def test_status_and_log(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def fails(_: Settings) -> None:
        print("noise")
        os.write(2, b"native noise\n")
        say("shown")
        raise KeyError("missing")

    assert job().main([]) == 0
    assert capfd.readouterr().out == "done\n"
    assert not list((tmp_path / "logs").iterdir()), "a log that only holds that a short job went well"
    assert job(fails).main([]) == 1
    captured = capfd.readouterr()
    assert captured.out == "shown\n"
    assert captured.err.startswith("error: KeyError: 'missing'\n  ")
    (log,) = (tmp_path / "logs").iterdir()
    assert f"log: {log}" in captured.err
    assert log.read_text().splitlines()[:3] == ["noise", "native noise", "[meteor] shown"]
    assert job(fails).main(["--verbose"]) == 1
    assert capfd.readouterr().out.splitlines() == ["noise", "shown"]


def test_an_interrupt_has_a_status_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Settings) -> None:
        raise KeyboardInterrupt

    assert job(interrupted).main([]) == 130
    assert capfd.readouterr().err == "error: interrupted\n"


def test_truth_values_are_flags(capfd: pytest.CaptureFixture[str]) -> None:
    assert job().parse(["--flag"]).flag
    assert not job().parse(["--no-flag"]).flag
    assert job().main(["--flag", "True"]) == 2
    assert "Unrecognized options: True" in capfd.readouterr().err
    for name in FILES:
        assert tyro.conf.FlagConversionOff not in vars(importlib.import_module(f"jobs.{name}")).values()


def test_an_option_that_chooses_defaults() -> None:
    assert chosen(["--x", "1", "--recipe", "small"], "--recipe", "tiny") == "small"
    assert chosen(["--recipe=small"], "--recipe", "tiny") == "small"
    assert chosen(["--recipe"], "--recipe", "tiny") == "tiny"


# ------------------------------------------------------------------------------------------------------------ recipes


def parsed(*arguments: str) -> Recipe:
    settings: Recipe = PRETRAIN.parse(arguments).settings
    return settings


@pytest.fixture
def refused() -> Any:
    def message(*arguments: str) -> str:
        with pytest.raises(ValueError) as caught:
            parsed(*arguments)
        return " ".join(str(caught.value).split())

    return message


def test_an_unknown_recipe_names_the_nearest(refused: Any) -> None:
    message = refused("--recipe", "tinyy")
    assert f"unknown pretrain recipe 'tinyy'; known: {', '.join(sorted(RECIPES['pretrain']))}; " in message
    assert "did you mean 'tiny'?" in message


def test_a_world_size_that_leaves_workers_idle_names_the_numbers(refused: Any) -> None:
    message = refused("--training.workers", "5")
    assert "workers is 5, but training.global_batch 32 has only 2 micro-batches of 16" in message
    assert "settings.settings" not in message


def test_a_budget_above_the_tokens_names_both(refused: Any) -> None:
    message = refused("--pruning.encode.totals", "300", "64", "64")
    assert "pruning.encode.totals[0]" in message
    assert "300" in message
    assert "128" in message
    assert "fuse.keep 99 exceeds the 64 tokens" in refused("--pruning.fuse.keep", "99")


def test_a_value_of_the_wrong_type_names_the_setting(refused: Any) -> None:
    assert "--training.epochs" in refused("--training.epochs", "many")


def test_settings_arrive_and_the_rest_keeps_the_recipe() -> None:
    settings = parsed("--training.epochs", "2", "--training.optimizer.learning-rates.llm", "None")
    assert settings.training.epochs == 2
    assert settings.training.optimizer.learning_rates.llm is None
    assert settings.pruning == recipe("pretrain", "tiny").pruning
    assert parsed("--recipe", "small").model.architecture == "small"


def test_the_finetune_recipe_starts_from_what_pretrain_registered() -> None:
    assert recipe("finetune", "tiny").model.start == "models:/meteor@latest-pretrain"


def test_every_recipe_is_valid() -> None:
    for name, recipes in RECIPES.items():
        for of in recipes:
            assert recipe(name, of).name == of


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
    text = " ".join(help_of(job).replace("│", " ").split())
    for flag in (
        "--recipe {eagle_x4_7b,",
        "--data.manifest",
        "--pruning.encode.totals",
        "--training.zero3.offload",
        "--run.storage",
        "--tracking.uri",
    ):
        assert flag in text
    assert "Samples of one optimizer step over all workers; a multiple of micro_batch. (default: 32)" in text
