"""A start of the workers that leaves out nodes where something was stuck, as long as the others have room for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ray

NODE_LABEL = "ray.io/node-id"


def avoidable(
    nodes: Collection[str], per_worker: Mapping[str, float], workers: int, labels: Mapping[str, str]
) -> frozenset[str]:
    """Those of `nodes`, if all workers fit on the others; else none: a node that got stuck once is better than none.

    Counted is what nodes with these labels have, not what is free: the workers that are gone held some of it.
    """
    alive = [node for node in ray.nodes() if node["Alive"] and labels.items() <= node.get("Labels", {}).items()]
    return frozenset(nodes) if _room(alive, nodes, per_worker) >= workers else frozenset()


def _room(alive: Collection[Mapping[str, Any]], without: Collection[str], per_worker: Mapping[str, float]) -> int:
    """Workers that fit on the nodes that are left; any number where they reserve nothing."""
    others = [node["Resources"] for node in alive if node["NodeID"] not in without]
    return sum(
        min((int(has.get(name, 0.0) // amount) for name, amount in per_worker.items()), default=2**31) for has in others
    )


def node_selector(labels: Mapping[str, str], avoided: Collection[str]) -> dict[str, str] | None:
    """What asks Ray for a node with these labels that is none of those to avoid; None where any node will do."""
    others = {NODE_LABEL: f"!in({','.join(sorted(avoided))})"} if avoided else {}
    return {**labels, **others} or None
