"""A real nginx before a real MLflow: a path prefix, a login and a limit on bodies, as companies have them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.nginx import NGINX, PASSWORD, USER, Nginx
from pipelines.registry.publish import pull_model, register_model
from pipelines.registry.versions import PinnedModel, Registry
from pipelines.tracking.mlflow_run import RunRequest, open_run
from pipelines.tracking.server import TrackingError, require_tracking
from tests.pipelines.mlflow_fixture import Server, free_port

pytestmark = [
    pytest.mark.stack,
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: nginx-light)"),
]


@pytest.fixture
def nginx(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nginx]:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    tmp_path.chmod(0o755)
    running = Nginx(tmp_path, server.port, free_port())
    try:
        yield running
    finally:
        running.stop()


def stored(server: Server) -> set[Path]:
    return {path for path in server.artifacts.rglob("*") if path.is_file()}


def test_a_model_goes_up_and_comes_back(nginx: Nginx, exported: Path, tmp_path: Path) -> None:
    nginx.start("0")
    require_tracking(nginx.uri)
    run = open_run(nginx.uri, RunRequest("behind", "whole")).run_id
    registry = Registry(nginx.uri, "behind-nginx")
    version = register_model(exported, registry, aliases=("a",), run_id=run, tags={})
    pulled = pull_model(PinnedModel(version.uri, registry, version.version), tmp_path / "pulled")
    for path in exported.iterdir():
        assert (pulled / path.name).read_bytes() == path.read_bytes()


def test_a_limit_on_bodies_is_named_and_nothing_stays(nginx: Nginx, server: Server, exported: Path) -> None:
    size = (exported / "model.safetensors").stat().st_size
    nginx.start("1m")
    assert size > 2**20
    run = open_run(nginx.uri, RunRequest("behind", "limited")).run_id
    before = stored(server)
    start = time.monotonic()
    with pytest.raises(TrackingError, match=rf"HTTP 413, .* body of {size} bytes.*client_max_body_size") as caught:
        register_model(exported, Registry(nginx.uri, "behind-nginx"), aliases=("a",), run_id=run, tags={})
    assert time.monotonic() - start < 60
    assert "make up" not in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert stored(server) == before
    nginx.start("64m")  # what it says mends it
    register_model(exported, Registry(nginx.uri, "behind-nginx"), aliases=("a",), run_id=run, tags={})


def test_a_login_is_asked_for(nginx: Nginx, monkeypatch: pytest.MonkeyPatch) -> None:
    nginx.start("0")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(TrackingError, match=r"refused our login \(HTTP 401\).*MLFLOW_TRACKING_PASSWORD"):
        require_tracking(nginx.uri)


def test_artifacts_that_may_not_be_written_are_named(nginx: Nginx, server: Server, exported: Path) -> None:
    nginx.start("0", "limit_except GET POST PATCH { deny all; }")
    run = open_run(nginx.uri, RunRequest("behind", "read-only")).run_id
    before = stored(server)
    with pytest.raises(TrackingError, match=r"HTTP 403, .*allow PUT, GET and DELETE below /api/2.0/mlflow-artifacts"):
        register_model(exported, Registry(nginx.uri, "behind-nginx"), aliases=("a",), run_id=run, tags={})
    assert stored(server) == before


def test_a_server_that_answers_too_late_is_named(
    nginx: Nginx, server: Server, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is stopped by SIGSTOP while the file is on its way: nginx gives up on it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nginx.start("0", "proxy_read_timeout 1s;")
    run = open_run(nginx.uri, RunRequest("behind", "late")).run_id
    from pipelines.tracking.artifacts import transfer

    assert server.process is not None
    client = Registry(nginx.uri, "behind-nginx").client
    os.killpg(server.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TrackingError, match=r"HTTP 504.*proxy_read_timeout"):
            transfer(nginx.uri, "config.json", 500, lambda: client.log_artifact(run, str(exported / "config.json")), 2)
    finally:
        os.killpg(server.process.pid, signal.SIGCONT)
