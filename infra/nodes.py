"""More Ray nodes on this machine, beside the head of a local stack: what a cluster of several hosts does, on loopback.

Each node is a raylet with ports and a process tree of its own, started and stopped as the services are.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from infra import services
from infra.processes import POLL_S, Record, StackError, choose_port, leader, members, reap, spawn, stop, tail
from infra.services import HOST, Stack

ROOT = Path(__file__).resolve().parents[1]
NODE_PORTS = ("node_manager", "object_manager", "agent", "agent_grpc", "runtime_env_agent", "metrics")
START_TIMEOUT_S = 60.0
STOP_GRACE_S = 10.0
RAYLET = "raylet"
NODE_ID_FLAG = "--node_id="
DRAIN_LIMIT_S = 60.0


@dataclass(frozen=True)
class Node:
    """One started node."""

    record: Record
    log: Path

    @property
    def raylet(self) -> psutil.Process | None:
        """The node's raylet, or None where it is gone."""
        return next((process for process in members(self.record) if _is_raylet(process)), None)

    @property
    def node_id(self) -> str:
        """Ray's name of the node (hex). Raises StackError where its raylet is gone."""
        raylet = self.raylet
        flags = [] if raylet is None else raylet.cmdline()
        found = [flag.removeprefix(NODE_ID_FLAG) for flag in flags if flag.startswith(NODE_ID_FLAG)]
        if not found:
            raise StackError(f"{self.record.service}: no raylet with a node id runs; is the node up?")
        return found[0]


def _is_raylet(process: psutil.Process) -> bool:
    try:
        return process.name() == RAYLET
    except psutil.Error:
        return False


def start_node(
    stack: Stack,
    name: str,
    num_cpus: int,
    object_store_bytes: int = 200_000_000,
    timeout_s: float = START_TIMEOUT_S,
    environment: Mapping[str, str] | None = None,
) -> Node:
    """Start a node `name` of the stack's Ray cluster and return it when its agent reports it healthy.

    Args:
        stack: whose cluster it joins.
        name: of its log.
        num_cpus: that Ray is told of.
        object_store_bytes: of its object store.
        timeout_s: seconds that it has to become healthy.
        environment: variables of its processes beside those of the stack.

    Raises StackError with the end of its log when it does not become healthy in time; nothing of it stays then.
    """
    taken: set[int] = set()
    ports = {}
    for role in NODE_PORTS:
        ports[role] = choose_port(taken)
        taken.add(ports[role])
    log = stack.state_dir / "logs" / f"{name}.log"
    settings = stack.state_dir / f"{name}.json"
    settings.write_text(json.dumps(_settings(stack, ports, num_cpus, object_store_bytes)))
    command = [sys.executable, "-m", "infra.ray_node", str(settings)]
    tag = f"{name}@{stack.state_dir}"
    pid, record = spawn(name, command, _environment(stack) | dict(environment or {}), log, stack.state_dir, tag)
    node = Node(replace(record, ports=ports), log)
    deadline = time.monotonic() + timeout_s
    try:
        while not _healthy(ports["agent"]):
            reap(pid)
            if leader(record) is None or time.monotonic() > deadline:
                raise StackError(f"{name}: the Ray node did not become healthy\n  last lines of {log}:\n{tail(log)}")
            time.sleep(POLL_S)
    except BaseException:  # an interrupt too
        stop_node(node)
        raise
    return node


def stop_node(node: Node) -> None:
    """End every process of the node. Raises StackError when one survives."""
    stop(node.record, STOP_GRACE_S)


def alive_nodes(stack: Stack) -> int:
    """Nodes of the cluster that Ray holds for alive, the head included; a killed one counts until Ray has noticed.

    Raises OSError when the dashboard does not answer.
    """
    _, body = services.get(stack.ports["ray"]["dashboard"], "/nodes?view=summary")
    summary = json.loads(body)["data"]["summary"]
    return sum(one["raylet"]["state"] == "ALIVE" for one in summary)


def drain_node(stack: Stack, node: Node, deadline_s: int) -> None:
    """Give Ray the notice that the node will be taken away in `deadline_s` seconds, as a cloud's preemption does.

    Nobody takes it away: that is the caller's part. Raises StackError when Ray refuses.
    """
    command = [
        services.executable("ray"),
        "drain-node",
        f"--address={stack.ray_gcs_address}",
        f"--node-id={node.node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=notice",
        f"--deadline-remaining-seconds={deadline_s}",
    ]
    env = services.full_env(stack)
    env.pop("RAY_ADDRESS", None)
    done = subprocess.run(command, env=env, timeout=DRAIN_LIMIT_S, capture_output=True, text=True)
    if done.returncode != 0:
        raise StackError(f"{node.record.service}: Ray does not drain it: {done.stdout}{done.stderr}")


def _healthy(agent_port: int) -> bool:
    try:
        return services.get(agent_port, "/api/local_raylet_healthz")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _settings(stack: Stack, ports: dict[str, int], num_cpus: int, object_store_bytes: int) -> dict[str, object]:
    """The fields of Ray's RayParams that `infra.ray_node` takes."""
    return {
        "gcs_address": stack.ray_gcs_address,
        "node_ip_address": HOST,
        "node_manager_port": ports["node_manager"],
        "object_manager_port": ports["object_manager"],
        "dashboard_agent_listen_port": ports["agent"],
        "metrics_agent_port": ports["agent_grpc"],
        "runtime_env_agent_port": ports["runtime_env_agent"],
        "metrics_export_port": ports["metrics"],
        "min_worker_port": 0,  # workers: any free port, chosen by the kernel
        "max_worker_port": 0,
        "num_cpus": num_cpus,
        "num_gpus": 0,
        "object_store_memory": object_store_bytes,
        "include_log_monitor": False,
    }


def _environment(stack: Stack) -> dict[str, str]:
    env = services.full_env(stack)
    env.pop("RAY_ADDRESS", None)  # a node is no client of another cluster
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return env | {
        "PYTHONPATH": os.pathsep.join(paths),
        **services.OF_EVERY_NODE,
        "RAY_API_SERVER_ADDRESS": stack.ray_dashboard,
    }
