"""A real nginx before a server on loopback: a path prefix, a login and a limit on bodies, as companies have them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from infra.processes import StackError

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
"""Its program; None where it is not installed (Debian: nginx-light)."""
USER, PASSWORD = "trainer", "a-password-for-tests"
PREFIX = "/team/mlflow"
START_S = 5.0
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
    location {prefix}/ {{
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
    """One before a server.

    Attributes:
        folder: of its files, which others must be able to enter where root starts it.
        upstream: port of the server.
        port: its own.
    """

    folder: Path
    upstream: int
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """Address of the server behind it; `USER` and `PASSWORD` are asked for."""
        return f"http://127.0.0.1:{self.port}{PREFIX}"

    def start(self, limit: str, more: str = "") -> None:
        """Start it, or start it anew. Raises StackError where it does not answer.

        Args:
            limit: of a body, as nginx writes it; "0" is none.
            more: lines of the configuration of the location.
        """
        self.stop()
        if NGINX is None:
            raise StackError("nginx is not installed: on Debian, apt-get install nginx-light")
        hashed = subprocess.run(
            ["openssl", "passwd", "-apr1", PASSWORD], check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()
        (self.folder / "users").write_text(f"{USER}:{hashed}\n")
        user = "user root;" if os.getuid() == 0 else ""  # or its workers could not write to the folder
        text = CONFIGURATION.format(
            folder=self.folder,
            port=self.port,
            limit=limit,
            upstream=self.upstream,
            more=more,
            user=user,
            prefix=PREFIX,
        )
        (self.folder / "nginx.conf").write_text(text)
        command = [NGINX, "-c", str(self.folder / "nginx.conf"), "-e", str(self.folder / "error.log")]
        self.process = subprocess.Popen(command, start_new_session=True)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.uri, timeout=1)
            except urllib.error.HTTPError:  # it asks for the login
                return
            except OSError:
                time.sleep(0.05)
        raise StackError(f"nginx does not answer: {(self.folder / 'error.log').read_text()}")

    def stop(self) -> None:
        """End it; nothing where it does not run."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(10)
            self.process = None
