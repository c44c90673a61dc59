"""Which checkpoints are validated, while validations take longer than the time between two checkpoints."""

from __future__ import annotations

import pytest

from pipelines.checkpoint.state import TrainState
from pipelines.training.validation_turn import ValidationTurn

STEPS = 22


def play(every: int, lasts: int) -> tuple[list[int], list[str], int]:
    """Numbers of the checkpoints that are validated where each validation lasts as long as `lasts` checkpoints.

    Also what people are told, and the most checkpoints that wait in storage at a time.
    """
    said: list[str] = []
    running: list[int] = []
    asked: list[int] = []
    most = 0
    now = 0

    def pending() -> str | None:
        running[:] = [one for one in running if now < one + lasts]
        return f"step-{running[0]}" if running else None

    turn = ValidationTurn(every, pending, said.append)
    for now in range(1, STEPS + 1):
        state = TrainState("abc", 2, STEPS, step=now)
        if turn.is_due(now, state) and turn.begins(state):
            running.append(now)
            asked.append(now)
        most = max(most, len(running))
    turn.conclude()
    return asked, said, most


@pytest.mark.parametrize(
    ("every", "lasts", "expected"),
    [
        (1, 1, list(range(1, 22))),  # the last checkpoint of all has its own held-out loss
        (1, 2, list(range(1, 22, 2))),
        (1, 10, [1, 11, 21]),
        (1, 1000, [1]),
        (5, 1, [5, 10, 15, 20]),
        (5, 6, [5, 11, 17]),  # 10 is due and passed over: the first one that is free is validated in its place
        (0, 1, []),
    ],
)
def test_the_newest_is_validated_and_at_most_one_waits_in_storage(every: int, lasts: int, expected: list[int]) -> None:
    asked, said, most = play(every, lasts)
    assert asked == expected
    assert most <= 1
    if lasts > 1 and every == 1:
        assert said[0].startswith("  the checkpoint of step 2 is not validated: the validation of step-1 still runs")
        assert f"{STEPS - 1 - len(expected)} checkpoints were not validated" in said[-1]
