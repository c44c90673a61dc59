"""One more node of a Ray cluster on loopback: `python -m infra.ray_node SETTINGS.json`, until SIGTERM.

`ray start --address` refuses to join a cluster whose addresses it must not replace by the machine's outer one
(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, see services.py). This starts what that command starts, as Ray's own
`cluster_utils.Cluster.add_node` does. The node ends with its raylet.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

POLL_S = 0.2


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main(settings_file: str) -> int:
    """`SETTINGS.json` holds the fields of Ray's RayParams. Exit status 1 when a process of the node ends by itself."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    signal.signal(signal.SIGTERM, _end)
    settings = json.loads(Path(settings_file).read_text())
    node = Node(RayParams(**settings), head=False, shutdown_at_exit=False, spawn_reaper=True)
    try:
        while not node.dead_processes():
            time.sleep(POLL_S)
        return 1
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
