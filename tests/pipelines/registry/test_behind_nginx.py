"""A real nginx before a real MLflow: a path prefix, a login and a limit on bodies, as companies have them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.registry.publish import pull_model, register_model
from pipelines.registry.versions import PinnedModel, Registry
from pipelines.tracking.mlflow_run import RunRequest, open_run
from pipelines.tracking.server import TrackingError, require_tracking
from tests.pipelines.mlflow_fixture import Server, free_port

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = [
    pytest.mark.stack,
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: nginx-light)"),
]
USER, PASSWORD = "trainer", "a-password-for-tests"
CONFIGURATION = """
daemon off;
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log {folder}/access.log;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size {limit};
    location /team/mlflow/ {{
      auth_basic "MLflow"; auth_basic_user_file {folder}/users;
      proxy_set_header Host $http_host; proxy_set_header Authorization "";
      {more}
      proxy_pass http://127.0.0.1:{upstream}/;
    }}
  }}
}}
"""


@dataclass
class Nginx:
    """One before a server."""

    folder: Path
    upstream: int
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}/team/mlflow"

    def start(self, limit: str, more: str = "") -> None:
        self.stop()
        hashed = subprocess.run(
            ["openssl", "passwd", "-apr1", PASSWORD], check=True, capture_output=True, text=True
        ).stdout.strip()
        (self.folder / "users").write_text(f"{USER}:{hashed}\n")
        user = "user root;" if os.getuid() == 0 else ""  # or its workers could not write to the folder of this test
        (self.folder / "nginx.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder, port=self.port, limit=limit, upstream=self.upstream, more=more, user=user
            )
        )
        assert NGINX is not None
        command = [NGINX, "-c", str(self.folder / "nginx.conf"), "-e", str(self.folder / "error.log")]
        self.process = subprocess.Popen(command, start_new_session=True)
        for _ in range(100):
            try:
                urllib.request.urlopen(self.uri, timeout=1)
            except urllib.error.HTTPError:
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError((self.folder / "error.log").read_text())

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(10)
            self.process = None


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
