"""The benchmark of pruners at toy size: what it counts and writes. No timing is asserted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import benchmarks.pruners
from benchmarks.live_memory import MIB, LiveBytes, spent_by
from benchmarks.pruners import Bench, setup_of
from benchmarks.sizes import doubled, pool_setup
from meteor_model.pruners.named import PRUNERS


def test_live_bytes_are_those_of_new_storages() -> None:
    weight = torch.ones(64, 64)
    with LiveBytes([weight]) as counter:
        view = weight.t()[:3]
        assert counter.live == counter.peak == 0
        first = torch.zeros(MIB // 4)  # 1 MiB
        second = first * 2
        assert (counter.live, counter.peak) == (2 * MIB, 2 * MIB)
        second.add_(1)
        del first
        assert counter.live == MIB
        third = F.relu(second[: MIB // 8])
        assert (counter.live, counter.peak) == (MIB + MIB // 2, 2 * MIB)
    assert view.shape == (3, 64)
    assert third.shape == (MIB // 8,)


def test_selection_s_memory_is_that_of_selection() -> None:
    bench = Bench.of(setup_of("tiny"))
    dense = bench.counted(bench.dense, time.perf_counter)
    # SCOPE makes 192 x 192 cosines in fp32.
    pruned = bench.counted(bench.pruned("scope"), time.perf_counter)
    assert dense.selection_mib < 0.2
    assert pruned.selection_mib >= 192 * 192 * 4 / MIB
    assert 0 < pruned.peak_mib < 2 * dense.peak_mib
    assert 0 < pruned.selection_seconds < pruned.seconds
    assert spent_by(lambda: None, []).peak_mib == 0


def test_layouts_have_the_tokens_that_they_are_named_for() -> None:
    assert benchmarks.pruners.LAYOUTS == ("1024", "4096", "tiny")
    for setup, tokens in ((pool_setup(), 256), (doubled(pool_setup()), 1024)):
        config = setup.config("post_projection", benchmarks.pruners.DENSE)
        assert set(config.encoder_tokens.values()) == {tokens}
        assert config.tokens_per_image == 4 * tokens


@pytest.mark.parametrize("name", list(PRUNERS))
def test_every_pruner_can_be_had_at_the_large_size(name: str) -> None:
    """By configuration alone, but for E-AdaPrune, whose share is solved on tokens."""
    dense = doubled(pool_setup()).config("post_projection", benchmarks.pruners.DENSE)
    keep = dense.tokens_per_image if name == "none" else 1024
    assert benchmarks.pruners.with_pruner(dense, name, keep).tokens_per_image >= 1024


def test_the_benchmark_writes_its_results(tmp_path: Path) -> None:
    target = tmp_path / "pruners.json"
    arguments = ["--layouts", "tiny", "--rounds", "1", "--only", "fastv", "divprune", "--note", "a test"]
    benchmarks.pruners.main([*arguments, "--output", str(target)])
    results = json.loads(target.read_text())
    layout = results["layouts"]["tiny"]
    assert (results["note"], layout["visual_tokens"], layout["attention"]) == ("a test", 192, "sdpa")
    assert list(layout["pruners"]) == ["fastv", "divprune"]
    for row in layout["pruners"].values():
        assert row["kept"] == 48
        assert row["flops_ratio"] > 1
        assert row["selection_seconds"] > 0
        assert row["selection_peak_mib"] > 0
        assert row["peak_over_dense"] < 1
