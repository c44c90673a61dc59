"""Processes that do not answer are looked at and ended from beside them; another one of the same number never is."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pipelines.io.pulse import Process, born, state_of
from pipelines.recovery import other_nodes, stuck_processes
from pipelines.recovery.stuck_processes import end, stack_of

CHILD = """
import sys, time
from pipelines.recovery.stuck_processes import show_stacks_on_signal
show_stacks_on_signal()
def waits_for_nothing():
    print("ready", flush=True)
    time.sleep(60)
waits_for_nothing()
"""


@pytest.fixture(scope="module")
def child() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def as_member(process: subprocess.Popen[str]) -> Process:
    return Process(process.pid, born(process.pid) or 0, "node", "host")


def test_the_stack_of_a_process_is_told_with_and_without_py_spy(
    child: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "waits_for_nothing" in stack_of(as_member(child))
    monkeypatch.setattr(stuck_processes, "_py_spy", lambda pid: None)
    assert "waits_for_nothing" in stack_of(as_member(child)), "by faulthandler"


def test_a_stopped_process_is_seen_as_such_and_ended_and_no_other(child: subprocess.Popen[str]) -> None:
    member = as_member(child)
    other = dataclasses.replace(member, born=member.born - 1)
    assert (end(other), stack_of(other)) == ("gone", "the process is gone")
    assert end(member, if_stopped=True) == "left"
    os.kill(child.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 10
    while state_of(child.pid) != "T" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stack_of(member).startswith("state T (stopped)")
    assert child.poll() is None
    assert end(member, if_stopped=True) == "ended"
    assert child.wait(timeout=10) == -signal.SIGKILL
    assert end(member) == "gone"


def node(name: str, cpus: float, alive: bool = True) -> dict[str, object]:
    return {"NodeID": name, "Alive": alive, "Resources": {"CPU": cpus}}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node("a", 8), node("b", 8)], {"a"}),
        ([node("a", 8), node("b", 1), node("c", 1)], {"a"}),
        ([node("a", 8), node("b", 1)], set()),
        ([node("a", 8), node("b", 8, alive=False)], set()),
        ([node("a", 8)], set()),
    ],
)
def test_a_node_is_left_out_while_all_workers_fit_on_the_others(
    nodes: list[dict[str, object]], expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_nodes.ray, "nodes", lambda: nodes)
    avoided = other_nodes.avoidable({"a"}, {"CPU": 1.0}, workers=2, labels={})
    assert avoided == expected
    assert other_nodes.node_selector({}, avoided) == ({"ray.io/node-id": "!in(a)"} if expected else None)


def test_only_nodes_with_the_labels_that_are_asked_for_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, h100 = "ray.io/accelerator-type", {"ray.io/accelerator-type": "H100"}
    nodes = [
        {"Alive": True, "NodeID": name, "Resources": {"GPU": 8.0}, "Labels": {gpu: kind}}
        for name, kind in {"a": "H100", "b": "H100", "c": "A100"}.items()
    ]
    monkeypatch.setattr(other_nodes.ray, "nodes", lambda: nodes)
    assert other_nodes.avoidable({"a"}, {"GPU": 1.0}, 16, {}) == {"a"}
    assert other_nodes.avoidable({"a"}, {"GPU": 1.0}, 8, h100) == {"a"}
    assert other_nodes.avoidable({"a"}, {"GPU": 1.0}, 9, h100) == frozenset()
    assert other_nodes.node_selector(h100, {"a"}) == {gpu: "H100", "ray.io/node-id": "!in(a)"}
