"""Room in the cluster for the workers: whether there can ever be enough, and who holds what they wait for.

Ray waits without a limit and without a word for resources that no node has, since an autoscaler might add one.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util import placement_group_table
from ray.util.state import list_actors, list_tasks

from pipelines.io.console import say

POLL_S = 2.0
EVERY_S = 60.0
"""Seconds between two lines to people who wait."""
STATE_S = 5
"""Seconds that Ray's state API has for an answer."""
SHOWN = 6
"""Holders that are named."""
logger = logging.getLogger(__name__)


class NoRoomError(ValueError):
    """The cluster as a whole is too small for the workers; the message has both numbers and the settings to change."""


@dataclass(frozen=True)
class Demand:
    """What the workers of a training reserve.

    Attributes:
        workers: the least that it begins with.
        per_worker: resource -> amount.
        labels: that a node must have.
        placement: Ray's strategy; STRICT_PACK wants all on one node, STRICT_SPREAD one on each.
    """

    workers: int
    per_worker: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    placement: str = "PACK"

    def __str__(self) -> str:
        """For people."""
        on = f" on nodes labelled {dict(self.labels)}" if self.labels else ""
        how = {"STRICT_PACK": ", all on one node", "STRICT_SPREAD": ", each on a node of its own"}
        return f"{self.workers} workers of {dict(self.per_worker)}{on}{how.get(self.placement, '')}"


def workers_that_fit(demand: Demand, nodes: Iterable[Mapping[str, Any]], without: Collection[str] = frozenset()) -> int:
    """Workers for which some nodes have room when nothing else runs there; any number where they reserve nothing.

    Args:
        demand: what they reserve.
        nodes: as `ray.nodes()` gives them.
        without: ids of nodes to leave out.
    """
    suited = [
        node["Resources"]
        for node in nodes
        if node["Alive"] and node["NodeID"] not in without and demand.labels.items() <= node.get("Labels", {}).items()
    ]
    amounts = {name: amount for name, amount in demand.per_worker.items() if amount}
    rooms = [
        min((int(has.get(name, 0.0) / amount + 1e-9) for name, amount in amounts.items()), default=2**31)
        for has in suited
    ]
    if demand.placement == "STRICT_PACK":
        return max(rooms, default=0)
    return sum(min(room, 1) if demand.placement == "STRICT_SPREAD" else room for room in rooms)


def shortage(demand: Demand, nodes: Collection[Mapping[str, Any]]) -> str | None:
    """Why the workers can never begin on these nodes; None where they can."""
    fits = workers_that_fit(demand, nodes)
    if fits >= demand.workers:
        return None
    alive = [node for node in nodes if node["Alive"]]
    names = sorted({"CPU", "GPU", *demand.per_worker})
    has = [", ".join(f"{node['Resources'].get(name, 0):g} {name}" for name in names) for node in alive]
    counted = "; ".join(f"{count} x ({text})" for text, count in Counter(has).items()) or "no node"
    return f"the workers need {demand}, and the whole cluster has room for {fits} of them: {counted}"


def await_nodes(
    demand: Demand,
    wait_s: float,
    tell: Callable[[str], None] = say,
    nodes: Callable[[], Collection[Mapping[str, Any]]] = ray.nodes,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Return as soon as the cluster, free of anything else, has room for the workers; say at once what is lacking.

    Args:
        demand: of the workers.
        wait_s: seconds to wait for nodes that join.
        tell: says a line.
        nodes: asks for the cluster's nodes.
        sleep: waits.
        clock: seconds that pass.

    Raises:
        NoRoomError: it has not after `wait_s`.
    """
    began = told = clock()
    first = True
    while (lacking := shortage(demand, nodes())) is not None:
        waited = clock() - began
        if waited >= wait_s:
            raise NoRoomError(
                f"{lacking}. Ask for less (training.workers or training.min_workers, training.cpus_per_worker, "
                "training.gpus_per_worker), or add nodes"
                + (f"; none joined within {wait_s:.0f} s (training.room_wait_s)" if wait_s else "")
            )
        if first or clock() - told >= EVERY_S:
            first, told = False, clock()
            tell(f"  {lacking}. Waiting for nodes to join, {wait_s - waited:.0f} s more (training.room_wait_s)")
        sleep(min(POLL_S, wait_s))


# ------------------------------------------------------------------------------------------------------- who holds what


@dataclass(frozen=True)
class Holding:
    """Resources that somebody holds.

    Attributes:
        who: for people.
        resources: of all of them together.
    """

    who: str
    resources: Mapping[str, float]


WORKERS_WAIT = "the workers wait for room in the cluster: they need"


def waiting_line(needs: str, wanted: Collection[str] = ("CPU", "GPU"), wait: str = WORKERS_WAIT) -> str:
    """What workers, or others, that wait for room need, what is free, and who holds the rest."""
    free = {name: amount for name, amount in ray.available_resources().items() if name in wanted}
    held = holdings_text(current_holdings(), wanted)
    return f"{wait} {needs}; free: {free or 'nothing'}; held by: {held}"


def holdings_text(holdings: Iterable[Holding], wanted: Collection[str]) -> str:
    """The largest holders of these resources; equal ones are counted together."""
    found: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    for one in holdings:
        amounts = [one.resources.get(name, 0.0) for name in wanted]
        if any(amounts):
            counts[one.who] += 1
            found[one.who] = [
                before + more for before, more in zip(found.get(one.who, [0.0] * len(amounts)), amounts, strict=True)
            ]
    ordered = sorted(found.items(), key=lambda item: sum(item[1]), reverse=True)
    texts = []
    for who, amounts in ordered[:SHOWN]:
        what = ", ".join(f"{amount:g} {name}" for name, amount in zip(wanted, amounts, strict=True) if amount)
        texts.append(f"{what} by {f'{counts[who]} x ' if counts[who] > 1 else ''}{who}")
    if len(ordered) > SHOWN:
        texts.append(f"and {len(ordered) - SHOWN} more")
    return "; ".join(texts) or "nobody that Ray knows of"


def current_holdings() -> list[Holding]:
    """Placement groups, actors and tasks that hold resources now; the latter two as far as Ray's state API answers."""
    mine = ray.get_runtime_context().get_job_id()
    groups = [
        Holding(
            f"a placement group ({len(group['bundles'])} bundles, {group['name'] or group['placement_group_id'][:8]})",
            _sum(group["bundles"].values()),
        )
        for group in placement_group_table().values()
        if group["state"] == "CREATED"
    ]
    return groups + _from_state_api(mine)


def _from_state_api(mine: str) -> list[Holding]:
    def where(job: str) -> str:
        return "this job" if job == mine else f"job {job}"

    try:
        actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True, timeout=STATE_S, limit=1000)
        tasks = list_tasks(filters=[("state", "=", "RUNNING")], detail=True, timeout=STATE_S, limit=1000)
    except Exception as error:  # the dashboard is not there, or is busy: who holds it is said as far as it is known
        logger.info("Ray's state API does not answer: %s: %s", type(error).__name__, error)
        return []
    outside = [one for one in actors if not one.placement_group_id]  # those in a group are counted with it
    held = [Holding(f"actor {one.class_name} of {where(one.job_id)}", one.required_resources or {}) for one in outside]
    running = [one for one in tasks if one.type == "NORMAL_TASK" and not one.placement_group_id]
    return held + [Holding(f"task {one.name} of {where(one.job_id)}", one.required_resources or {}) for one in running]


def _sum(bundles: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    return dict(total)
