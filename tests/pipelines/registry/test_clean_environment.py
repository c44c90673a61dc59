"""A registered model in an environment that holds what its own requirements ask for, and nothing of this repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.registry.versions import RegisteredVersion
from tests.pipelines.mlflow_fixture import MODEL_NAME, Server
from tests.pipelines.registry.test_versions import expected_answer, in_base64, png

pytestmark = [pytest.mark.stack, pytest.mark.slow, pytest.mark.timeout(2400)]

ASK = """
import importlib.util, json, sys
import mlflow
address, folder, picture, encoded = sys.argv[1:]
before = importlib.util.find_spec("meteor_model")
model = mlflow.pyfunc.load_model(address)
answers = model.predict([{"image": encoded, "prompt": "what?"}], params={"max_new_tokens": 6})

import meteor_model.auto
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(folder)
plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
batch = processor("what?", picture)
ids = plain.generate(**batch, max_new_tokens=6, do_sample=False)
answers.append(processor.decode(ids[0, batch["input_ids"].shape[1]:]))
told = {"answers": answers, "before": before is None, "package": meteor_model.__file__, "python": sys.executable}
told["types"] = [type(thing).__name__ for thing in (AutoConfig.from_pretrained(folder), plain, processor)]
print(json.dumps(told))
"""


def test_an_environment_of_the_model_s_own_requirements_answers(
    server: Server,
    registered: RegisteredVersion,
    tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor],
    tmp_path: Path,
) -> None:
    packed = mlflow.artifacts.download_artifacts(registered.uri, dst_path=str(tmp_path / "m"), tracking_uri=server.uri)
    (folder,) = (path.parent for path in Path(packed).rglob("checksums.json"))
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=120)
    install = [str(python), "-m", "pip", "install", "--quiet", "-r", str(Path(packed) / "requirements.txt")]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW_", "VIRTUAL"))}
    installed = subprocess.run(
        install, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=1800, check=False
    )
    assert installed.returncode == 0, installed.stderr[-3000:]

    picture = tmp_path / "green.png"
    picture.write_bytes(png((0, 200, 0)))
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": server.uri, "OMP_NUM_THREADS": "1"}
    command = [str(python), "-c", ASK, f"models:/{MODEL_NAME}@latest-pretrain", str(folder), str(picture)]
    asked = subprocess.run(
        [*command, in_base64(picture.read_bytes())],
        capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300, check=False,
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-3000:]
    told = json.loads(asked.stdout.strip().splitlines()[-1])
    assert told["before"], "the package comes with the model alone"
    assert not Path(told["package"]).is_relative_to(Path(__file__).parents[3])
    assert told["types"] == ["MeteorConfig", "MeteorForConditionalGeneration", "MeteorProcessor"]
    assert told["answers"] == [expected_answer(tiny, "what?", [png((0, 200, 0))], 6)] * 2
