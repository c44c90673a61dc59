"""Register, pull and ask: through the registry alone, also from a process that has nothing of this project."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.pyfunc import PythonModelContext
from PIL import Image

from jobs import predict
from meteor_model.limits import RequestLimits
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.registry.folder import ExportError
from pipelines.registry.publish import pull_model, register_model
from pipelines.registry.pyfunc_model import MeteorPyfunc
from pipelines.registry.versions import RegisteredVersion, Registry, pin_model
from pipelines.tracking.server import TrackingError
from tests.pipelines.mlflow_fixture import MODEL_NAME, Server

pytestmark = pytest.mark.stack


def png(colour: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (80, 60), colour).save(stream, format="PNG")
    return stream.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def expected_answer(
    tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor], prompt: str, images: list[bytes], new_tokens: int
) -> str:
    """One sample alone, no padding."""
    model, processor = tiny
    batch = processor(prompt, [images])
    ids = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=2)
    return processor.decode(ids[0, batch["input_ids"].shape[1] :])


def test_what_is_registered(server: Server, registered: RegisteredVersion, run_id: str, tmp_path: Path) -> None:
    client = MlflowClient(server.uri)
    version = client.get_model_version_by_alias(MODEL_NAME, "latest-pretrain")
    assert (version.run_id, version.status) == (run_id, "READY")
    assert version.tags["visual_tokens.fuse"] == "64 > 32"
    assert version.tags["git_commit"] == "abc"
    assert version.tags["hub_token"] == "(redacted)"
    assert [output.model_id for output in client.get_run(run_id).outputs.model_outputs] == [registered.model_id]

    packed = Path(mlflow.artifacts.download_artifacts(registered.uri, dst_path=str(tmp_path), tracking_uri=server.uri))
    names = {path.relative_to(packed).as_posix() for path in packed.rglob("*")}
    assert {"pyfunc_model.py", "code/meteor_model/modeling_meteor.py", "serving_input_example.json"} <= names
    assert not [name for name in names if name.endswith(".pkl") or "__pycache__" in name]
    requirements = (packed / "requirements.txt").read_text().splitlines()
    assert f"torch=={torch.__version__.split('+')[0]}" in requirements
    assert all("==" in line for line in requirements)
    signature = mlflow.models.Model.load(str(packed)).signature
    assert signature.inputs.input_names() == ["image", "prompt"]
    assert [param.name for param in signature.params.params] == ["max_new_tokens", "visual_tokens"]


FRESH = """
import json, sys
import mlflow
rows, new_tokens = json.load(sys.stdin)
model = mlflow.pyfunc.load_model(sys.argv[1])
answers = model.predict(rows, params={"max_new_tokens": new_tokens})
foreign = [name for name in sys.modules if name.split(".")[0] in ("pipelines", "jobs", "ray", "deepspeed")]
import meteor_model
json.dump({"answers": answers, "foreign": foreign, "package": meteor_model.__file__}, sys.stdout)
"""


def test_a_fresh_process_with_the_address_alone(
    server: Server,
    registered: RegisteredVersion,
    tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor],
    tmp_path: Path,
) -> None:
    picture = png((0, 200, 0))
    rows = [
        {"image": in_base64(picture), "prompt": "what?"},
        {"image": "", "prompt": "a text without any picture"},
        {"image": in_base64(png((9, 9, 99))), "prompt": "look at <image> and say what is there"},
    ]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": server.uri}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, f"models:/{MODEL_NAME}@latest-pretrain"],
        input=json.dumps([rows, 6]), capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["foreign"] == []
    assert not Path(told["package"]).is_relative_to(Path(__file__).parents[3]), "the shipped package, not the tree's"
    assert told["answers"] == [
        expected_answer(tiny, "what?", [picture], 6),
        expected_answer(tiny, "a text without any picture", [], 6),
        expected_answer(tiny, "look at <image> and say what is there", [png((9, 9, 99))], 6),
    ]


@pytest.fixture(scope="module")
def loaded(exported: Path) -> tuple[MeteorPyfunc, PythonModelContext]:
    context = PythonModelContext({"model": str(exported)}, None)
    model = MeteorPyfunc()
    model.load_context(context)
    return model, context


GOOD = {"image": "", "prompt": "hello"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "a#b", "prompt": "x"}, "row 1: image is no base64"),
        ({"image": in_base64(b"hello"), "prompt": "x"}, "row 1: image cannot be used: undecodable_image"),
        ({"image": in_base64(png((1, 2, 3))[:60]), "prompt": "x"}, "row 1: image cannot be used"),
        ({"image": 7, "prompt": "x"}, "row 1: image must be a base64 string"),
        ({"image": "", "prompt": None}, "row 1: prompt must be a string"),
        ({"image": "", "prompt": "<image> x"}, "row 1: the prompt has 1 <image> placeholders, the row 0 images"),
        ({"image": "", "prompt": ""}, "row 1: there is neither"),
    ],
)
def test_a_bad_row_is_named(loaded: tuple[MeteorPyfunc, PythonModelContext], row: dict[str, Any], message: str) -> None:
    model, context = loaded
    with pytest.raises(ValueError, match=message):
        model.predict(context, [GOOD, row])  # type: ignore[arg-type]


def test_a_huge_image_and_bad_parameters_are_refused(
    loaded: tuple[MeteorPyfunc, PythonModelContext],
) -> None:
    model, context = loaded
    with pytest.raises(ValueError, match=r"max_new_tokens is 0; it must be in 1\.\."):
        model.predict(context, [GOOD], {"max_new_tokens": 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a column `prompt`"):
        model.predict(context, [{"text": "x"}])  # type: ignore[arg-type]
    huge = {"image": "A" * (RequestLimits().image_bytes // 3 * 4 + 8), "prompt": "x"}
    with pytest.raises(ValueError, match="row 0: image has 89478492 base64 characters, the limit is 89478488"):
        model.predict(context, [huge])  # type: ignore[arg-type]


def test_pull_by_alias_and_by_version(
    server: Server, registered: RegisteredVersion, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_version = pull_model(pin_model(registered.uri, server.uri), tmp_path / "version")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    by_alias = pull_model(pin_model(f"models:/{MODEL_NAME}@latest-pretrain"), tmp_path / "alias")
    for folder in (by_version, by_alias):
        assert {path.name for path in folder.iterdir()} == {path.name for path in exported.iterdir()}
        assert (folder / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()
    with pytest.raises(ExportError, match="not empty"):
        pull_model(pin_model(registered.uri), tmp_path / "alias")


def test_a_file_changed_in_the_artifact_store_is_refused(
    server: Server, registered: RegisteredVersion, tmp_path: Path
) -> None:
    (weights,) = server.artifacts.rglob(f"{registered.model_id}/artifacts/artifacts/*/model.safetensors")
    honest = weights.read_bytes()
    try:
        weights.write_bytes(honest[:-4] + b"\x00\x00\x80\x3f")
        with pytest.raises(ExportError, match=r"model\.safetensors was changed"):
            pull_model(pin_model(registered.uri, server.uri), tmp_path / "to")
    finally:
        weights.write_bytes(honest)


def test_predict_answers_and_counts(
    server: Server,
    registered: RegisteredVersion,
    tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    pictures = [png((0, 200, 0)), png((9, 9, 99))]
    files: list[str] = []
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(picture)
        files += ["--image", str(tmp_path / f"{number}.png")]
    model = f"models:/{MODEL_NAME}@latest-pretrain"
    assert predict.JOB.main(("--model", model, "--prompt", "which?", "--max-new-tokens", "5", *files)) == 0
    lines = capfd.readouterr().out.splitlines()
    assert f"answer: {expected_answer(tiny, 'which?', pictures, 5)}" in lines
    assert "visual_tokens.clip: 64 > 48 > 32 > 22" in lines
    (decoded,) = (line for line in lines if line.startswith("visual_tokens.decode: 64 > "))
    assert 1 <= int(decoded.split(" > ")[1].split(" ")[0]) <= 64


def test_predict_names_what_is_wrong(
    server: Server,
    registered: RegisteredVersion,
    exported: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    model = f"models:/{MODEL_NAME}@latest-pretrain"
    cases = [
        (2, ["--model", model, "--image", str(tmp_path / "none.png")], "none.png does not exist"),
        (1, ["--model", str(exported), "--image", str(tmp_path / "text.png")], "text.png cannot be used: undecodable"),
        (1, ["--model", f"models:/{MODEL_NAME}@none"], "has no alias 'none'; it has: latest-pretrain"),
        (1, ["--model", "models:/none/1"], "no registered model 'none'"),
        (2, ["--model", model, "--max-new-tokens", "0"], "max_new_tokens is 0"),
    ]
    for status, arguments, message in cases:
        assert predict.JOB.main(["--prompt", "what?", *arguments]) == status
        assert message in capfd.readouterr().err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert predict.JOB.main(["--prompt", "what?", "--model", model]) == 2
    assert "tracking.uri is not set" in capfd.readouterr().err


def test_the_alias_moves_and_old_versions_stay(
    server: Server, registered: RegisteredVersion, exported: Path, run_id: str, tmp_path: Path
) -> None:
    second = register_model(
        exported, Registry(server.uri, MODEL_NAME), aliases=("latest-pretrain",), run_id=run_id, tags={"parity": "0"}
    )
    assert second.version == registered.version + 1
    client = MlflowClient(server.uri)
    assert int(client.get_model_version_by_alias(MODEL_NAME, "latest-pretrain").version) == second.version
    assert pull_model(pin_model(registered.uri, server.uri), tmp_path / "old").is_dir()


def test_an_incomplete_folder_is_not_registered(server: Server, exported: Path, run_id: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="no METEOR model folder"):
        register_model(tmp_path, Registry(server.uri, "half"), aliases=("a",), run_id=run_id, tags={})
    with pytest.raises(TrackingError, match="refused run"):
        register_model(exported, Registry(server.uri, "half"), aliases=("a",), run_id="f" * 32, tags={})
    assert "half" not in [model.name for model in MlflowClient(server.uri).search_registered_models()]
