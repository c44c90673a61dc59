"""The state of a training keeps every bit, and says where it is damaged."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.checkpoint.state import CheckpointError, DroppedSample, TrainState


def state(**changes: object) -> TrainState:
    return dataclasses.replace(TrainState("abc", world_size=2, total_steps=6), **changes)  # type: ignore[arg-type]


@given(st.lists(st.floats(allow_nan=False), max_size=30))
def test_state_keeps_every_bit(losses: list[float]) -> None:
    drop = DroppedSample(21, 0, 0, 2, 1, "key21", "too_long", "600 tokens")
    before = state(step=len(losses), losses=tuple(losses), dropped={"too_long": 1}, dropped_samples=(drop,))
    assert TrainState.from_json(before.to_json(), "here") == before
    expected = math.nan if not losses else sum(losses[:10]) / len(losses[:10])
    np.testing.assert_equal(before.loss_first, expected)


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1, "dropped_samples": []}', '{"version": 99}'])
def test_damaged_state_names_its_place(text: str) -> None:
    with pytest.raises(CheckpointError, match="some/place"):
        TrainState.from_json(text, "some/place")
