"""jobs/visualize.py: what is refused before a model is loaded, and the files that a run writes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.settings import OtherPruner, Tracking
from jobs.visualize import JOB, Visualize, check, run
from pipelines.inference.ask import ask
from pipelines.registry.folder import export_model
from tests.meteor_model.builders import PRUNED, model, processor

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Visualize:
    """A request that can be answered: a tiny model's folder, an image, two prompts."""
    folder = tmp_path_factory.mktemp("visualize")
    uncalibrated = replace(PRUNED, decode=replace(PRUNED.decode, lam=None))
    export_model(model(uncalibrated), processor(uncalibrated), folder / "model")
    Image.linear_gradient("L").convert("RGB").save(folder / "image.png")
    return Visualize(str(folder / "model"), folder / "image.png", folder / "out", ("What colour?", "Where?"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": Path("nowhere.png")}, "image nowhere.png does not exist"),
        ({"rank_images": (Path("nowhere.png"),)}, "image nowhere.png does not exist"),
        ({"prompt": ()}, "prompt is missing"),
        ({"only": ()}, "only is empty"),
        ({"pruner": OtherPruner("fastv")}, "give pruner.name and pruner.keep together"),
        ({"pruner": OtherPruner("fastv", 8)}, "set only to kept"),
        ({"compare": -1}, "compare is -1; it must be a number of visual tokens"),
        ({"compare": 8, "only": ("ranks",), "prompt": ()}, "give a prompt, and no pruner.name"),
        ({"output": Path(__file__)}, "test_visualize.py is not a folder"),
        ({"model": "models:/meteor@latest", "tracking": Tracking("")}, "tracking.uri is not set"),
        ({"model": "models:/meteor"}, "models:/meteor is no address"),
        ({"model": "gs://bucket/model"}, "gs://bucket/model is of an unknown kind"),
        ({"model": "facebook/dinov2-small"}, "facebook/dinov2-small is no folder on this machine"),
    ],
)
def test_bad_settings_are_named(asked: Visualize, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(asked, **change))


def test_an_uncalibrated_model_says_so_and_takes_a_mean(asked: Visualize, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"pruning\.decode\.lam is not set"):
        run(replace(asked, only=("kept",)))
    assert not asked.output.exists()
    run(replace(asked, decode_mean=9.0))
    files = list(asked.output.iterdir())
    assert {file.stem for file in files} == {"overview", "encode", "fuse", "decode", "ranks", "vav"}
    assert all(Image.open(file).format == "PNG" and min(Image.open(file).size) > 400 for file in files)
    assert "keeps 9 tokens on average" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("pruner", "sheets"),
    [
        (OtherPruner("fastv", 8, {"layer": 1}), {"overview", "encode", "fuse", "decode"}),
        (OtherPruner("divprune", 8), {"overview", "encode", "fuse"}),
    ],
)
def test_another_pruner_is_drawn(asked: Visualize, tmp_path: Path, pruner: OtherPruner, sheets: set[str]) -> None:
    run(replace(asked, only=("kept",), pruner=pruner, output=tmp_path))
    assert {file.stem for file in tmp_path.iterdir()} == sheets


def test_every_pruner_is_drawn_beside_the_model_s_own_stages(asked: Visualize, tmp_path: Path) -> None:
    run(replace(asked, decode_mean=9.0, only=("kept",), compare=8, output=tmp_path))
    assert (tmp_path / "pruners.png").is_file()
    with pytest.raises(ValueError, match="193 visual tokens cannot be kept: an image has 192"):
        run(replace(asked, only=("ranks",), compare=193, output=tmp_path))


def test_another_pruner_answers_and_says_what_it_keeps(asked: Visualize) -> None:
    reply = ask(asked.model, "What colour?", [asked.image], 4, "cpu", "", ("fastv", 8, {"layer": 1}))
    assert reply.visual_tokens["visual_tokens.decode"] == "192 > 8 (1 image(s))"
    with pytest.raises(ValueError, match="pruner 'fasvt' is unknown"):
        ask(asked.model, "What colour?", [asked.image], 4, "cpu", "", ("fasvt", 8, {}))


def test_the_command_line(asked: Visualize, tmp_path: Path) -> None:
    request = ["--model", asked.model, "--image", str(asked.image), "--output", str(tmp_path), "--only", "ranks", "vav"]
    command = [sys.executable, "jobs/visualize.py", *request, "--prompt", "What?", "--prompt", "Where?"]
    drawn = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert drawn.returncode == 0, drawn.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ranks.png", "vav.png"]


def test_a_fault_is_one_line_and_exit_code_2(asked: Visualize, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", asked.model, "--image", str(asked.image), "--output", str(asked.output)]
    assert JOB.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: prompt is missing")
