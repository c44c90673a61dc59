"""The loop that tries again, on a clock that the test moves."""

import time

import pytest

from pipelines.io import retry as module
from pipelines.io.errors import TransientError
from pipelines.io.retry import Backoff, Progress, StalledError, retry, with_stall_limit


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made; time passes in them alone."""
    now, made = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        made.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(module.time, "sleep", sleep)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return made


def failing(times: int, error: Exception) -> list[Exception]:
    return [error] * times


def call(faults: list[Exception]) -> str:
    if faults:
        raise faults.pop()
    return "done"


def test_pauses_double_up_to_the_longest(pauses: list[float]) -> None:
    faults = failing(7, TransientError("away"))
    assert retry(lambda: call(faults), "it", retry_s=60) == "done"
    assert pauses == [0.25, 0.5, 1, 2, 4, 5, 5]


def test_the_last_try_is_at_the_very_end(pauses: list[float], caplog: pytest.LogCaptureFixture) -> None:
    faults = failing(99, TransientError("away"))
    with pytest.raises(TransientError, match="away"):
        retry(lambda: call(faults), "the thing", retry_s=10)
    assert (sum(pauses), pauses[-1]) == (10, 2.25)
    assert [record.getMessage() for record in caplog.records] == [
        "the thing fails for 8 s, is tried for up to 10 s: away"
    ]


def test_what_does_not_pass_is_raised_at_once(pauses: list[float]) -> None:
    for faults, attempts in (
        (failing(1, ValueError("wrong")), None),
        ([ValueError("wrong"), TransientError("away")], None),  # taken from the end
        (failing(9, TransientError("wrong")), 2),
    ):
        with pytest.raises(ValueError, match="wrong"):
            retry(lambda faults=faults: call(faults), "it", attempts=attempts)  # type: ignore[misc]
    assert pauses == [0.25, 0.25]
    with pytest.raises(TransientError):
        retry(lambda: call(failing(1, TransientError("away"))), "it", retry_s=0)


def test_other_faults_and_pauses_can_be_named(pauses: list[float]) -> None:
    faults: list[Exception] = [KeyError("not yet"), KeyError("not yet")]
    assert (
        retry(lambda: call(faults), "it", transient=lambda e: isinstance(e, KeyError), backoff=Backoff(1, 1)) == "done"
    )
    assert pauses == [1, 1]


def test_a_try_without_progress_is_given_up() -> None:
    def trickle(progress: Progress) -> str:
        for _ in range(4):
            time.sleep(0.05)
            progress.note()
        return "done"

    assert with_stall_limit(trickle, 0.15) == "done"
    with pytest.raises(StalledError):
        with_stall_limit(lambda _: time.sleep(1), 0.05)
