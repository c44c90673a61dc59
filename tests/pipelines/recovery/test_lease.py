"""One job for a run: two contenders on simulated clocks, over local files and over the real object store."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.io import codec, conditional, storage
from pipelines.recovery.lease import (
    SILENCE_S,
    Lease,
    LeaseLostError,
    LeaseRecord,
    RunInUseError,
    hold_run,
    is_gone,
    this_process,
)
from tests.pipelines.s3_fixture import BUCKET


class Clock:
    """Seconds that pass only while somebody sleeps; what happens meanwhile is `during`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.during: Any = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.during()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.stack)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        request.getfixturevalue("s3")
        yield f"s3://{BUCKET}/runs/{tmp_path.name}/lease.json"
    else:
        yield str(tmp_path / "runs" / "a" / "lease.json")


def contender(url: str, clock: Clock, **changes: Any) -> Lease:
    settings: dict[str, Any] = {"clock": clock, "sleep": clock.sleep, "gone": lambda record: False, **changes}
    return Lease(url, "run 'a'", **settings)


def test_a_living_owner_is_refused_by_name_with_its_next_sign_of_life(url: str) -> None:
    clock = Clock()
    first, second = contender(url, clock), contender(url, clock)
    first.take()
    clock.during = first.beat
    began = clock.now
    with pytest.raises(RunInUseError, match=rf"run 'a'.*process {os.getpid()} on .*lease.json"):
        second.take()
    assert clock.now - began <= first.beat_s
    first.token.require()
    with pytest.raises(LeaseLostError):
        second.token.require()


def test_a_silent_owner_is_taken_over_after_the_stated_time_and_stops(url: str) -> None:
    clock = Clock()
    first, second = contender(url, clock), contender(url, clock)
    first.take()
    first.beat()
    began = clock.now
    second.take()
    assert SILENCE_S <= clock.now - began <= SILENCE_S + 5
    for asked in (first.token.require, first.beat, first.beat):
        with pytest.raises(LeaseLostError, match="no longer this job's"):
            asked()
    assert first.lost is not None
    first.release()  # does not touch what is the other's
    second.beat()
    second.token.require()


def test_what_was_given_back_or_left_by_a_dead_process_is_taken_at_once(url: str) -> None:
    clock = Clock()
    began = clock.now
    first = contender(url, clock)
    first.take()
    first.release()
    dead = contender(url, clock)
    dead.take()
    contender(url, clock, gone=lambda record: record.owner == dead.owner).take()
    assert clock.now - began < 3  # on a store without conditions, the time to settle


@pytest.mark.parametrize("left", [b"", b"{", b"\xff\x00", b'{"version": 7}'])
def test_a_lease_that_cannot_be_read_is_watched_like_any_other(url: str, left: bytes) -> None:
    storage.write_bytes(url, left)
    clock = Clock()
    lease = contender(url, clock)
    began = clock.now
    lease.take()
    assert clock.now - began >= SILENCE_S
    lease.beat()


def test_an_owner_whose_answer_was_lost_keeps_its_lease(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = contender(url, Clock())
    lease.take()
    write = conditional.replace

    def lost_answer(*arguments: Any, **named: Any) -> None:
        write(*arguments, **named)

    monkeypatch.setattr(conditional, "replace", lost_answer)
    lease.beat()
    monkeypatch.setattr(conditional, "replace", write)
    lease.beat()
    lease.token.require()


@pytest.mark.parametrize("before", ["nothing", "released", "silent"])
def test_of_many_who_claim_at_once_one_gets_it(url: str, before: str) -> None:
    clock = Clock()
    if before != "nothing":
        old = contender(url, clock)
        old.take()
        if before == "released":
            old.release()
    together = threading.Barrier(6)

    class Meeting(Lease):
        def _may_take(self, seen: Any, watched_since: float) -> bool:
            together.wait()  # all have seen the same
            return super()._may_take(seen, watched_since - 2 * SILENCE_S)

    def claim(number: int) -> Lease | None:
        lease = Meeting(url, "run 'a'", sleep=lambda seconds: None, gone=lambda record: False)
        try:
            lease.take()
        except RunInUseError:
            return None
        return lease

    with ThreadPoolExecutor(6) as pool:
        owners = [lease for lease in pool.map(claim, range(6)) if lease is not None]
    assert len(owners) == 1
    owners[0].token.require()


def test_a_store_without_conditions_is_written_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two have read that nothing is there and write one after the other: the last keeps it, and both know."""
    stored: dict[str, bytes] = {}

    def put(url: str, data: bytes, condition: dict[str, str]) -> str:
        stored[url] = data  # conditions are not heard of
        return "written"

    monkeypatch.setattr(conditional, "_put", put)
    monkeypatch.setattr(
        conditional, "read", lambda url: conditional.Content(stored[url], "tag") if url in stored else None
    )
    url, clocks = "s3://b/runs/a/lease.json", (Clock(), Clock())
    first, second = (contender(url, clock) for clock in clocks)
    late: list[bool] = []

    def while_the_first_settles() -> None:
        if not late:
            late.append(True)
            del stored[url]
            second.take()

    clocks[0].during = while_the_first_settles
    with pytest.raises(RunInUseError):
        first.take()
    second.token.require()
    assert clocks[1].now - 1000 == pytest.approx(conditional.SETTLE_S)


def test_only_a_process_of_this_machine_can_be_known_to_be_gone() -> None:
    mine = LeaseRecord(1, "x", "here", this_process(), "now")
    assert not is_gone(mine)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pid, _, machine = mine.process.split(" ", 2)
    assert is_gone(replace(mine, process=f"{pid} 1.00 {machine}"))  # the number was given to another
    of_child = f"{child.pid} {psutil.Process(child.pid).create_time():.2f} {machine}"
    assert not is_gone(replace(mine, process=of_child))
    child.kill()
    child.wait()
    assert is_gone(replace(mine, process=of_child))
    assert not is_gone(replace(mine, process=f"{child.pid} 1.00 another-boot"))
    assert not is_gone(replace(mine, process="?"))


def test_the_block_of_a_lost_lease_is_interrupted_and_says_why(tmp_path: Path) -> None:
    entered = []

    def robbed() -> None:
        with hold_run(str(tmp_path), "run 'a'", beat_s=0.05):
            entered.append(True)
            record = codec.decode(LeaseRecord, (tmp_path / "lease.json").read_bytes(), "lease")
            storage.write_bytes(str(tmp_path / "lease.json"), codec.encode(replace(record, owner="x")).encode())
            signal.sigtimedwait([], 10)  # a wait that nothing but a signal ends
            raise AssertionError("not interrupted")

    with pytest.raises(LeaseLostError, match="run 'a' is no longer this job's"):
        robbed()
    assert entered


def test_a_killed_driver_s_run_is_taken_at_once_on_its_machine(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pipelines.recovery.lease import hold_run
with hold_run({str(tmp_path)!r}, "run 'a'", beat_s=0.2):
    print("held", flush=True); time.sleep(60)
"""
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "held\n"
    with pytest.raises(RunInUseError, match=f"process {driver.pid} on"), hold_run(str(tmp_path), "run 'a'", beat_s=0.2):
        pass
    driver.kill()
    driver.wait()
    with hold_run(str(tmp_path), "run 'a'", silence_s=600):
        pass
    with hold_run(str(tmp_path), "run 'a'", silence_s=600):  # it was given back
        pass
