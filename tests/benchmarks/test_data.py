"""The data benchmark in small: our stream alone, and the arithmetic of its ratios."""

import os
from pathlib import Path

import pytest
import ray

from benchmarks.data.__main__ import BARE, OURS, SAME, USUAL, median_of, ratios
from benchmarks.data.dataset import make_dataset, make_encoder, picture
from benchmarks.data.ours import stream_pass
from benchmarks.data.pace import WARM_UP, Pace
from benchmarks.data.stages import stage_costs

ROOT = Path(__file__).parents[2]
SAMPLES, SIZE, BATCH = 48, 32, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    make_dataset(str(path / "set"), SAMPLES)
    make_encoder(path, SIZE)
    return path


def test_pictures_are_their_numbers() -> None:
    assert picture(3) == picture(3) != picture(4)
    assert 60_000 < len(picture(3)) < 140_000


@pytest.mark.stack
def test_our_stream_gives_every_sample_and_its_pace(folder: Path) -> None:
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}},
    )
    try:
        whole = stream_pass(str(folder / "set"), folder, SIZE, 1, BATCH, (0, 0))
        resumed = stream_pass(str(folder / "set"), folder, SIZE, 1, BATCH, (24, 32))
    finally:
        ray.shutdown()
    assert whole["samples"] == SAMPLES
    assert whole["samples_per_s"] > 0
    assert whole["first_batch"] > whole["start"]
    assert (resumed["samples"], resumed["samples_per_s"]) == (8, None), "too short for a steady part"


def test_every_stage_costs_something(folder: Path) -> None:
    costs = stage_costs(str(folder / "set"), folder, SIZE, BATCH)
    assert all(cost > 0 for cost in costs.values()), costs
    assert costs["encode"] > costs["copy to the object store"]


def test_the_steady_part_begins_behind_the_warm_up() -> None:
    pace = Pace()
    for _ in range(WARM_UP + 1):
        pace.batch(4)
    assert pace.found()["samples_per_s"] is None
    pace.batch(4)
    assert pace.found()["samples_per_s"] > 0


def test_ratios_are_of_the_same_round_and_the_fastest_peer() -> None:
    def of(ours: float, bare: float) -> dict[str, dict[str, float]]:
        rates = {BARE: bare, SAME[0]: 50.0, SAME[1]: 80.0, USUAL[0]: 20.0, USUAL[1]: 10.0, OURS: ours}
        return {name: {"samples_per_s": rate} for name, rate in rates.items()}

    rounds = [of(40.0, 100.0), of(80.0, 100.0), of(60.0, 60.0)]
    found = ratios(rounds)
    assert found["over the fastest peer, same decoder"] == [0.75, 0.5, 1.0]
    assert found["over the fastest peer, usual settings"] == [3.0, 2.0, 4.0]
    assert found["over the bare decoder"] == [0.8, 0.4, 1.0]
    assert median_of(rounds)[OURS] == {"samples_per_s": 60.0}
