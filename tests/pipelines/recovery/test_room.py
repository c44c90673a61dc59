"""Whether the workers can ever have room, said at once; and who holds what they wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pipelines.recovery.room import (
    Demand,
    Holding,
    NoRoomError,
    await_nodes,
    holdings_text,
    shortage,
    workers_that_fit,
)


def node(name: str, alive: bool = True, labels: dict[str, str] | None = None, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "Alive": alive, "Resources": {**resources, "memory": 1e9}, "Labels": labels or {}}


NODES = (
    node("a", CPU=8, GPU=4),
    node("b", CPU=8, GPU=4, labels={"gpu": "h100"}),
    node("c", alive=False, CPU=64, GPU=8),
)


@pytest.mark.parametrize(
    ("demand", "fits"),
    [
        (Demand(1, {"GPU": 1.0}), 8),
        (Demand(1, {"GPU": 1.0, "CPU": 3.0}), 4),
        (Demand(1, {"GPU": 3.0}), 2),
        (Demand(1, {"CPU": 5.0}), 2),
        (Demand(1, {"TPU": 1.0}), 0),
        (Demand(1, {"GPU": 1.0}, {"gpu": "h100"}), 4),
        (Demand(1, {"GPU": 1.0}, placement="STRICT_PACK"), 4),
        (Demand(1, {"GPU": 1.0}, placement="STRICT_SPREAD"), 2),
        (Demand(1, {"CPU": 0.1}), 160),
    ],
)
def test_workers_that_fit_on_empty_nodes(demand: Demand, fits: int) -> None:
    assert workers_that_fit(demand, NODES) == fits


def test_what_can_never_be_has_both_numbers() -> None:
    assert shortage(Demand(8, {"GPU": 1.0}), NODES) is None
    said = shortage(Demand(16, {"GPU": 1.0, "CPU": 1.0}), NODES)
    assert said is not None
    assert said == (
        "the workers need 16 workers of {'GPU': 1.0, 'CPU': 1.0}, and the whole cluster has room for 8 of them: "
        "2 x (8 CPU, 4 GPU)"
    )
    assert "no node" in str(shortage(Demand(1, {"GPU": 1.0}), ()))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def __call__(self) -> float:
        return self.now


def played(wait_s: float, joins_at: float) -> tuple[list[str], float]:
    clock, said = Clock(), list[str]()

    def nodes() -> Sequence[dict[str, Any]]:
        return NODES if clock() >= joins_at else NODES[:1]

    await_nodes(Demand(8, {"GPU": 1.0}), wait_s, said.append, nodes, clock.sleep, clock)
    return said, clock()


def test_room_that_is_there_is_not_spoken_of() -> None:
    assert played(900.0, joins_at=0.0) == ([], 0.0)


def test_what_is_lacking_is_said_at_once_and_once_a_minute_until_a_node_joins() -> None:
    said, seconds = played(900.0, joins_at=150.0)
    assert seconds == 150
    assert len(said) == 3
    assert "has room for 4 of them: 1 x (8 CPU, 4 GPU). Waiting for nodes to join, 900 s more" in said[0]


def test_nobody_waits_for_ever_for_what_cannot_be() -> None:
    with pytest.raises(NoRoomError, match=r"room for 4 of them.*Ask for less \(training.workers.*within 300 s"):
        played(300.0, joins_at=1e9)
    with pytest.raises(NoRoomError, match=r"or add nodes$"):
        played(0.0, joins_at=1e9)


def test_equal_holders_are_counted_together_and_the_largest_come_first() -> None:
    small = [Holding(f"task t{number} of this job", {"CPU": 0.1}) for number in range(8)]
    held = [
        Holding("actor A of job 1", {"CPU": 1.0}),
        Holding("actor A of job 1", {"CPU": 1.0}),
        Holding("a group", {"GPU": 4.0}),
    ]
    text = holdings_text([*small, *held, Holding("nothing", {"memory": 1e9})], ("CPU", "GPU"))
    assert text.startswith("4 GPU by a group; 2 CPU by 2 x actor A of job 1; 0.1 CPU by task t0")
    assert text.endswith("; and 4 more")
    assert holdings_text([], ("CPU",)) == "nobody that Ray knows of"
