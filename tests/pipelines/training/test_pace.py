"""Who is slowest, how far apart, how long the longest wait for data was, and what share of the devices is used."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from meteor_model.flops import PassFlops, TrainingFlops
from pipelines.checkpoint.state import TrainState
from pipelines.checkpoint.throughput import Throughput
from pipelines.job.summary import pace_text
from pipelines.training.batches import Counts, MicroBatch
from pipelines.training.pace import WARM_UP_STEPS, Device, Pace, _added, evenness, slowest, spread, step_flops
from pipelines.training.worker import Worker

#: An image costs 100 + 200 + 30, a token 1 + 2 + 1, a pair of tokens 1 + 2, and a head is there in one test.
FLOPS = TrainingFlops(PassFlops(90), PassFlops(10, 200, 30), PassFlops(1, 2, 1), PassFlops(1, 2), PassFlops())


def test_figures_of_workers_of_different_speed() -> None:
    assert evenness((8.0, 12.0, 10.0)) == {"workers/slowest": 1.0, "workers/spread": pytest.approx(0.4)}
    assert (slowest((1.0,)), spread((1.0,)), spread((0.0, 0.0))) == (0, 0.0, 0.0)


def test_sums_go_on_and_begin_anew_with_another_number_of_workers() -> None:
    assert _added((), (1.0, 2.0)) == (1.0, 2.0)
    assert _added((1.0, 2.0), (0.5, 0.5)) == (1.5, 2.5)
    assert _added((1.0, 2.0), (0.5,)) == (0.5,)


def test_the_summary_names_the_slowest_and_the_longest_wait_and_older_ones_have_no_line() -> None:
    workers = {"data_seconds": [0.5, 3.0], "own_seconds": [10.0, 10.5]}
    assert pace_text({"workers": workers}) == (
        "slowest worker 1 of 2, 5% behind the quickest; longest wait for data 3.0 s (worker 1)"
    )
    assert pace_text({}) == pace_text({"workers": {"data_seconds": [1.0], "own_seconds": [1.0]}}) == ""


def micro_batch(lengths: tuple[int, ...], images: tuple[int, ...]) -> MicroBatch:
    """Samples of these lengths, one a row; without any, the batch of one padding token that is run in its place."""
    rows, longest = max(1, len(lengths)), max(lengths, default=1)
    inputs = {"input_ids": torch.zeros(rows, longest, dtype=torch.long)}
    cells = rows * longest if lengths else 0
    return MicroBatch(inputs, images or (0,), 1, lengths, cells, len(lengths), (), (), 0, lambda: inputs)


def test_samples_count_at_their_own_length_and_the_device_at_the_longest() -> None:
    model, hardware = step_flops(FLOPS, micro_batch((4, 10), (1, 2)))
    assert model == 3 * 300 + 3 * 14 + 3 * (4**2 + 10**2)
    assert hardware == 3 * 330 + 4 * 20 + 3 * 2 * 10**2
    text = step_flops(FLOPS, micro_batch((5,), (0,)))
    assert text == (3 * 5 + 3 * 25, 330 + 4 * 5 + 3 * 25), "towers run on a blank image, which no sample asks for"
    assert step_flops(FLOPS, micro_batch((), ())) == (0, 330 + 4 + 3), "a place that is left empty"


def test_a_packed_row_is_computed_as_one_sequence() -> None:
    packed = dataclasses.replace(micro_batch((10,), (2,)), lengths=(4, 6))
    assert step_flops(FLOPS, packed) == (2 * 300 + 3 * 10 + 3 * (16 + 36), 2 * 330 + 4 * 10 + 3 * 100)


def test_the_head_counts_on_padding_too_or_on_supervised_tokens_alone() -> None:
    none = PassFlops()
    head = TrainingFlops(none, none, none, none, head=PassFlops(5, 10))
    batch = dataclasses.replace(micro_batch((4, 10), (1, 2)), supervised=3)
    assert step_flops(head, batch) == (15 * 14, 15 * 20)
    assert step_flops(dataclasses.replace(head, whole_head=False), batch) == (15 * 3, 15 * 3)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Worker]:
    """The only worker of a process group."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield worker(0, 1)
    torch.distributed.destroy_process_group()


class Engine:
    device = torch.device("cpu")


def worker(rank: int, world: int) -> Worker:
    return Worker(Engine(), rank, world, start="")


def step(pace: Pace, data_s: float = 1.0, step_s: float = 10.0) -> None:
    members = [micro_batch((10, 10), (1, 1))] * 2
    pace.add(members, Counts.of(members), data_s, 0.0, step_s)


def test_warm_up_steps_are_in_no_figure_but_their_own_rates(alone: Worker) -> None:
    pace, state = Pace(Device(FLOPS, peak=100.0)), TrainState("abc", 1, 10)
    for number in range(1, WARM_UP_STEPS + 1):
        step(pace, data_s=50.0, step_s=100.0)
        state = pace.share(state, alone)
        metrics = pace.as_metrics()
        assert metrics["samples_per_s"] == 0.04, "its own"
        assert not {"mfu", "workers/tflops", "workers/data_wait_share"} & set(metrics)
        assert state.measured == Throughput()
        assert state.data_seconds == (50.0 * number,), "who waits is known of every step"
    step(pace)
    step(pace)
    state = pace.share(state, alone)
    metrics, model = pace.as_metrics(), 4 * 300 + 3 * 40 + 3 * 4 * 100
    assert (metrics["samples_per_s"], metrics["tokens_per_s"]) == (0.4, 4.0)
    assert metrics["mfu"] == model / (10.0 * 100.0)
    assert metrics["hfu"] == (model + 4 * 30 + 40) / (10.0 * 100.0)
    assert metrics["workers/data_wait_share"] == 0.1
    assert metrics["workers/peak_memory_gb"] > 0.01
    assert metrics == {**metrics, **state.measured.metrics()}, "nothing else was measured"


def test_a_window_that_begins_in_the_warm_up_leaves_it_out(alone: Worker) -> None:
    pace = Pace(Device(FLOPS, peak=100.0))
    for _ in range(WARM_UP_STEPS):
        step(pace, step_s=1000.0)
    step(pace)
    state = pace.share(TrainState("abc", 1, 10), alone)
    assert (state.measured.seconds, state.measured.samples) == (10.0, 4)


def test_without_flops_there_are_rates_and_waits_alone(alone: Worker) -> None:
    pace = Pace()
    for _ in range(WARM_UP_STEPS + 1):
        step(pace)
    pace.share(TrainState("abc", 1, 10), alone)
    assert not {"mfu", "hfu", "workers/tflops"} & set(pace.as_metrics())
    assert pace.as_metrics()["workers/data_wait_share"] == 0.1


def _one_of_two(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    pace = Pace(Device(FLOPS, peak=100.0 * (rank + 1)))
    members = [micro_batch((10,) * (rank + 1), (1,) * (rank + 1))]
    for _ in range(WARM_UP_STEPS + 1):
        pace.add(members, Counts(9, 30, 30, 3, 0, {}), data_s=rank + 1.0, waiting_s=1.0, step_s=10.0)
    state = pace.share(TrainState("abc", 2, 10), worker(rank, 2))
    model, hardware = 3 * (300 + 30 + 300), 3 * (330 + 40 + 300)
    found = state.measured
    assert (found.seconds, found.worker_seconds, found.data_seconds) == (10.0, 20.0, 2.0)
    assert (found.samples, found.model_flops, found.hardware_flops) == (3, model, hardware), "those of both"
    assert found.peak_flops == 10.0 * (100 + 200)
    assert found.metrics()["workers/tflops"] == model / 20.0 / 1e12
    assert state.own_seconds == (27.0, 27.0)
    torch.distributed.destroy_process_group()


def test_workers_add_up_what_each_did(tmp_path: Path) -> None:
    spawn(_one_of_two, (str(tmp_path),), nprocs=2)
