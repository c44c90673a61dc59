"""What the cluster has: nodes, their memory and temporary folders, their GPUs. Asked once, before anything is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.io.disk_room import free_bytes

ASKED_S = 20.0
"""Seconds that the nodes have for an answer; one that is late is left out."""
MIB = 2**20


@dataclass(frozen=True)
class Node:
    """One machine.

    Attributes:
        name: for people.
        cpus: that Ray knows of.
        gpus: that Ray knows of.
        ram: bytes of memory that it, or its container, has.
        temp: folder for temporary files.
        temp_free: bytes that are free there.
        gpu_memory: bytes of its smallest GPU; None without one, or where nobody tells.
        head: whether this process runs on it.
    """

    name: str
    cpus: float
    gpus: float
    ram: float
    temp: str
    temp_free: float
    gpu_memory: float | None
    head: bool


@dataclass(frozen=True)
class _Machine:
    ram: float
    temp: str
    temp_free: float
    gpu_memory: float | None


def look_at_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to; the one it runs on is looked at without a task."""
    mine = ray.get_runtime_context().get_node_id()
    alive = [node for node in ray.nodes() if node["Alive"]]
    tasks = {}
    for node in alive:
        if node["NodeID"] != mine:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            remote = ray.remote(num_cpus=0, max_retries=0)(_look).options(scheduling_strategy=there)
            tasks[node["NodeID"]] = remote.remote(node["Resources"].get("GPU", 0) > 0)
    done = set(ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=ASKED_S)[0]) if tasks else set()
    found = []
    for node in alive:
        has, here = node["Resources"], node["NodeID"] == mine
        task = tasks.get(node["NodeID"])
        if not here and task not in done:
            continue
        seen: _Machine = _look(has.get("GPU", 0) > 0) if here else ray.get(task, timeout=ASKED_S)
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        counts = (has.get("CPU", 0.0), has.get("GPU", 0.0))
        found.append(Node(name, *counts, seen.ram, seen.temp, seen.temp_free, seen.gpu_memory, here))
    return found


def _look(gpus: bool) -> _Machine:
    temp = tempfile.gettempdir()
    return _Machine(_memory(), temp, float(free_bytes(Path(temp))), _gpu_memory() if gpus else None)


def _memory() -> float:
    """Bytes of this machine, or the limit of this container (cgroup v2, then v1)."""
    limits = [float(psutil.virtual_memory().total)]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(float(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or `max`
            continue
    return min(limits)


def _gpu_memory() -> float | None:
    """Bytes of the smallest GPU, as NVIDIA's own tool tells; no process of ours touches it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    asked = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(
        asked, capture_output=True, text=True, timeout=10, check=False, env={**os.environ, "LC_ALL": "C"}
    )
    sizes = [float(line) for line in done.stdout.split() if line.replace(".", "").isdigit()]
    return min(sizes) * MIB if sizes else None
