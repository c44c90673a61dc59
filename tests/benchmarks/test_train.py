"""The training benchmark in small: both loops on one worker, steps in turns, and the arithmetic of the ratios."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.sizes import tiny_setup
from benchmarks.train.__main__ import compared, main
from benchmarks.train.loops import Stopwatch, bare_batches, model_config, settings_of
from benchmarks.train.rows import TEXT_TOKENS, Plan, samples
from benchmarks.train.steps import measure_formats, measure_pruning
from meteor_model.chat import IGNORE_INDEX
from pipelines.training.loop import StepRecord


def test_samples_are_their_numbers_and_the_plan_counts_them() -> None:
    rows = samples(8, visual_tokens=32)
    assert samples(4, 32) == rows[:4]
    lengths = {len(row.input_ids) - 32 for row in rows}
    assert len(lengths) > 3
    assert lengths <= set(range(TEXT_TOKENS[0], TEXT_TOKENS[1] + 1))
    assert all(row.labels[:32] == [IGNORE_INDEX] * 32 and row.labels[-1] == row.input_ids[-1] for row in rows)
    assert Plan(8).consumed(5) != Plan(8).consumed(6)


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [
        ({"wall_samples_per_s": ours, "cpu_s_per_step": 0.5}, {"wall_samples_per_s": bare, "cpu_s_per_step": cpu})
        for ours, bare, cpu in ((8.0, 10.0, 0.5), (90.0, 100.0, 0.4), (3.0, 6.0, 0.6))
    ]
    found = compared(rounds)
    assert found["ours_over_bare"] == {"median": 0.8, "min": 0.5, "max": 0.9}
    assert found["ours_over_bare_by_cpu"] == {"median": 1.0, "min": 0.8, "max": 1.2}
    assert found["ours"] == {"wall_samples_per_s": 8.0, "cpu_s_per_step": 0.5}
    assert found["bare"] == {"wall_samples_per_s": 10.0, "cpu_s_per_step": 0.5}


def test_the_stopwatch_counts_the_steps_behind_the_warm_up_on_worker_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, now = Stopwatch(tmp_path, steps=6), iter((10.0, 30.0))
    clocks = SimpleNamespace(perf_counter=lambda: next(now), process_time=lambda: 1.0, thread_time=lambda: 0.5)
    monkeypatch.setattr("benchmarks.train.loops.time", clocks)
    for step in range(1, 7):
        for rank in (0, 1):
            watch(StepRecord(step, 6, rank, 2, 0.0, ()))
    computed = {"cpu_s_per_step": 0.0, "loop_thread_cpu_s_per_step": 0.0}
    assert watch.metrics(samples_a_step=32) == {"wall_samples_per_s": 4 * 32 / 20.0, **computed}


def test_the_bare_loop_gets_every_sample_once_in_the_same_steps() -> None:
    config, settings = model_config(), settings_of(2)
    workers = [bare_batches(rank, settings, 3, config) for rank in range(2)]
    for step, members in enumerate(zip(*workers, strict=True)):
        places = sorted(sample.index for batches in members for batch in batches for sample in batch.samples)
        assert places == list(range(32 * step, 32 * (step + 1)))


def test_steps_take_turns_and_pruning_saves_flops() -> None:
    found = measure_pruning(tiny_setup(), 1, rounds=1)
    assert found["tokens_into_llm"] == {"concat": 64, "dense": 192, "meteor": 24}
    assert found["meteor against dense"]["flops_ratio"] > found["meteor against concat"]["flops_ratio"] > 1
    formats = measure_formats(2, rounds=1)
    assert all(formats[name]["speed_up"] > 0 for name in ("bf16", "bf16_autocast"))


@pytest.mark.stack
def test_both_loops_run_and_parts_left_out_stay(tmp_path: Path) -> None:
    output = tmp_path / "train.json"
    output.write_text(json.dumps({"formats": {"kept": True}, "loop, 1 workers": {"replaced": False}}))
    arguments = ["--only", "loop", "--workers", "1", "--rounds", "1", "--steps", "4", "--beside", "tests"]
    main([*arguments, "--output", str(output)])
    results = json.loads(output.read_text())
    assert results["formats"] == {"kept": True}
    found = results["loop, 1 workers"]
    assert found["hardware"]["beside"] == "tests"
    assert "replaced" not in found
    assert found["ours_over_bare"]["median"] > 0
    ours = found["ours"]
    assert 0 < ours["mfu"] < ours["hfu"], "padding is computed"
    assert ours["wall_samples_per_s"] <= ours["samples_per_s"] * 1.001, "what is done between steps counts as well"
