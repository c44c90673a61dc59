"""Who is judged stuck, from beats and a clock of its own."""

import dataclasses
import random

import pytest

from pipelines.io.pulse import Beat, Phase, Process
from pipelines.recovery.stall import CONTROLLER, IN_STEPS, REPLACED_IN_A_ROW, STEPS, Judge, Limits, Stuck

LIMITS = Limits(floor_s=60.0, start_s=600.0, upload_s=300.0)
POLL_S = 2.0
TASK = "data task 71 on host"


class Cluster:
    """Members that beat every poll, each with its own phase, until they are stopped."""

    def __init__(self, *members: str, phase: Phase = Phase.FORWARD, slowest_s: float = 1.0) -> None:
        self.judge = Judge(LIMITS)
        self.now = 1000.0
        self.beats = {
            member: Beat(member, Process(10 + place, 5, "ab" * 16, "host"), 1, phase, 1, 7, "", slowest_s)
            for place, member in enumerate(members)
        }
        self.stopped: set[str] = set()

    def change(self, member: str, **fields: object) -> None:
        """Another phase or number of marks."""
        self.beats[member] = dataclasses.replace(self.beats[member], **fields)  # type: ignore[arg-type]

    def pass_time(self, seconds: float, moving: tuple[str, ...] = ()) -> tuple[Stuck | None, float]:
        """What is found first within `seconds`, and when; `moving` get on at every poll."""
        began = self.now
        while self.now < began + seconds:
            self.now += POLL_S
            for member, beat in self.beats.items():
                if member not in self.stopped:
                    marks = beat.marks + (member in moving)
                    self.change(member, number=beat.number + 1, marks=marks)
            self.judge.see(self.beats.values(), self.now)
            if found := self.judge.stuck(self.now):
                return found, self.now - began
        return None, self.now - began


def names(found: Stuck | None) -> list[str]:
    assert found is not None
    return [beat.member for beat in found.culprits]


@pytest.mark.parametrize("phase", [phase for phase in Phase if phase is not Phase.ENDED])
@pytest.mark.parametrize("member", ["worker 1", CONTROLLER, TASK])
def test_a_process_that_is_stopped_is_found_whatever_it_did(member: str, phase: Phase) -> None:
    cluster = Cluster("worker 0", "worker 1", CONTROLLER, TASK)
    for other in (CONTROLLER, TASK):
        cluster.change(other, phase=Phase.RUNNING)
    cluster.change(member, phase=phase)
    assert cluster.pass_time(300, moving=("worker 0", "worker 1"))[0] is None
    cluster.stopped = {member}
    found, seconds = cluster.pass_time(300, moving=("worker 0",))
    assert names(found) == [member]
    assert found is not None
    assert (found.kind, found.action) == ("silent", "replace" if member == TASK else "restart")
    limit = 2 * LIMITS.floor_s if phase in (Phase.START, Phase.LOAD) else LIMITS.floor_s + 1.0
    assert limit < seconds <= limit + 2 * POLL_S
    assert f"{member} (pid" in str(found)
    assert f" on host, node abababababab) last in {phase}" in str(found)


@pytest.mark.parametrize("slowest_s", [0.1, 5.0, 30.0])
@pytest.mark.parametrize("phase", sorted(IN_STEPS - {Phase.COLLECTIVE, Phase.DATA}))
def test_the_one_that_is_in_no_collective_holds_the_others(phase: Phase, slowest_s: float) -> None:
    cluster = Cluster("worker 0", "worker 1", "worker 2", phase=Phase.COLLECTIVE, slowest_s=slowest_s)
    cluster.change("worker 2", phase=phase, detail="last sample key9")
    found, seconds = cluster.pass_time(10_000)
    assert names(found) == ["worker 2"]
    assert found is not None
    assert found.kind == "still"
    limit = max(LIMITS.floor_s, STEPS * slowest_s)
    assert limit < seconds <= limit + 2 * POLL_S
    assert f"last in {phase} of step 7 (last sample key9). Meanwhile: worker 0 in collective; worker 1 in" in str(found)


def test_where_all_wait_for_each_other_all_are_ended() -> None:
    cluster = Cluster("worker 0", "worker 1", phase=Phase.COLLECTIVE)
    assert names(cluster.pass_time(10_000)[0]) == ["worker 0", "worker 1"]


@pytest.mark.parametrize(
    ("phase", "slowest_s", "limit_s"),
    [
        (Phase.FORWARD, 0.0, 600.0),
        (Phase.START, 1.0, 600.0),
        (Phase.LOAD, 1.0, 600.0),
        (Phase.CHECKPOINT, 1.0, 600.0),
        (Phase.VALIDATION, 1.0, 600.0),
        (Phase.UPLOAD, 1.0, 900.0),
    ],
)
def test_what_has_no_known_length_gets_more_time(phase: Phase, slowest_s: float, limit_s: float) -> None:
    cluster = Cluster("worker 0", phase=phase, slowest_s=slowest_s)
    found, seconds = cluster.pass_time(10_000)
    assert found is not None
    assert limit_s < seconds <= limit_s + 2 * POLL_S


def test_one_worker_that_gets_on_is_enough() -> None:
    cluster = Cluster("worker 0", "worker 1", phase=Phase.COLLECTIVE)
    assert cluster.pass_time(3000, moving=("worker 1",))[0] is None


def test_a_data_task_that_all_wait_for_is_replaced_and_after_two_in_vain_all_begin_again() -> None:
    cluster = Cluster("worker 0", "worker 1", TASK, phase=Phase.DATA)
    for _ in range(REPLACED_IN_A_ROW):
        cluster.change(TASK, phase=Phase.ENCODING, detail="row 48, sample key48")
        found, _ = cluster.pass_time(200)
        assert names(found) == [TASK]
        assert found is not None
        assert found.action == "replace"
        assert "row 48, sample key48" in str(found)
        cluster.judge.replaced(found.culprits, cluster.now)
    found, _ = cluster.pass_time(1000)
    assert found is not None
    assert (names(found), found.action) == (["worker 0", "worker 1"], "restart")


def test_a_wait_for_data_that_nobody_is_known_to_cause_has_the_time_of_a_start() -> None:
    cluster = Cluster("worker 0", "worker 1", phase=Phase.COLLECTIVE)
    cluster.change("worker 1", phase=Phase.DATA)
    found, seconds = cluster.pass_time(10_000)
    assert names(found) == ["worker 1"]
    assert LIMITS.start_s < seconds <= LIMITS.start_s + 2 * POLL_S


def test_reading_has_the_patience_of_storage() -> None:
    cluster = Cluster("worker 0", TASK, phase=Phase.DATA)
    cluster.change(TASK, phase=Phase.READING, detail="s3://b/train-000003.tar")
    found, seconds = cluster.pass_time(10_000)
    assert (names(found), seconds > LIMITS.start_s) == ([TASK], True)
    assert "s3://b/train-000003.tar" in str(found)


def test_a_start_that_nobody_comes_of_is_found_and_waiting_for_room_is_not() -> None:
    cluster = Cluster(CONTROLLER, phase=Phase.ROOM)
    assert cluster.pass_time(5000)[0] is None
    for _ in range(30):  # Ray asks again every minute
        assert cluster.pass_time(60)[0] is None
        cluster.change(CONTROLLER, phase=Phase.PLACE, marks=cluster.beats[CONTROLLER].marks + 1)
    found, seconds = cluster.pass_time(10_000)
    assert found is not None
    assert (found.kind, names(found)) == ("start", [CONTROLLER])
    assert seconds <= LIMITS.start_s + 2 * POLL_S


def test_members_that_ended_and_those_of_an_earlier_attempt_are_no_concern() -> None:
    cluster = Cluster("worker 0", CONTROLLER, TASK, phase=Phase.ENDED)
    cluster.stopped = set(cluster.beats)
    assert cluster.pass_time(3000)[0] is None
    cluster = Cluster("worker 0", CONTROLLER, phase=Phase.RUNNING)
    cluster.pass_time(10, moving=("worker 0",))
    assert sorted(cluster.judge.begin(cluster.now)) == [CONTROLLER, "worker 0"]
    assert cluster.judge.stuck(cluster.now + 3000) is None


def test_an_observer_that_was_stopped_blames_nobody() -> None:
    cluster = Cluster("worker 0", CONTROLLER, phase=Phase.FORWARD)
    cluster.change(CONTROLLER, phase=Phase.RUNNING)
    cluster.pass_time(10)
    cluster.now += 5000
    cluster.judge.slept(5000, cluster.now)
    assert cluster.judge.stuck(cluster.now) is None
    assert names(cluster.pass_time(3000)[0]) == ["worker 0"], "and watches on"


@pytest.mark.parametrize("seed", range(40))
def test_a_training_that_gets_on_is_never_called_stuck(seed: int) -> None:
    """Steps and pauses of any length below the limits, in any order of phases."""
    chance = random.Random(seed)
    slowest = chance.uniform(0.1, 20.0)
    members = [f"worker {rank}" for rank in range(chance.randint(1, 5))]
    cluster = Cluster(*members, CONTROLLER, slowest_s=slowest)
    cluster.change(CONTROLLER, phase=Phase.RUNNING)
    for _ in range(50):
        phase = chance.choice([one for one in Phase if one is not Phase.ENDED])
        for member in members:
            cluster.change(member, phase=phase, marks=cluster.beats[member].marks + 1)
        limit = LIMITS.still_s(cluster.beats[members[0]])
        found, _ = cluster.pass_time(chance.uniform(0.0, limit - 2 * POLL_S))
        assert found is None
