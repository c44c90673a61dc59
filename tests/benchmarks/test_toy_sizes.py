"""The benchmarks' own code at toy size. No timing is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import benchmarks.gpu
import benchmarks.prune
from benchmarks.clocks import SelectionClock, realised, seconds, take_turns
from benchmarks.harness import PARTS, Work, calls, count_work, works
from benchmarks.sizes import cpu_setup, doubled, gpu_setup, tiny_setup
from meteor_model.flops import flop_counter

CPU = torch.device("cpu")
TINY = tiny_setup()

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def variants() -> dict[str, Work]:
    return works(TINY, CPU, torch.float32)


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    return count_work(TINY)


@pytest.mark.parametrize("workload", sorted(PARTS))
def test_a_workload_runs_the_flops_that_it_is_held_against(
    variants: dict[str, Work], counted: dict[str, dict[str, int]], workload: str
) -> None:
    for name, call in calls({name: variants[name] for name in PARTS[workload]}, workload).items():
        with flop_counter() as counter:
            call()
        # A decode step grows by a key a token; the report counts the first.
        assert counter.get_total_flops() == pytest.approx(counted[workload][name], rel=2e-3), name


def test_variants_share_weights_and_keep_as_many_tokens(variants: dict[str, Work]) -> None:
    kept = {}
    for name in ("meteor", "stage3", "fastv"):
        work = variants[name]
        assert work.model.language_model is variants["dense"].model.language_model
        cache = work.model.new_cache()
        assert cache is not None
        prompt: dict[str, Tensor] = work.prompt()
        work.model.generate(**prompt, past_key_values=cache, max_new_tokens=1, do_sample=False)
        assert cache.decision is not None
        kept[name] = cache.decision.kept_counts_B.tolist()
    assert kept == {name: [TINY.kept] for name in ("meteor", "stage3", "fastv")}


def test_the_selection_clock_sees_all_stages_and_nothing_in_a_dense_run(variants: dict[str, Work]) -> None:
    clock = SelectionClock(CPU)
    whole = clock.measure(variants["meteor"].first_token)
    assert set(clock.seconds) == {"encode", "fuse", "decode"}
    assert all(value > 0 for value in clock.seconds.values())
    assert sum(clock.seconds.values()) < whole
    with pytest.raises(AssertionError, match="never ran"):
        SelectionClock(CPU).measure(variants["dense"].first_token)


def test_turns_alternate_and_the_warm_up_is_thrown_away() -> None:
    order: list[str] = []
    spent = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, CPU)
    assert order == ["a", "b"] * 3
    assert {name: len(values) for name, values in spent.items()} == {"a": 2, "b": 2}
    assert seconds(lambda: time.sleep(0.01), CPU) >= 0.01


def test_realised_is_the_median_of_the_turns_over_the_flops() -> None:
    out = realised({"dense": [4.0, 6.0, 4.0], "x": [2.0, 2.0, 1.0]}, {"dense": 100, "x": 40}, "dense", "x")
    assert (out["speed_up"], out["flops_ratio"], out["realised"]) == (3.0, 2.5, 1.2)
    assert out["speed_up_range"] == [2.0, 4.0]


def test_peak_memory_sees_what_a_call_frees_again() -> None:
    """In a process of its own, as it is measured: a used heap may serve the call without growing."""
    code = (
        "import torch; from benchmarks.clocks import peak_memory;"
        "print(peak_memory(lambda: torch.ones(64 * 2**20 // 4).sum(), torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(64, abs=16)


def test_sizes_are_what_they_say() -> None:
    assert cpu_setup().pruned().encoder_tokens == {"clip": 1024, "pix2struct": 1024, "convnext": 576}
    assert doubled(cpu_setup()).pruned().encoder_tokens == {"clip": 4096, "pix2struct": 4096, "convnext": 2304}
    published = gpu_setup().pruned()
    assert published.encoder_tokens == {"clip": 576, "convnext": 1024, "eva02": 4096, "pix2struct": 2025}
    assert published.pruning.encode.totals[-1] == 1193
    assert published.tokens_per_image == 576
    assert gpu_setup().dense().tokens_per_image == 1024


def test_the_cpu_benchmark_writes_its_results(tmp_path: Path) -> None:
    target = tmp_path / "prune.json"
    benchmarks.prune.main(["--tiny", "--rounds", "1", "--only", "realised", "growth", "--output", str(target)])
    results = json.loads(target.read_text())
    assert set(results["realised"]) == set(PARTS)
    assert results["realised"]["first_token"]["fastv"]["rounds"] == 1
    assert set(results["growth"]["exponent"]) == set(results["growth"]["milliseconds"])
    assert {"cpu", "cores", "torch", "threads"} <= set(results["hardware"])


def test_the_gpu_benchmark_writes_its_results(tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    benchmarks.gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", "--batch", "2", "--output", str(target)])
    results = json.loads(target.read_text())
    assert [part["first_token"]["batch"] for part in results["realised"]] == [1, 2]
    assert [part["batch"] for part in results["peak_memory_mib"]] == [1, 2]
    assert results["overhead"]["selection_seconds"] > 0
    assert results["hardware"]["dtype"] == "bfloat16"
