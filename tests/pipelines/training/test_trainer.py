"""A run is resumed under the settings and data it was started with."""

import dataclasses
from pathlib import Path

import pytest

from pipelines.checkpoint.committed import CheckpointRef
from pipelines.checkpoint.state import CheckpointError, TrainState
from pipelines.training.trainer import check_resumable
from tests.pipelines.training.stand_in import SETTINGS, make_job


def state(**changes: object) -> TrainState:
    return dataclasses.replace(TrainState("abc", world_size=2, total_steps=6), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"recipe_hash": "xyz"}, "recipe xyz, now it is abc"),
        ({"total_steps": 9}, "started for 9 steps, now the plan has 6"),
    ],
)
def test_resuming_differently_is_refused(tmp_path: Path, changes: dict[str, object], named: str) -> None:
    job = make_job(tmp_path, "a", SETTINGS)
    check_resumable(job, CheckpointRef("here", state()))
    with pytest.raises(CheckpointError, match=named):
        check_resumable(job, CheckpointRef("here", state(**changes)))


def test_another_number_of_workers_is_no_reason_to_refuse(tmp_path: Path) -> None:
    check_resumable(make_job(tmp_path, "a", SETTINGS), CheckpointRef("here", state(world_size=4)))
