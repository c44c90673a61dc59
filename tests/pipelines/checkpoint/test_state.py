"""The state of a training keeps every bit, and says where it is damaged."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.checkpoint.state import CheckpointError, DroppedSample, TrainState
from pipelines.checkpoint.throughput import Throughput
from pipelines.data.sample_id import SampleId


def state(**changes: object) -> TrainState:
    return dataclasses.replace(TrainState("abc", world_size=2, total_steps=6), **changes)  # type: ignore[arg-type]


def with_losses(before: TrainState, losses: list[float]) -> TrainState:
    for loss in losses:
        before = dataclasses.replace(before.with_loss(loss), step=before.step + 1)
    return before


@settings(deadline=None)
@given(st.lists(st.floats(allow_nan=False), max_size=40))
def test_state_keeps_every_bit(losses: list[float]) -> None:
    drop = DroppedSample(21, SampleId(0, 0, 2, 1, "key21"), "too_long", "600 tokens")
    measured = Throughput(seconds=0.1, samples=3, model_flops=1e15 / 3, peak_memory=2**33)
    before = with_losses(state(dropped={"too_long": 1}, dropped_samples=(drop,), measured=measured), losses)
    assert TrainState.from_json(before.to_json(), "here") == before
    for part, found in ((losses[:10], before.loss_first), (losses[-10:], before.loss_last)):
        np.testing.assert_equal(found, sum(part) / len(part) if part else math.nan)


def test_a_state_from_before_truncation_has_none() -> None:
    values = json.loads(state().to_json())
    del values["truncated"]
    assert TrainState.from_json(json.dumps(values), "here").truncated == 0


def test_a_state_from_before_speed_was_measured_has_measured_nothing() -> None:
    values = json.loads(state().to_json())
    del values["measured"]
    assert TrainState.from_json(json.dumps(values), "here").measured.metrics() == {}


def test_the_state_s_size_does_not_grow_with_the_steps() -> None:
    sizes = {len(with_losses(state(), [0.5] * steps).to_json()) for steps in (20, 30)}
    assert len(sizes) == 1


def version_2(before: TrainState, losses: list[float]) -> str:
    """What the code before version 3 wrote: the loss of every step inside the state."""
    values = json.loads(before.to_json())
    del values["first_losses"], values["last_losses"]
    return json.dumps({**values, "losses": losses, "version": 2})


def test_a_state_of_version_2_becomes_one_of_this_version() -> None:
    losses = [1 / step for step in range(1, 31)]
    expected = with_losses(state(), losses)
    found = TrainState.from_json(version_2(expected, losses), "here")
    assert found.losses_in_version_2 == tuple(losses)
    assert dataclasses.replace(found, losses_in_version_2=()) == expected
    assert TrainState.from_json(found.to_json(), "here") == expected


def test_a_dropped_sample_is_stored_as_it_always_was() -> None:
    flat = {
        "row": 21,
        "dataset": 1,
        "epoch": 0,
        "shard": 2,
        "index": 3,
        "key": "k",
        "reason": "too_long",
        "detail": "d",
    }
    dropped = DroppedSample(21, SampleId(1, 0, 2, 3, "k"), "too_long", "d")
    assert json.loads(state(dropped_samples=(dropped,)).to_json())["dropped_samples"] == [flat]
    found = DroppedSample.from_dict(flat)
    assert (found, found.sample.key) == (dropped, "k")


@pytest.mark.parametrize("text", ["", "{}", '{"version": 1, "dropped_samples": []}', '{"version": 99}'])
def test_damaged_state_names_its_place(text: str) -> None:
    with pytest.raises(CheckpointError, match="some/place"):
        TrainState.from_json(text, "some/place")
