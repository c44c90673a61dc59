"""One MLflow run per training whatever dies in between, and every record in it however long the server is away."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from pipelines.config.recipe import Recipe, RunSettings, TrackingSettings
from pipelines.config.settings import SettingsError
from pipelines.data.shards import Manifest
from pipelines.io import storage
from pipelines.io.run_folder import RunFolder, run_folder
from pipelines.job import run
from pipelines.tracking import mlflow_run as tracking
from pipelines.tracking.metric_logger import MetricLogger
from pipelines.tracking.metric_points import MetricPoint
from pipelines.tracking.mlflow_run import TRAINING_TAG, RunRequest
from pipelines.tracking.run_tracker import RunTracker
from pipelines.tracking.server import TrackingAwayError, TrackingError
from tests.pipelines.mlflow_fixture import Server, free_port

pytestmark = pytest.mark.stack


def request(training_id: str) -> RunRequest:
    settings = {"size": 3, "password": "hunter2"}
    tags = {"git_commit": "abc"}
    return RunRequest("tracker", "a run", settings, tags, {"recipe.json": settings}, training_id, started_ms=1_700_000)


def tracker_of(uri: str, folder: Path, training_id: str, retry_s: float = 30, **changes: Any) -> RunTracker:
    def store(run_id: str) -> None:
        storage.write_json(RunFolder(str(folder)).record, {"mlflow_run_id": run_id})

    options = {"run_id": None, "store_run_id": store, "retry_s": retry_s, **changes}
    return RunTracker(uri, str(folder), request(training_id), **options)


def runs_of(server: Server, training_id: str) -> list[Run]:
    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("tracker")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], f"tags.{TRAINING_TAG} = '{training_id}'"))


def artifact(server: Server, run_id: str, name: str) -> bytes:
    path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, tracking_uri=server.uri)
    return Path(path).read_bytes()


def wait_for(condition: Callable[[], object], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_training_begins_without_the_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Away at the start, there later.

    The run is opened once, and a worker's logger, a dead worker's points and the documents of the driver get there.
    """
    monkeypatch.setattr("pipelines.tracking.run_tracker.RETRY_EVERY_S", 0.5)
    folder, pictures = tmp_path / "run", tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "one.png").write_bytes(b"png")
    server.kill()
    try:
        tracker = tracker_of(server.uri, folder, "late", retry_s=0.2)
        tracker.start()
        worker = MetricLogger(None, server.uri, str(folder))
        for step in range(1, 21):
            worker.log({"loss": 1 / step}, step)
        tracker.log_documents({"ranks.json": {"clip": [3.5]}})
        tracker.log_files(pictures, "pictures")
        tracker.log_documents({"ranks.json": {"clip": [4.5]}, "token": "x"})
        tracker.log_points(
            [MetricPoint("loss", 1.0, 5, 1), MetricPoint("loss", 9.0, 5, 2), MetricPoint("final", 0.5, 5, 20)]
        )
        with pytest.raises(
            TrackingAwayError, match=r"MLflow lacks 6 files of records, which are kept in .*/run/outbox"
        ):
            tracker.deliver()
        tracker_of(server.uri, folder, "late").fail()
        assert "is not marked as FAILED" in caplog.text
        assert tracker.run_id is None
        assert len(worker.pending_points()) == 20
    finally:
        server.start()

    wait_for(lambda: storage.exists(RunFolder(str(folder)).record))
    report = worker.close(30)
    assert (report.delivered, report.undelivered) == (20, 0)
    tracker.finish()
    (opened,) = runs_of(server, "late")
    run_id = opened.info.run_id
    assert storage.read_json(RunFolder(str(folder)).record) == {"mlflow_run_id": run_id}
    assert (opened.info.status, opened.info.start_time) == ("FINISHED", 1_700_000)
    assert opened.data.params == {"size": "3", "password": "(redacted)"}
    assert opened.data.tags["git_commit"] == "abc"
    client = MlflowClient(server.uri)
    loss = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in loss] == [(step, 1 / step) for step in range(1, 21)]
    assert [point.value for point in client.get_metric_history(run_id, "final")] == [0.5]
    assert artifact(server, run_id, "pictures/one.png") == b"png"
    assert json.loads(artifact(server, run_id, "ranks.json")) == {"clip": [4.5]}, "the last of a name counts"
    assert b"hunter2" not in artifact(server, run_id, "recipe.json")
    assert storage.list_files(str(folder / "outbox")) == []


def test_a_half_opened_run_is_adopted(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver dies after the run is made: before its description, then before its id is stored."""

    class Died(Exception):
        pass

    def die(*arguments: object) -> None:
        raise Died

    with monkeypatch.context() as dying:
        dying.setattr(tracking.MlflowRun, "set_tags", die)
        with pytest.raises(Died):
            tracker_of(server.uri, tmp_path, "half").open()
    with pytest.raises(Died):
        tracker_of(server.uri, tmp_path, "half", store_run_id=die).open()
    tracker = tracker_of(server.uri, tmp_path, "half")
    run_id = tracker.open()
    (only,) = runs_of(server, "half")
    assert only.info.run_id == run_id
    assert (only.data.params["size"], only.data.tags["git_commit"]) == ("3", "abc")
    assert tracker.open() == tracker_of(server.uri, tmp_path, "half", run_id=run_id).open() == run_id


def test_a_lost_answer_makes_no_second_run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, lost = tracking._create_run, []

    def lose_the_answer(*arguments: Any) -> str:
        lost.append(create(*arguments))
        raise MlflowException("the answer was lost")

    monkeypatch.setattr(tracking, "_create_run", lose_the_answer)
    run_id = tracker_of(server.uri, tmp_path, "lost answer").open()
    assert lost == [run_id]
    assert len(runs_of(server, "lost answer")) == 1


def test_a_failing_artifact_store_is_waited_out(server: Server, tmp_path: Path) -> None:
    tracker = tracker_of(server.uri, tmp_path, "store", retry_s=0.2)
    run_id = tracker.open()
    (folder,) = server.artifacts.glob(f"*/{run_id}/artifacts")
    (folder / "pictures").write_text("in the way: the server answers HTTP 500")
    (tmp_path / "one.png").write_bytes(b"png")
    tracker.log_files(tmp_path, "pictures")
    with pytest.raises(TrackingAwayError, match="did not take"):
        tracker.deliver()
    (folder / "pictures").unlink()
    tracker.deliver()
    assert artifact(server, run_id, "pictures/one.png") == b"png"


def recipe(uri: str, root: Path, when_down: Any = "buffer") -> Recipe:
    return dataclasses.replace(
        Recipe(),
        tracking=TrackingSettings(uri=uri, experiment="tracker", when_down=when_down, patience_s=0.2),
        run=RunSettings(storage=str(root), name="r"),
    )


@pytest.fixture
def no_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = Manifest.__new__(Manifest)
    object.__setattr__(manifest, "url", "somewhere")
    object.__setattr__(manifest, "sha256", "0")
    monkeypatch.setattr(run, "ensure_shards", lambda recipe: (manifest,))
    monkeypatch.setattr(run, "_check_fit", lambda recipe, manifests: None)  # it asks a cluster


@pytest.mark.usefixtures("no_shards")
def test_what_ends_a_training_is_what_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow is away when the run ends with an error; its own absence is added only where it is the error."""
    absent = f"http://127.0.0.1:{free_port()}"
    errors: list[Exception] = [RuntimeError("the original"), TrackingAwayError("MLflow did not take it")]

    def fail(*arguments: Any) -> None:
        *_, phases = arguments
        phases.seconds["export"] = 1.0
        raise errors.pop(0)

    monkeypatch.setattr(run, "_phases", fail)
    with pytest.raises(RuntimeError, match=r"^the original$"):
        run.run_job(recipe(absent, tmp_path), "pretrain")
    first = storage.read_json(run_folder(str(tmp_path), "r").record)
    assert (first["mlflow_run_id"], first["finished"]) == (None, False)
    with pytest.raises(TrackingAwayError, match=r"model is in .*/runs/r/export\. .* same command .* --run.name r"):
        run.run_job(recipe(absent, tmp_path), "pretrain")
    again = storage.read_json(run_folder(str(tmp_path), "r").record)
    assert (again["training_id"], again["started_ms"]) == (first["training_id"], first["started_ms"])
    assert list((tmp_path / "runs" / "r" / "outbox" / "points").iterdir()), "system metrics are kept"


def test_absent_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TrackingAwayError, match=r"connection refused.*--tracking\.when-down buffer"):
        run.check_places(recipe(absent, tmp_path, "fail"))
    run.check_places(recipe(absent, tmp_path))
    assert "kept with the run" in capsys.readouterr().out
    with pytest.raises(TrackingError, match="not an http"):
        run.check_places(recipe("sqlite:///x.db", tmp_path))
    with pytest.raises(SettingsError, match="when_down is 'wait'"):
        recipe(absent, tmp_path, "wait")
    with pytest.raises(SettingsError, match="patience_s is -1"):
        TrackingSettings(patience_s=-1)
