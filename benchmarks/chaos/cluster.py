"""The stack that the scenarios share: SeaweedFS, a fault proxy before it, Ray, and MLflow where it is asked for.

Ray and its workers know the object store by the proxy's address alone; this process, which prepares and audits, goes
to the store itself. Everything is stopped when the block ends, however it ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from benchmarks.chaos.workload import Config
from benchmarks.environment import environment
from infra import services
from infra.fault_proxy import FaultProxy
from infra.nodes import Node, alive_nodes, start_node, stop_node
from infra.services import Stack
from infra.stack import crash, down, up
from pipelines.io import codec

ROOT = Path(__file__).resolve().parents[2]
HEAD_CPUS = 8
OBJECT_STORE_BYTES = 300_000_000
COMMAND_LIMIT_S = 240.0
POLL_S = 0.02
NOTICE_LIMIT_S = 90.0
NOTICE_POLL_S = 0.5


class Command:
    """A driver: a process that has its imports behind it and waits to be told what to run."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        self.log = log
        self.result_file: Path | None = None
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.chaos.driver"],
                env=environment,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, config: Config, config_file: Path, result_file: Path) -> None:
        """Tell it what to run; `result_file` appears when it ends by itself."""
        config_file.write_text(codec.encode(config, indent=1))
        self.result_file = result_file
        assert self.process.stdin is not None
        self.process.stdin.write(f"{config_file}\n{result_file}\n".encode())
        self.process.stdin.close()

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, seconds: float = COMMAND_LIMIT_S) -> int:
        """Its exit status. Raises TimeoutError, with the end of its output, and kills it, when it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(
                f"the command did not end within {seconds:.0f} s; its output ends:\n{self.tail()}"
            ) from None

    def tail(self, characters: int = 2000) -> str:
        """The end of its output."""
        return self.log.read_text(errors="replace")[-characters:]


class Cluster:
    """The running stack; a context manager."""

    def __init__(self, folder: Path, mlflow: bool) -> None:
        self.folder = folder
        self.names = ("s3", "mlflow") if mlflow else ("s3",)
        self.stores: Stack
        self.ray: Stack
        self.proxy: FaultProxy
        self.nodes: list[Node] = []
        self._commands: list[Command] = []
        self._spare: Command | None = None
        self._started = 0
        self._exit = ExitStack()

    def __enter__(self) -> Cluster:
        try:
            self._exit.callback(down, self.folder / "stores", purge=True)
            self.stores = up(self.folder / "stores", only=self.names)
            self._exit.enter_context(environment(services.full_env(self.stores) | self._common()))
            self.proxy = self._exit.enter_context(FaultProxy(self.stores.s3_endpoint))
            self._exit.callback(down, self.folder / "ray", purge=True)
            self._exit.callback(self.stop_nodes)
            self._exit.callback(self.stop_commands)
            self._exit.callback(self.stop_spare)
            self.start_ray()
        except BaseException:  # an interrupt too: nothing half-started stays behind
            self._exit.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    @staticmethod
    def _common() -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RAY_LOGGER_LEVEL": "error"}

    # ------------------------------------------------------------------------------------------------ the commands

    def environment(self) -> dict[str, str]:
        """What a program under test sees: Ray, and the object store behind the proxy."""
        return {**os.environ, **services.stack_env(self.ray), "AWS_ENDPOINT_URL": self.proxy.endpoint}

    def command(self, config: Config, folder: Path) -> Command:
        """Run `config` in a driver; its files lie in `folder`."""
        command = self._spare or self._driver()
        number = len(list(folder.glob("command-*.json"))) + 1
        command.run(config, folder / f"command-{number}.json", folder / f"result-{number}.json")
        self._commands.append(command)
        self._spare = self._driver()  # the imports of the next one fill the gaps of this one's start
        return command

    def _driver(self) -> Command:
        self._started += 1
        return Command(self.environment(), self.folder / f"driver-{self._started}.log")

    def stop_commands(self) -> None:
        """End every driver that still runs."""
        for command in self._commands:
            command.kill()
        self._commands.clear()

    def stop_spare(self) -> None:
        """End the driver that waits."""
        if self._spare is not None:
            self._spare.kill()
        self._spare = None

    def settle(self) -> None:
        """Back to the state before a scenario: no driver, no rule, no node beside the head."""
        self.stop_commands()
        self.proxy.clear()
        if self.nodes:
            self.stop_nodes()
            deadline = time.monotonic() + NOTICE_LIMIT_S
            while alive_nodes(self.ray) > 1:  # Ray would still place actors there
                if time.monotonic() > deadline:
                    raise TimeoutError(f"Ray has not noticed within {NOTICE_LIMIT_S:.0f} s that a node has ended")
                time.sleep(NOTICE_POLL_S)

    # ------------------------------------------------------------------------------------------------ the services

    def start_ray(self) -> None:
        """Start the head, or start it again after a crash, at the same addresses."""
        with environment({**os.environ, "AWS_ENDPOINT_URL": self.proxy.endpoint}):
            self.ray = up(self.folder / "ray", only=("ray",), num_cpus=HEAD_CPUS, object_store_bytes=OBJECT_STORE_BYTES)

    def kill_ray(self) -> int:
        """SIGKILL every process of the head and of the other nodes; returns how many."""
        killed = len(crash(self.folder / "ray", "ray"))
        self.stop_nodes()
        return killed

    def kill_service(self, name: str) -> int:
        """SIGKILL every process of "s3" or "mlflow"; returns how many."""
        return len(crash(self.folder / "stores", name))

    def start_service(self, name: str) -> None:
        """Start "s3" or "mlflow" again, at the same address."""
        up(self.folder / "stores", only=(name,))

    def add_node(self, num_cpus: int, settings: Mapping[str, str] | None = None) -> Node:
        """One more raylet on this machine; `settings` are variables of its environment and of its workers'."""
        name = f"node-{len(self.nodes)}-{time.time_ns():x}"
        variables = {**(settings or {}), "AWS_ENDPOINT_URL": self.proxy.endpoint}
        node = start_node(self.ray, name, num_cpus, environment=variables)
        self.nodes.append(node)
        return node

    def stop_nodes(self) -> None:
        """End the nodes beside the head."""
        while self.nodes:
            stop_node(self.nodes.pop())
