"""What a process says of itself, and the mailbox that keeps it; without Ray."""

import os
import threading

import pytest

from pipelines.io import pulse
from pipelines.io.pulse import MOST_MEMBERS, RECENT_STEPS, Beat, Mailbox, Phase, Process, Pulse, born, doing

PROCESS = Process(1, 2, "node", "host")


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Pulse:
    mine = Pulse("mailbox", "worker 0")
    monkeypatch.setattr(pulse, "this_process", lambda: PROCESS)
    monkeypatch.setattr(pulse, "_pulse", mine)
    return mine


def test_a_beat_tells_the_last_mark_and_the_slowest_of_the_last_steps(quiet: Pulse) -> None:
    quiet.mark(Phase.DATA, 3)
    quiet.mark(Phase.FORWARD, detail="last sample key7")
    quiet.step_took(50.0)
    assert quiet.beat().slowest_step_s == 50.0
    quiet.step_took(2.0)
    beat = quiet.beat()
    assert (beat.number, beat.marks, beat.slowest_step_s) == (2, 2, 2.0), "the first step has the stream's start in it"
    assert beat.doing == "forward of step 3 (last sample key7)"
    for _ in range(RECENT_STEPS):
        quiet.step_took(1.0)
    assert quiet.beat().slowest_step_s == 1.0


def test_a_data_task_is_idle_when_its_work_is_done_or_failed(quiet: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Beat] = []
    monkeypatch.setattr(quiet, "send", lambda: sent.append(quiet.beat()))
    with pytest.raises(ValueError, match="broken"), doing(Phase.READING, "s3://b/train-000000.tar"):
        raise ValueError("broken")
    assert [beat.doing for beat in sent] == ["reading (s3://b/train-000000.tar)"], "told at once"
    assert quiet.beat().phase is Phase.IDLE


def test_a_process_that_works_for_another_run_leaves_the_first(quiet: Pulse, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, Beat]] = []
    monkeypatch.setattr(Pulse, "send", lambda self, wait_s=0.0: sent.append((self.mailbox, self.beat())))
    before = threading.active_count()
    pulse.begin_data_task("another")
    assert [(mailbox, beat.phase) for mailbox, beat in sent] == [("mailbox", Phase.ENDED), ("another", Phase.START)]
    assert pulse.pulse().mailbox == "another"
    assert str(os.getpid()) in pulse.pulse().member
    assert threading.active_count() == before, "one thread a process"


def test_the_mailbox_keeps_the_newest_of_each_and_not_without_end() -> None:
    mailbox = Mailbox()
    beats = [Beat(f"m{i}", PROCESS, 1, Phase.IDLE, 1, 0, "", 0.0) for i in range(MOST_MEMBERS + 5)]
    for beat in beats:
        mailbox.put(beat)
    newest = Beat("m9", PROCESS, 2, Phase.DATA, 2, 0, "", 0.0)
    mailbox.put(newest)
    taken = mailbox.take(["m10"])
    assert len(taken) == MOST_MEMBERS - 1
    assert taken[-1] == newest
    assert {"m4", "m10"}.isdisjoint(beat.member for beat in taken)


def test_a_pulse_without_a_mailbox_costs_nothing_and_a_process_has_one_birth() -> None:
    Pulse().send()
    assert born(os.getpid()) == born(os.getpid())
    assert born(2**22 + 1) is None
