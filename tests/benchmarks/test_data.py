"""The data benchmark in small: our stream alone, and the arithmetic of its ratios."""

import os
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from benchmarks.data.__main__ import BARE, OURS, SAME, USUAL, median_of, ratios
from benchmarks.data.dataset import make_dataset, make_encoder, picture
from benchmarks.data.ours import stream_pass
from benchmarks.data.pace import WARM_UP, Pace
from benchmarks.data.stages import stage_costs
from benchmarks.data.tables import FORMS, TARS, make_forms, measure, over_tars, tasks_of
from meteor_model.sample_encoder import load_sample_encoder
from pipelines.data.stream import RowEncoder, encode_table

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


def test_every_form_of_a_table_gives_the_rows_of_the_tars(folder: Path, tmp_path: Path) -> None:
    manifests = make_forms(tmp_path, SAMPLES)
    encoder = RowEncoder(partial(load_sample_encoder, folder), 0, 2048)  # type: ignore[arg-type]
    rows = {
        name: pa.concat_tables(
            encode_table(table, encoder) for task in tasks_of(manifest, BATCH) for table in task()
        ).combine_chunks()
        for name, manifest in manifests.items()
    }
    assert len(rows[TARS]) == SAMPLES
    assert all(found.equals(rows[TARS]) for found in rows.values())
    (one,) = measure(manifests, encoder, BATCH, 1)
    assert list(over_tars([one])) == list(FORMS)
    assert all(cost > 0 for costs in one.values() for cost in costs.values())


def test_a_form_is_compared_with_the_tars_of_its_round() -> None:
    rounds = [
        {TARS: {"read": read, "encode": 3.0}, "Parquet": {"read": 2.0, "encode": 2.0}} for read in (1.0, 2.0, 4.0)
    ]
    assert over_tars(rounds) == {"Parquet": {"read": [1.0, 0.5, 2.0], "read and encode": [0.8, 0.571, 1.0]}}


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
