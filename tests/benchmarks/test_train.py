"""The training benchmark in small: both loops on one worker, steps in turns, and the arithmetic of the ratios."""

from pathlib import Path

import pytest

from benchmarks.sizes import tiny_setup
from benchmarks.train.__main__ import compared, main
from benchmarks.train.loops import settings_of
from benchmarks.train.rows import TEXT_TOKENS, Plan, samples
from benchmarks.train.steps import measure_formats, measure_pruning
from meteor_model.chat import IGNORE_INDEX
from pipelines.io import storage


def test_samples_are_their_numbers_and_the_plan_counts_them() -> None:
    rows = samples(8, visual_tokens=32)
    assert samples(4, 32) == rows[:4]
    lengths = {len(row.input_ids) - 32 for row in rows}
    assert len(lengths) > 3
    assert lengths <= set(range(TEXT_TOKENS[0], TEXT_TOKENS[1] + 1))
    assert all(row.labels[:32] == [IGNORE_INDEX] * 32 and row.labels[-1] == row.input_ids[-1] for row in rows)
    assert Plan(8).consumed(5) != Plan(8).consumed(6)


def test_ratios_are_taken_within_a_round() -> None:
    metrics = dict.fromkeys(("tokens_per_s", "workers/data_wait_share", "workers/tflops", "mfu", "hfu"), 0.5)
    rounds = [
        ({**metrics, "samples_per_s": ours, "padding_share": 0.1}, {"samples_per_s": bare})
        for ours, bare in ((8.0, 10.0), (90.0, 100.0), (3.0, 6.0))
    ]
    found = compared(rounds)
    assert (found["ours_over_bare"], found["ours_over_bare_range"]) == (0.8, [0.5, 0.9])
    assert (found["ours"]["samples_per_s"], found["bare_samples_per_s"]) == (8.0, 10.0)


def test_steps_take_turns_and_pruning_saves_flops() -> None:
    found = measure_pruning(tiny_setup(), 1, rounds=1)
    assert found["tokens_into_llm"] == {"concat": 64, "dense": 192, "meteor": 24}
    assert found["meteor against dense"]["flops_ratio"] > found["meteor against concat"]["flops_ratio"] > 1
    formats = measure_formats(2, rounds=1)
    assert all(formats[name]["speed_up"] > 0 for name in ("bf16", "bf16_autocast"))


@pytest.mark.stack
def test_both_loops_train_the_same_samples(tmp_path: Path) -> None:
    output = tmp_path / "train.json"
    main(["--only", "loop", "--workers", "1", "--rounds", "1", "--steps", "4", "--output", str(output)])
    found = storage.read_json(str(output))["loop"]["workers 1"]
    assert found["ours_over_bare"] > 0
    assert 0 < found["ours"]["mfu"] < found["ours"]["hfu"], "padding is computed"
    assert settings_of(1).global_batch == 32
