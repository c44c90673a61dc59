"""Runs: opened, resumed, refused; and the clear error where there is no server."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from pipelines.io.git import git_commit
from pipelines.tracking.mlflow_run import RunRequest, open_run
from pipelines.tracking.server import TrackingAwayError, TrackingError, call_mlflow, require_tracking
from tests.pipelines.mlflow_fixture import Server, answering, free_port

pytestmark = pytest.mark.stack


def artifact(server: Server, run_id: str, name: str) -> bytes:
    path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, tracking_uri=server.uri)
    return Path(path).read_bytes()


def test_a_running_server_is_accepted(server: Server) -> None:
    require_tracking(server.uri)


def test_no_server_is_a_quick_clear_error() -> None:
    uri = f"http://someone:hunter2@127.0.0.1:{free_port()}"
    before = time.monotonic()
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1:\d+ cannot be used: connection refused") as caught:
        require_tracking(uri, timeout_s=2)
    assert time.monotonic() - before < 5
    assert "make up" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_a_silent_server_is_a_quick_clear_error() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        before = time.monotonic()
        with pytest.raises(TrackingError, match="no answer within 1 s"):
            require_tracking(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=1)
        assert time.monotonic() - before < 5


@pytest.mark.parametrize(("status", "message"), [(200, "not MLflow"), (401, "refused our login"), (500, "HTTP 500")])
def test_other_answers_are_named(status: int, message: str) -> None:
    with answering(status, "<html>hello</html>") as uri, pytest.raises(TrackingError, match=message) as caught:
        require_tracking(uri, timeout_s=5)
    assert isinstance(caught.value, TrackingAwayError) == (status == 500)


@pytest.mark.parametrize(("uri", "message"), [("", "MLFLOW_TRACKING_URI"), ("sqlite:///x.db", "not an http")])
def test_addresses_that_cannot_serve_a_cluster(uri: str, message: str) -> None:
    with pytest.raises(TrackingError, match=message):
        require_tracking(uri)


def test_open_log_finish_resume(server: Server, tmp_path: Path) -> None:
    settings = {f"group.{number}": {"value": number} for number in range(120)} | {"password": "hunter2", "workers": 2}
    settings["data"] = {"mixture": {"s3://bucket/more": 2.0}}
    tags = {"git_commit": "abc", "recipe": "tiny"}
    documents = {"recipe.json": settings, "ranks.json": {"clip": [3.5]}}
    opened = open_run(server.uri, RunRequest("tracking", "a run", settings, tags, documents))
    run_id = opened.run_id
    client = MlflowClient(server.uri)
    run = client.get_run(run_id)
    assert len(run.data.params) == 123
    assert (run.data.params["group.7.value"], run.data.params["password"]) == ("7", "(redacted)")
    assert json.loads(run.data.params["data.mixture"]) == {"s3://bucket/more": 2.0}
    assert run.data.tags["git_commit"] == "abc"
    assert run.info.run_name == run.data.tags["run_name"] == "a run"
    assert json.loads(artifact(server, run_id, "ranks.json")) == {"clip": [3.5]}
    assert b"hunter2" not in artifact(server, run_id, "recipe.json")

    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(b"png")
    opened.log_files(tmp_path / "pictures", "kept")
    assert artifact(server, run_id, "kept/one.png") == b"png"
    with pytest.raises(TrackingError, match="does not exist"):
        opened.log_files(tmp_path / "none.png")

    opened.finish("FAILED")
    assert client.get_run(run_id).info.status == "FAILED"

    changed = {**settings, "workers": 3, "new": 1}
    request = RunRequest("tracking", "a run", changed, documents={"ranks.json": {"clip": [4.0]}})
    assert open_run(server.uri, request, run_id=run_id) == opened
    resumed = client.get_run(run_id)
    assert resumed.info.status == "RUNNING"
    assert (resumed.data.params["workers"], resumed.data.tags["resumed.workers"]) == ("2", "3")
    assert resumed.data.params["new"] == "1"
    assert [tag for tag in resumed.data.tags if tag.startswith("resumed.")] == ["resumed.workers"]
    assert json.loads(artifact(server, run_id, "ranks.json")) == {"clip": [4.0]}


def test_runs_and_experiments_that_cannot_be_resumed(server: Server) -> None:
    def reopen(run_id: str | None, experiment: str = "gone") -> None:
        open_run(server.uri, RunRequest(experiment, "r"), run_id=run_id)

    with pytest.raises(TrackingError, match=r"no run 0{32}.*MLFLOW_TRACKING_URI"):
        reopen("0" * 32)
    client = MlflowClient(server.uri)
    experiment_id = client.create_experiment("gone")
    deleted = client.create_run(experiment_id).info.run_id
    client.delete_run(deleted)
    with pytest.raises(TrackingError, match=r"was deleted.*restore"):
        reopen(deleted)
    client.delete_experiment(experiment_id)
    with pytest.raises(TrackingError, match=r"'gone' was deleted.*restore"):
        reopen(None)


def test_a_call_outlasts_a_short_absence_and_names_a_long_one() -> None:
    answers = iter([MlflowException("away"), MlflowException("away"), "here"])

    def action() -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert call_mlflow("it", action, retry_s=5) == "here"
    answers = iter([MlflowException("still away")] * 9)
    with pytest.raises(TrackingError, match="did not take the thing within 1 s: still away"):
        call_mlflow("the thing", action, retry_s=1)
    answers = iter([MlflowException.invalid_parameter_value("nonsense"), "never asked again"])
    with pytest.raises(TrackingError, match="refused the thing: nonsense"):
        call_mlflow("the thing", action, retry_s=60)


def test_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METEOR_GIT_COMMIT", raising=False)
    assert git_commit(tmp_path) == "unknown"
    who = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert git_commit(tmp_path) == head.stdout.strip()
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == head.stdout.strip() + "-dirty"
    monkeypatch.setenv("METEOR_GIT_COMMIT", "given")
    assert git_commit(tmp_path) == "given"
