"""A registered model's files on a server that goes away or refuses: nothing half made, nothing sent twice."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus

from pipelines.registry import model_files, publish
from pipelines.registry.folder import ExportError
from pipelines.registry.publish import pull_model, register_model
from pipelines.registry.versions import PinnedModel, RegisteredVersion, Registry
from pipelines.tracking import artifacts
from pipelines.tracking.mlflow_run import RunRequest, open_run
from pipelines.tracking.server import TrackingAwayError, TrackingError
from tests.pipelines.mlflow_fixture import Server

pytestmark = pytest.mark.stack


@pytest.fixture
def run(server: Server, request: pytest.FixtureRequest) -> str:
    return open_run(server.uri, RunRequest("files", request.node.name[:40])).run_id


def models_of(server: Server, run: str) -> list[LoggedModel]:
    client = MlflowClient(server.uri)
    experiment = client.get_run(run).info.experiment_id
    return list(client.search_logged_models([experiment], f"source_run_id = '{run}'"))


def breaking(monkeypatch: pytest.MonkeyPatch, after: int, error: Exception) -> list[str]:
    """MLflow's client takes `after` files and then raises; the names of the files that were asked for."""
    asked: list[str] = []
    send = MlflowClient.log_model_artifact

    def one(self: MlflowClient, model_id: str, local_path: str, artifact_path: str | None = None) -> None:
        asked.append(Path(local_path).name)
        if len(asked) > after:
            raise error
        send(self, model_id, local_path, artifact_path)

    monkeypatch.setattr(MlflowClient, "log_model_artifact", one)
    return asked


def register(server: Server, exported: Path, run: str, name: str = "files-test") -> RegisteredVersion:
    return register_model(exported, Registry(server.uri, name), aliases=("a",), run_id=run, tags={})


def test_the_next_try_sends_the_rest(
    server: Server, exported: Path, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "KEPT_FROM_BYTES", 100_000)
    with monkeypatch.context() as patch:
        sent = breaking(patch, 10_000, ConnectionError("gone"))
        patch.setattr(publish, "call_mlflow", _away_at("finalize", publish.call_mlflow))
        with pytest.raises(TrackingAwayError, match="What arrived is kept: the same command sends the rest"):
            register(server, exported, run)
    assert "model.safetensors" in sent
    (kept,) = models_of(server, run)
    assert kept.status == LoggedModelStatus.PENDING
    again = breaking(monkeypatch, 10_000, ConnectionError("gone"))
    version = register(server, exported, run)
    assert version.model_id == kept.model_id
    assert "model.safetensors" not in again
    assert "MLmodel" in again
    assert [model.status for model in models_of(server, run)] == [LoggedModelStatus.READY]
    registry = Registry(server.uri, "files-test")
    pulled = pull_model(PinnedModel(version.uri, registry, version.version), tmp_path / "pulled")
    assert (pulled / "model.safetensors").read_bytes() == (exported / "model.safetensors").read_bytes()


def _away_at(word: str, call: Callable[..., object]) -> Callable[..., object]:
    def wrapped(what: str, action: Callable[[], object], *rest: object) -> object:
        if what.startswith("model "):
            raise TrackingAwayError(f"MLflow did not take {what}: {word}")
        return call(what, action, *rest)

    return wrapped


def test_what_is_refused_leaves_nothing(
    server: Server, exported: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaking(monkeypatch, 3, TrackingError("HTTP 413, a proxy takes no such body"))
    before = {path for path in server.artifacts.rglob("*") if path.is_file()}
    with pytest.raises(TrackingError, match="HTTP 413"):
        register(server, exported, run)
    assert models_of(server, run) == []
    assert {path for path in server.artifacts.rglob("*") if path.is_file()} == before


def test_what_an_earlier_try_left_of_other_files_is_removed(
    server: Server, exported: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(server.uri, "files-test")
    old = model_files.begin_model(registry, run, "another content", {})
    version = register(server, exported, run)
    assert [model.model_id for model in models_of(server, run)] == [version.model_id]
    assert old.model_id != version.model_id


def test_a_ready_model_without_a_version_is_taken_up(
    server: Server, exported: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> int:
        raise TrackingAwayError("gone just now")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "create_version", fail)
        with pytest.raises(TrackingAwayError):
            register(server, exported, run)
    (ready,) = models_of(server, run)
    sent = breaking(monkeypatch, 10_000, ConnectionError("gone"))
    assert register(server, exported, run).model_id == ready.model_id
    assert sent == []
    assert register(server, exported, run).model_id != ready.model_id  # a second version has files of its own


def test_a_pull_goes_on_and_notices_a_changed_file(
    server: Server, exported: Path, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = register(server, exported, run)
    model = PinnedModel(version.uri, Registry(server.uri, "files-test"), version.version)
    fetch, asked, limit = model_files.download_file, list[str](), [4]

    def broken(address: str, name: str, *rest: object) -> Path:
        asked.append(name.rpartition("/")[2])
        if len(asked) > limit[0]:
            raise TrackingAwayError("gone just now")
        return fetch(address, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model_files, "download_file", broken)
    with pytest.raises(TrackingAwayError, match=f"version {version.version} of files-test cannot be downloaded"):
        pull_model(model, tmp_path / "pulled")
    there = [path for path in (tmp_path / "pulled").rglob("*") if path.is_file() and path.name in asked[:4]]
    victim = next(path for path in there if path.name not in ("checksums.json", ".meteor-pull"))
    victim.write_bytes(victim.read_bytes()[:-1])
    first, limit[0] = asked[:4], 10_000
    asked.clear()
    folder = pull_model(model, tmp_path / "pulled")
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in exported.iterdir())
    for path in exported.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert victim.name in asked
    assert not (set(first) - {"checksums.json", victim.name}) & set(asked)
    with pytest.raises(ExportError, match="not empty"):
        pull_model(model, tmp_path / "pulled")


def test_a_file_that_the_server_changed_is_named(server: Server, exported: Path, run: str, tmp_path: Path) -> None:
    version = register(server, exported, run)
    (stored,) = [path for path in server.artifacts.rglob("model.safetensors") if version.model_id in str(path)]
    copy = tmp_path / "kept"
    shutil.copy(stored, copy)
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    model = PinnedModel(version.uri, Registry(server.uri, "files-test"), version.version)
    with pytest.raises(ExportError, match=r"models:/files-test/\d+: .*model\.safetensors was changed after the export"):
        pull_model(model, tmp_path / "pulled")
    shutil.copy(copy, stored)
    assert pull_model(model, tmp_path / "pulled")
