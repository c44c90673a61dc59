"""A phase as a task: what it says and raises is the driver's, it waits for room, and a lost process begins again."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import OutOfMemoryError
from ray.util.placement_group import placement_group, remove_placement_group

from jobs.recipes import recipe
from pipelines.config.settings import SettingsError
from pipelines.io.console import progress, quiet, say
from pipelines.job import phase_task
from pipelines.job.phase_task import PhaseError, Reservation, on_device, reserve, run_task
from pipelines.recovery.room import NoRoomError
from pipelines.sizing.estimate import estimate
from pipelines.sizing.layout import Layout
from pipelines.sizing.model_size import model_size

SMALL = Reservation(cpus=1.0, memory=10**8)
GB = 10**9


def alive(**resources: float) -> dict[str, Any]:
    return {"Alive": True, "NodeID": "a", "Resources": resources}


# ------------------------------------------------------------------------------------------------------- what it takes


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([alive(CPU=8.0, memory=64e9)], (4.0, 0.0, 32 * GB)),
        ([alive(CPU=0.0, memory=99e9), alive(CPU=8.0, memory=64e9)], (4.0, 0.0, 32 * GB)),  # a head that takes no tasks
        ([alive(CPU=2.0, memory=64e9)], (2.0, 0.0, 32 * GB)),
        ([alive(CPU=8.0, memory=16e9), alive(CPU=8.0, memory=20e9)], (4.0, 0.0, 20 * GB)),
        ([{**alive(CPU=8.0, memory=64e9), "Alive": False}, alive(CPU=1.0, memory=8e9)], (1.0, 0.0, 8 * GB)),
        ([], (4.0, 0.0, 32 * GB)),
    ],
)
def test_no_more_is_reserved_than_a_node_has(nodes: list[dict[str, Any]], expected: tuple[float, float, int]) -> None:
    got = Reservation(4.0, 0.0, 32 * GB, 7.0).within(nodes)
    assert (got.cpus, got.gpus, got.memory) == expected
    assert got.wait_s == 7.0


def test_a_gpu_is_worth_more_than_memory() -> None:
    nodes = [alive(CPU=64.0, memory=999e9), alive(CPU=8.0, GPU=1.0, memory=20e9)]
    assert Reservation(1.0, 1.0, 32 * GB).within(nodes) == Reservation(1.0, 1.0, 20 * GB)


def test_memory_is_that_of_the_estimate_and_a_gpu_goes_with_gpu_training() -> None:
    large, tiny = recipe("pretrain", "meteor_x4_7b"), recipe("pretrain", "tiny")
    found = estimate(large, Layout(2, 8.0, 1000), model_size(large))
    needs = reserve(large, found, "export", "parity")
    assert needs.memory == int(max(found.total("export", "task", "ram"), found.total("parity", "task", "ram")))
    assert needs.memory > 17e9  # 8.8 G parameters in bf16
    assert needs.gpus == 1.0
    small = reserve(tiny, estimate(tiny, Layout(), model_size(tiny)), "answer")
    assert (small.cpus, small.gpus) == (2.0, 0.0)
    assert small.memory < 3e9


# ------------------------------------------------------------------------------------------------------ on the cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def speak(number: int) -> tuple[int, int]:
    say(f"  began with {number}")
    progress(1, 2, "half")
    logging.getLogger("pipelines.job").warning("odd")
    logging.getLogger("elsewhere").warning("not for people")
    warnings.warn("deprecated somewhere", DeprecationWarning, stacklevel=1)
    say("two\nlines")
    return number + 1, os.getpid()


def refuse(path: str) -> None:
    say("  looked")
    raise SettingsError(f"{path} is wrong")


def die_once(marker: Path) -> str:
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def name_of_device(number: int, device: str) -> str:
    return f"{number} on {device}"


@pytest.mark.stack
def test_what_it_says_is_shown_in_its_order_and_its_result_returned(
    cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with quiet(tmp_path / "log"):
        say("[export] begins")
        result, pid = run_task(partial(speak, 4), "export", SMALL)
        say("[answer] begins")
    assert result == 5
    assert pid != os.getpid()
    lines = capfd.readouterr().out.splitlines()
    assert lines == ["[export] begins", "  began with 4", "half", "  warning: odd", "two", "lines", "[answer] begins"]


@pytest.mark.stack
def test_without_a_console_lines_are_printed_without_marks(cluster: None, capfd: pytest.CaptureFixture[str]) -> None:
    run_task(partial(speak, 4), "export", SMALL)
    out = capfd.readouterr().out
    assert "  began with 4\nhalf\n" in out
    assert "[meteor" not in out


@pytest.mark.stack
def test_an_error_is_raised_as_it_is(cluster: None) -> None:
    with pytest.raises(SettingsError, match=r"^a/b is wrong$") as caught:
        run_task(partial(refuse, "a/b"), "export", SMALL)
    assert "refuse" in str(caught.value.__cause__)  # where it was raised


@pytest.mark.stack
def test_without_a_gpu_it_runs_on_the_cpu(cluster: None) -> None:
    assert run_task(partial(on_device, name_of_device, 3), "answer", SMALL) == "3 on cpu"


@pytest.mark.stack
def test_a_lost_process_begins_again_and_not_for_ever(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(phase_task, "TRIES", 2)
    assert run_task(partial(die_once, tmp_path / "marker"), "export", SMALL, here=True) == "done"
    assert "warning: export lost its process or node and begins again" in capfd.readouterr().out
    with pytest.raises(PhaseError, match="export lost its process or node 2 times, the last time so"):
        run_task(die, "export", SMALL)


@pytest.fixture
def held() -> Iterator[None]:
    """Somebody else's reservation of all but 1 of the 6 CPUs."""
    group = placement_group([{"CPU": 5.0}], name="another's")
    ray.get(group.ready(), timeout=60)
    yield
    remove_placement_group(group)


@pytest.mark.stack
def test_it_says_who_holds_its_room_and_does_not_wait_for_ever(
    cluster: None, held: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(phase_task, "TELL_S", 0.5)
    with pytest.raises(
        NoRoomError, match=r"answer waits for room in the cluster: it needs 2 CPU.*held by: 5 CPU by .*another's"
    ):
        run_task(die, "answer", Reservation(cpus=2.0, wait_s=0.9))
    assert "  answer waits for room in the cluster: it needs 2 CPU, no memory; free: " in capfd.readouterr().out
    assert run_task(os.getpid, "answer", Reservation(cpus=1.0)) != os.getpid()  # the other does not begin later


def test_one_that_was_ended_for_lack_of_memory_says_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def follow(*_: Any) -> None:
        raise OutOfMemoryError("Task was killed due to the node running low on memory.")

    monkeypatch.setattr(phase_task, "_follow", follow)
    monkeypatch.setattr(ray, "nodes", lambda: [alive(CPU=2.0, memory=4e9)])
    with pytest.raises(PhaseError, match=r"export was ended for lack of memory; it had reserved 1 CPU, 100 MB memory"):
        run_task(die, "export", SMALL)
