"""A start of the workers that leaves out nodes where something was stuck, as long as the others have room for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import ray

from pipelines.recovery.room import Demand, workers_that_fit

NODE_LABEL = "ray.io/node-id"


def avoidable(
    nodes: Collection[str], per_worker: Mapping[str, float], workers: int, labels: Mapping[str, str]
) -> frozenset[str]:
    """Those of `nodes`, if all workers fit on the others; else none: a node that got stuck once is better than none.

    Counted is what nodes with these labels have, not what is free: the workers that are gone held some of it.
    """
    left = workers_that_fit(Demand(workers, per_worker, labels), ray.nodes(), nodes)
    return frozenset(nodes) if left >= workers else frozenset()


def node_selector(labels: Mapping[str, str], avoided: Collection[str]) -> dict[str, str] | None:
    """What asks Ray for a node with these labels that is none of those to avoid; None where any node will do."""
    others = {NODE_LABEL: f"!in({','.join(sorted(avoided))})"} if avoided else {}
    return {**labels, **others} or None
