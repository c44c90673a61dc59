"""`mlflow models serve` on a packed model: answers, request budgets, and a 4xx with a reason for the rest."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.models import Model
from PIL import Image

from meteor_model.answering import Answerer, Budget, Question, RequestError, read_rows
from meteor_model.limits import RequestLimits
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.registry.publish import _pack, example_input
from tests.pipelines.mlflow_fixture import free_port
from tests.pipelines.registry.test_versions import expected_answer, in_base64, png

Tiny = tuple[MeteorForConditionalGeneration, MeteorProcessor]
GREEN = {"image": in_base64(png((0, 200, 0))), "prompt": "what?"}


def too_many_pixels() -> str:
    """A small PNG file of 9,000 x 9,000 pixels."""
    stream = io.BytesIO()
    Image.new("1", (9000, 9000)).save(stream, format="PNG")
    return in_base64(stream.getvalue())


# ------------------------------------------------------------------------------------------------------- without server


def test_a_budget_caps_what_stage_3_keeps_and_stays_with_its_request(tiny: Tiny) -> None:
    answerer = Answerer(*tiny)
    noise = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    questions = [
        Question.of("what?", tiny[1], [noise[0]]),
        Question.of("what is this?", tiny[1], [noise[1]]),
        Question.of("text alone", tiny[1]),
    ]

    free = answerer.answer(questions, Budget(4))
    assert min(answer.visual_tokens for answer in free[:2]) > 3, "lambda keeps more, or the cap shows nothing"
    capped = answerer.answer(questions, Budget(4, visual_tokens=3))
    assert [answer.visual_tokens for answer in capped] == [3, 3, 0]
    wide = answerer.answer(questions, Budget(4, visual_tokens=tiny[0].config.tokens_per_image))
    assert wide == free, "a cap above lambda's count changes nothing"
    assert answerer.answer(questions, Budget(4)) == free, "nothing of a request stays on the model"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_new_tokens": 0}, r"max_new_tokens is 0; it must be in 1\.\."),
        ({"max_new_tokens": 10**9}, "max_new_tokens is 1000000000; it must be in"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be a whole number, got '5'"),
        ({"max_new_tokens": True}, "must be a whole number, got True"),
        ({"visual_tokens": 2.5}, r"visual_tokens must be a whole number, got 2\.5"),
        ({"visual_tokens": 0}, r"visual_tokens is 0; it must be in 1\.\.32"),
        ({"visual_tokens": 33}, r"visual_tokens is 33; it must be in 1\.\.32"),
        ({"visual_token": 3}, "parameter visual_token is unknown"),
    ],
)
def test_absurd_parameters_are_named(tiny: Tiny, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Answerer(*tiny).budget(parameters)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the request has 0 rows"),
        ([{"prompt": "x"}] * (RequestLimits().rows + 1), f"has {RequestLimits().rows + 1} rows"),
        ([{"prompt": "x", "url": "http://127.0.0.1"}], "row 0: column 'url' is unknown"),
        ([{"prompt": "x" * 2**17}], "row 0: prompt has 131072 characters"),
        ([{"prompt": "\ud800"}], "row 0: prompt is not valid Unicode"),
        ([GREEN, {"prompt": "x", "image": too_many_pixels()}], "row 1: image cannot be used: image_too_large"),
    ],
)
def test_rows_that_cannot_be_served_are_named(tiny: Tiny, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_rows(rows, tiny[1])


def test_a_prompt_without_room_for_its_answer_is_refused(tiny: Tiny) -> None:
    longest = tiny[0].config.text_config.max_position_embeddings
    with pytest.raises(RequestError, match=f"row 1: the prompt has .* together over the model's {longest}"):
        Answerer(*tiny).answer([Question.of("what?", tiny[1]), Question.of("a b " * longest, tiny[1])], Budget(4))


# ---------------------------------------------------------------------------------------------------------- with server


@pytest.fixture(scope="module")
def served(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of `mlflow models serve` on the packed tiny model."""
    folder = tmp_path_factory.mktemp("serve")
    _pack(exported, folder / "model", example_input(64), Model())
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(folder / "model")]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=env, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while status_of(f"http://127.0.0.1:{port}/ping") != 200:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status)
    except OSError:
        return 0


def post(url: str, body: Any) -> tuple[int, str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.stack
def test_the_server_answers_within_the_request_s_budget(served: str, tiny: Tiny) -> None:
    rows = [GREEN, {"image": "", "prompt": "a text"}]
    status, body = post(served, {"dataframe_records": rows, "params": {"max_new_tokens": 6}})
    assert status == 200, body
    expected = [expected_answer(tiny, "what?", [png((0, 200, 0))], 6), expected_answer(tiny, "a text", [], 6)]
    assert json.loads(body) == {"predictions": expected}

    status, body = post(served, {"dataframe_records": [GREEN], "params": {"max_new_tokens": 6, "visual_tokens": 2}})
    assert status == 200, body
    budget = Budget(6, visual_tokens=2)
    (capped,) = Answerer(*tiny).answer(read_rows([GREEN], tiny[1]), budget)
    assert json.loads(body) == {"predictions": [capped.text]}


@pytest.mark.stack
@pytest.mark.parametrize(
    ("row", "parameters", "reason"),
    [
        ({**GREEN, "image": in_base64(b"hello")}, {}, "row 0: image cannot be used: undecodable_image"),
        ({**GREEN, "image": "a#b"}, {}, "row 0: image is no base64"),
        ({**GREEN, "image": too_many_pixels()}, {}, "row 0: image cannot be used: image_too_large"),
        ({"image": "", "prompt": 7}, {}, "prompt"),
        ({"image": ""}, {}, "prompt"),
        (GREEN, {"max_new_tokens": 10**9}, "max_new_tokens is 1000000000; it must be in"),
        (GREEN, {"max_new_tokens": "many"}, "max_new_tokens"),
        (GREEN, {"visual_tokens": 33}, "visual_tokens is 33; it must be in 1..32"),
    ],
)
def test_the_server_refuses_with_a_reason(
    served: str, row: dict[str, Any], parameters: dict[str, Any], reason: str
) -> None:
    status, body = post(served, {"dataframe_records": [row], "params": parameters})
    assert status == 400, body
    assert reason in json.loads(body)["message"]
    assert "Traceback" not in body


@pytest.mark.stack
def test_the_server_refuses_what_is_no_request(served: str) -> None:
    status, body = post(served, b"{")
    assert status == 400, body
    assert "Traceback" not in body
