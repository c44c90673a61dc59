"""The stack that a rehearsal plays on: the local one, with counting proxies before the store.

Jobs and Ray know the store by one proxy, MLflow, which passes artifacts on, by another: so what a job sends itself and
what goes through MLflow are counted apart.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from benchmarks.environment import environment
from benchmarks.rehearsal.meter import Meter, Taken
from benchmarks.rehearsal.plays import Command, Play
from benchmarks.results_file import hardware
from infra import services
from infra.fault_proxy import FaultProxy
from infra.nginx import PASSWORD, USER, Nginx
from infra.nodes import start_node, stop_node
from infra.processes import choose_port
from infra.services import Stack
from infra.stack import down, up

ROOT = Path(__file__).resolve().parents[2]
OBJECT_STORE_BYTES = 1_000_000_000
COMMAND_LIMIT_S = 3600.0
SHOWN_CHARACTERS = 3000
PHASE_LINE = re.compile(r"\[(?P<name>[a-z]+)\] ")
"""How `pipelines.job.run.Phases` says that a phase begins."""


class RehearsalError(RuntimeError):
    """A command of a rehearsal failed; the message ends with what it printed."""


class Stage:
    """A running stack, and what its processes put their temporary files into."""

    def __init__(self, folder: Path, temp: Path, environment: Mapping[str, str], proxies: Mapping[str, FaultProxy]):
        self.folder, self.temp = folder, temp
        self._environment, self._proxies = dict(environment), proxies
        Image.new("RGB", (336, 336), "orange").save(folder / "image.png")

    def run(self, command: Command) -> dict[str, Taken]:
        """Run a command to its end; what each of its phases took.

        Raises:
            RehearsalError: it failed, or did not end within an hour.
        """
        meter = Meter(self.temp, {name: _counts(proxy) for name, proxy in self._proxies.items()})
        words = [word.replace("IMAGE", str(self.folder / "image.png")) for word in command.words]
        log = self.folder / f"{command.name}.log"
        meter.start()
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=self._environment, stdout=stream, stderr=subprocess.STDOUT
            )
            try:
                _follow(process, log, meter)
            finally:
                _end(process)
                taken = meter.stop()
        if process.returncode:
            text = log.read_text(errors="replace")[-SHOWN_CHARACTERS:]
            raise RehearsalError(f"{command.name} ended with status {process.returncode}:\n{text}")
        return taken


@contextmanager
def open_stage(play: Play, folder: Path) -> Iterator[Stage]:
    """Stores, proxies and Ray; all of it is stopped at the end, and its data removed."""
    temp = folder / "tmp"
    temp.mkdir()
    with ExitStack() as exits:

        def started(name: str, settings: Mapping[str, str], num_cpus: int | None = None) -> Stack:
            """A service with a state of its own, so that it is told of the store by `settings` alone."""
            exits.callback(down, folder / name, purge=True)
            with environment({**os.environ, **settings}):
                return up(folder / name, only=(name,), num_cpus=num_cpus, object_store_bytes=OBJECT_STORE_BYTES)

        stores = started("s3", {})
        links = {"store": play.store, "MLflow": None}
        proxies = {
            name: exits.enter_context(FaultProxy(stores.s3_endpoint, up=link, down=link))
            for name, link in links.items()
        }
        store = services.full_env(stores)
        mlflow = started("mlflow", {**store, "AWS_ENDPOINT_URL": proxies["MLflow"].endpoint})
        job = {
            **store,
            **services.stack_env(mlflow),
            **(_behind_nginx(exits, folder / "nginx", mlflow) if play.nginx else {}),
            "TMPDIR": str(temp),
            "PYTHONPATH": str(ROOT),
            "AWS_ENDPOINT_URL": proxies["store"].endpoint,
        }
        ray = started("ray", job, play.cpus)
        for number in range(1, play.nodes):
            own = temp if play.shared_temp else temp / f"node-{number}"
            own.mkdir(exist_ok=True)
            there = {**job, "TMPDIR": str(own)}
            node = start_node(ray, f"node-{number}", play.cpus, OBJECT_STORE_BYTES, environment=there)
            exits.callback(stop_node, node)
        seen = {**job, **services.stack_env(ray), "METEOR_LOG_DIR": str(folder / "output")}
        yield Stage(folder, temp, seen, proxies)


def _behind_nginx(exits: ExitStack, folder: Path, mlflow: Stack) -> dict[str, str]:
    """Start nginx before MLflow; the variables by which jobs know it."""
    folder.mkdir()
    folder.parent.chmod(0o755)  # its workers enter it
    nginx = Nginx(folder, mlflow.ports["mlflow"]["http"], choose_port(set()))
    exits.callback(nginx.stop)
    nginx.start("64m")
    return {"MLFLOW_TRACKING_URI": nginx.uri, "MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}


def machine() -> dict[str, Any]:
    """The machine, how busy it is, and its memory."""
    return {**hardware(), "memory_gib": round(psutil.virtual_memory().total / 2**30, 1)}


def _counts(proxy: FaultProxy) -> Any:
    return lambda: (proxy.sent, proxy.received)


def _follow(process: subprocess.Popen[bytes], log: Path, meter: Meter) -> None:
    """Tell the meter of each phase as the job says it."""
    deadline, read = time.monotonic() + COMMAND_LIMIT_S, 0
    while True:
        ended = process.poll() is not None
        with log.open("rb") as stream:
            stream.seek(read)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        read += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if found := PHASE_LINE.match(line):
                meter.phase(found["name"])
        if ended:
            return
        if time.monotonic() > deadline:
            raise RehearsalError(f"{log.stem} did not end within {COMMAND_LIMIT_S:.0f} s")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
