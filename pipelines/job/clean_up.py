"""What a run that has ended leaves on the nodes: their copies of its files go."""

from __future__ import annotations

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.io.console import say
from pipelines.io.node_copies import remove_copies
from pipelines.io.run_folder import RunFolder

WAIT_S = 30.0


def remove_copies_everywhere(run: RunFolder) -> int:
    """Remove the copies of a run's files on every node that lives; how many were removed.

    A node that does not answer within WAIT_S is said: its copies go when nobody has used them for a day, or when
    something else needs their room.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(remove_copies)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(run.url): node
        for node in nodes
    }
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=WAIT_S)
    removed, failed = 0, [asked[one][:12] for one in late]
    for one in done:
        try:
            removed += ray.get(one, timeout=WAIT_S)
        except ray.exceptions.RayError:  # the node has gone meanwhile
            failed.append(asked[one][:12])
    if failed:
        say(f"  copies of this run stay for now on the nodes {', '.join(failed)}, which did not answer")
    return removed
