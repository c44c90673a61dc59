"""The Ray Serve application: MLflow's requests and reasons, batches, back-pressure, and loopback alone."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.serve import serving
from meteor_model.answering import Answerer, Budget, Question, RequestError, read_rows
from pipelines.inference.reading import read_request
from pipelines.inference.serving import answer_items, answerer_of
from pipelines.inference.settings import ServeSettings, ServingError
from pipelines.registry.folder import export_model
from pipelines.registry.versions import PinnedModel
from tests.meteor_model.builders import counted_encodes, model, processor
from tests.pipelines.registry.test_versions import in_base64, png

ROOT = Path(__file__).resolve().parents[3]
GREEN = {"image": in_base64(png((0, 200, 0))), "prompt": "what?"}


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(model(), processor())


# ------------------------------------------------------------------------------------------------------- without server


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the request is no JSON"),
        (b"\xff", "the request is no JSON"),
        (b"[" * 100_000, "the request is no JSON"),
        (b"[]", "must be an object with `dataframe_records`"),
        (b'{"dataframe_records": [], "parms": {}}', "must be an object with"),
        (b'{"dataframe_records": {"prompt": "x"}}', "must be a list of objects"),
        (b'{"dataframe_records": [7]}', "must be a list of objects"),
        (b'{"dataframe_records": []}', "has 0 rows"),
        (b'{"dataframe_records": [{"prompt": "x"}], "params": [1]}', "params must be an object"),
        (b'{"dataframe_records": [{"prompt": "x"}], "params": {"max_new_tokens": 1e9}}', "must be a whole number"),
    ],
)
def test_what_is_no_request_is_named(answerer: Answerer, body: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_request(body, answerer)


def test_a_replica_answers_under_another_pruner(tmp_path: Path) -> None:
    pinned = PinnedModel(str(export_model(model(), processor(), tmp_path / "model")))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    for settings, kept in (
        (ServeSettings(pruner="fastv", pruner_keep=9), 9),
        (ServeSettings(pruner="stride", pruner_keep=7), 7),
    ):
        served = answerer_of(pinned, settings)
        (answer,) = served.answer([Question.of("what?", served.processor, [image])], Budget(2))
        assert answer.visual_tokens == kept
    with pytest.raises(ServingError, match=r"serve\.pruner and serve\.pruner_keep together"):
        ServeSettings(pruner="fastv")


def test_a_batch_of_several_budgets_answers_each_with_its_own(answerer: Answerer) -> None:
    noise = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    budgets = [Budget(4), Budget(2, visual_tokens=2), Budget(4)]
    items = [
        (Question.of("what?", answerer.processor, [image]), budget)
        for image, budget in zip(noise, budgets, strict=True)
    ]
    together = answer_items(items, answerer)
    assert together[1].visual_tokens == 2
    assert [answer.visual_tokens for answer in together] == [
        answer_items([item], answerer)[0].visual_tokens for item in items
    ]


def test_every_row_of_a_request_is_encoded_once(answerer: Answerer) -> None:
    body = json.dumps({"dataframe_records": [GREEN] * 7 + [{"prompt": "text alone"}], "params": {"max_new_tokens": 2}})
    with counted_encodes() as calls:
        items = read_request(body.encode(), answerer)
        assert len(answer_items(items, answerer)) == 8
    assert calls == [1] * 7 + [0]


def test_a_rendered_prompt_is_refused_by_its_row(answerer: Answerer) -> None:
    rows = [GREEN, {"prompt": "<s>USER: what? ASSISTANT:"}]
    with pytest.raises(RequestError, match="row 1: the prompt is rendered by a template already"):
        read_request(json.dumps({"dataframe_records": rows}).encode(), answerer)


@pytest.mark.parametrize("name", ["replicas", "batch_rows", "ongoing", "queued", "batch_wait_s"])
def test_bad_settings_are_named(name: str) -> None:
    with pytest.raises(ServingError, match=f"{name} is -1"):
        ServeSettings(**dict[str, Any]({name: -1}))


# ---------------------------------------------------------------------------------------------------------- with server


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Address of `jobs/serve.py` on a Ray of its own, with little room for requests; and its process id."""
    folder = tmp_path_factory.mktemp("serving")
    exported = export_model(model(), processor(), folder / "model")
    options = ["--serve.ongoing", "2", "--serve.queued", "1", "--serve.batch-rows", "2", "--serve.cpus", "0.1"]
    with serving("server", exported, folder, *options) as server:
        yield f"http://127.0.0.1:{server.port}", server.process.pid


def ask(url: str, body: Any) -> tuple[int, str]:
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=90) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.stack
@pytest.mark.timeout(400)
def test_the_application_answers_refuses_and_stays_on_loopback(served: tuple[str, int], answerer: Answerer) -> None:
    address, pid = served
    url = f"{address}/invocations"
    assert ask(f"{address}/ping", None)[0] == 200
    status, body = ask(url, {"dataframe_records": [GREEN], "params": {"max_new_tokens": 5, "visual_tokens": 2}})
    assert status == 200, body
    (expected,) = answerer.answer(read_rows([GREEN], answerer.processor), Budget(5, visual_tokens=2))
    assert json.loads(body) == {"predictions": [expected.text]}

    for row, parameters, reason in (
        ({**GREEN, "image": in_base64(b"hello")}, {}, "row 0: image cannot be used: undecodable_image"),
        ({"image": "", "prompt": 7}, {}, "row 0: prompt must be a string, got int"),
        (GREEN, {"max_new_tokens": 10**9}, "max_new_tokens is 1000000000"),
        (GREEN, {"visual_tokens": 10**6}, "visual_tokens is 1000000; it must be in 1..24"),
    ):
        status, body = ask(url, {"dataframe_records": [row], "params": parameters})
        assert (status, json.loads(body)["error_code"]) == (400, "INVALID_PARAMETER_VALUE")
        assert reason in json.loads(body)["message"]
    assert ask(f"{address}/nothing", None)[0] == 404
    assert ask(url, None)[0] == 405

    long_one = {"dataframe_records": [GREEN] * 4, "params": {"max_new_tokens": 200}}
    with ThreadPoolExecutor(12) as pool:
        statuses = [status for status, _ in pool.map(lambda _: ask(url, long_one), range(12))]
    assert set(statuses) == {200, 503}, "some are answered, and what has no room is refused at once"

    port = int(address.rpartition(":")[2])
    listening = [
        one.laddr for one in psutil.net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == port
    ]
    assert {one.ip for one in listening} == {"127.0.0.1"}
    assert psutil.pid_exists(pid)
