"""Tell Ray that this node is about to be taken away: `python -m infra.drain --seconds 300`.

A training that has workers here makes a checkpoint at its next step (`pipelines/recovery/preemption.py`); a SIGTERM to
Ray's own processes would leave no time for one. For a hook that runs before a node is stopped: it waits until the time
is over, since the node lives no longer than the hook. The cluster is that of RAY_ADDRESS; none is looked for.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

LIMIT_S = 60.0
"""Seconds that one request to Ray may take."""
RAYLET, NODE_ID_FLAG, ADDRESS_FLAG = "raylet", "--node_id=", "--gcs-address="


class DrainError(RuntimeError):
    """Ray could not be told; the message says why."""


def drain(node_id: str, seconds: int, address: str) -> None:
    """Give the notice for one node of the cluster at `address`. Raises DrainError when Ray refuses."""
    command = [
        str(Path(sysconfig.get_path("scripts"), "ray")),
        "drain-node",
        f"--address={address}",
        f"--node-id={node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message=the node is being stopped",
        f"--deadline-remaining-seconds={seconds}",
    ]
    # It takes the address of its option, and would warn that the variable names another.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DrainError(f"Ray does not drain node {node_id}: {error}") from error
    if done.returncode != 0:
        raise DrainError(f"Ray does not drain node {node_id}: {(done.stdout + done.stderr).strip()}")


def nodes_here(address: str) -> list[str]:
    """Ids of the Ray nodes of this machine that belong to the cluster at `address`, HOST:PORT."""
    host, _, port = address.rpartition(":")
    with suppress(OSError):
        host = socket.gethostbyname(host)
    return sorted(node for node, cluster in _raylets() if cluster == f"{host}:{port}")


def _raylets() -> Iterator[tuple[str, str]]:
    """Node id and cluster of every raylet of this machine."""
    for process in psutil.process_iter(["name"]):
        if process.info["name"] != RAYLET:
            continue
        with suppress(psutil.Error, StopIteration):
            words = process.cmdline()
            yield _value(words, NODE_ID_FLAG), _value(words, ADDRESS_FLAG)


def _value(words: Sequence[str], flag: str) -> str:
    return next(word.removeprefix(flag) for word in words if word.startswith(flag))


def main(arguments: Sequence[str] | None = None, wait: Callable[[float], None] = time.sleep) -> int:
    """The command line; exit status 1 where Ray could not be told, 2 where nobody said which cluster."""
    parser = argparse.ArgumentParser(prog="python -m infra.drain", description="Tell Ray that this node will go.")
    parser.add_argument("--seconds", type=int, required=True, help="that the node has left")
    seconds = parser.parse_args(arguments).seconds
    address = os.environ.get("RAY_ADDRESS", "")
    if ":" not in address:
        print(f"error: RAY_ADDRESS is {address!r}; set it to HOST:PORT of the cluster's head", file=sys.stderr)
        return 2
    began = time.monotonic()
    nodes = nodes_here(address)
    try:
        for node in nodes:
            drain(node, seconds, address)
    except DrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not nodes:
        print(f"error: no Ray node of the cluster at {address} runs on this machine", file=sys.stderr)
        return 1
    print(f"node {', '.join(node[:12] for node in nodes)} is drained: {seconds} s are left", flush=True)
    wait(max(0.0, seconds - (time.monotonic() - began)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
