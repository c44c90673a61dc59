"""Preemption notices: by hand with a clock of their own, and on a real Ray Train group that gets both kinds."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.train
from ray.train import PreemptionInfo

from pipelines.recovery import preemption
from pipelines.recovery.preemption import Preemption, PreemptionWatch, TermNotice, preempted
from tests.pipelines.training.notices import DRAIN_S, GRACE_S, STEPS_AFTER_DRAIN


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def notice(monkeypatch: pytest.MonkeyPatch) -> Iterator[TermNotice]:
    fresh = TermNotice()
    monkeypatch.setattr(preemption, "TERM_NOTICE", fresh)
    before = signal.getsignal(signal.SIGTERM)
    yield fresh
    signal.signal(signal.SIGTERM, before)


def test_sigterm_is_a_notice_and_no_end(notice: TermNotice) -> None:
    notice.listen()
    assert not notice.requested
    os.kill(os.getpid(), signal.SIGTERM)
    first = notice.received_at
    assert notice.requested
    assert first is not None
    assert first == pytest.approx(time.time(), abs=5)
    os.kill(os.getpid(), signal.SIGTERM)
    assert notice.received_at == first, "the grace is counted from the first signal"


def test_only_worker_0_asks_for_a_look_and_only_when_it_is_due(
    notice: TermNotice, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = []
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: looks.append(1))
    clock = Clock()
    watches = [PreemptionWatch(rank, 10.0, poll_s=2.0, clock=clock) for rank in (0, 1)]
    for clock.now, expected in ((101.9, 0), (102.0, 1), (102.1, 0), (103.9, 0), (104.5, 1)):
        votes = [watch.votes() for watch in watches]
        assert votes == [(0, expected), (0, 0)]
        for watch in watches:
            assert watch.agree(0, expected) is None
    assert len(looks) == 4, "two looks, each on both workers"


def test_a_signal_to_one_worker_is_known_to_all(notice: TermNotice) -> None:
    watch = PreemptionWatch(1, grace_s=10.0)
    assert watch.agree(0, 0) is None
    told = watch.agree(1, 0)  # another worker's vote
    assert told is not None
    assert told.kind == "signal"
    assert told.seconds_left(-1) == pytest.approx(10.0, abs=1)
    notice.received_at = time.time() - 4
    assert watch.votes() == (1, 0)
    own = watch.agree(1, 0)
    assert own is not None
    assert own.seconds_left(-1) == pytest.approx(6.0, abs=1)
    error = preempted(own, 12, committed=True)
    assert "step 12 is whole" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_every_drained_node_is_told_once(notice: TermNotice, monkeypatch: pytest.MonkeyPatch) -> None:
    infos = [
        PreemptionInfo(5_000, {"a": [0, 1]}),
        PreemptionInfo(5_000, {"a": [0, 1]}),
        PreemptionInfo(None, {"b": [2]}),
        PreemptionInfo(None, {"a": [0, 1], "b": [2]}),
    ]
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: infos.pop(0))
    watch = PreemptionWatch(0, 10.0)
    told = [watch.agree(0, 1) for _ in range(4)]
    assert told[0] == Preemption("drain", 5.0, "Ray drains the nodes of workers [0, 1]")
    assert told[1] is None
    assert told[2] is not None
    assert told[2].seconds_left(7.0) == 7.0
    assert told[3] is None
    assert told[0].seconds_left(7.0) == 0.0


@pytest.mark.stack
def test_a_training_that_is_signalled_and_then_drained(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.pipelines.training.notices", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

    def read(name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        return value

    sent = read("signal")["at"]
    first = [read(f"seen-1-{rank}") for rank in (0, 1)]
    assert [one["kind"] for one in first] == ["signal", "signal"]
    assert all(one["committed"] for one in first)
    assert first[0]["step"] == first[1]["step"]
    assert first[0]["heard"] is None, "only worker 1 got the signal"
    assert 0 <= first[1]["heard"] - sent < 2.0
    assert all(0 < one["left"] < GRACE_S for one in first)
    # Both files of the checkpoint are there, though worker 0 had been ready to stop before worker 1 reported.
    assert [read(f"ready-2-{rank}")["step"] for rank in (0, 1)] == [first[0]["step"]] * 2
    second = [read(f"seen-2-{rank}") for rank in (0, 1)]
    assert [one["kind"] for one in second] == ["drain", "drain"]
    assert all(one["committed"] for one in second)
    assert second[0]["step"] == second[1]["step"]
    assert all(0 < one["left"] < DRAIN_S for one in second)
    ends = [read(f"end-{rank}")["step"] for rank in (0, 1)]
    assert ends == [second[0]["step"] + STEPS_AFTER_DRAIN] * 2, "the training goes on"
