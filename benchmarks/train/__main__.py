"""How fast training is: `make bench-train`.

1. loop       the recipe `tiny` by our loop on Ray Train beside a bare DeepSpeed loop, on one and on two workers, both
              from samples that are decoded already; how long ours waits for data, its MFU and HFU
2. pruning    a training step with METEOR's tokens beside two without pruning: speed-up in time and in FLOPs
3. formats    a step of `tiny` in bf16 and under bf16 autocast beside fp32

Everything is compared within a round, in turns; the median of the rounds counts. Writes benchmarks/results/train.json.
See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.clocks import hardware
from benchmarks.results_file import RESULTS, write_results
from benchmarks.sizes import cpu_setup, tiny_setup
from benchmarks.train.loops import bare, ours
from benchmarks.train.steps import CPU, measure_formats, measure_pruning

ROOT = Path(__file__).resolve().parents[2]
FORMATS_BATCH = 16


def measure_loop(workers: Sequence[int], steps: int, rounds: int) -> dict[str, Any]:
    """Part 1: samples a second of both loops by round, and ours over the bare one's."""
    found: dict[str, Any] = {"steps": steps}
    with tempfile.TemporaryDirectory(prefix="meteor-train-") as name:
        root = Path(name)
        _start_ray()
        try:
            for number in workers:
                made = []
                for turn in range(rounds):
                    other = bare(root, f"bare-{number}-{turn}", number, steps)
                    made.append((ours(root, f"ours-{number}-{turn}", number, steps), other))
                    print(number, made[-1], flush=True)
                found[f"workers {number}"] = compared(made)
        finally:
            ray.shutdown()
    return found


def compared(made: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """Medians of our loop's metrics over the rounds, and of its speed over the bare loop's within each."""
    ratios = [mine["samples_per_s"] / other["samples_per_s"] for mine, other in made]
    names = (
        "samples_per_s",
        "tokens_per_s",
        "workers/data_wait_share",
        "workers/tflops",
        "mfu",
        "hfu",
        "padding_share",
    )
    return {
        "ours": {name: round(statistics.median(mine[name] for mine, _ in made), 4) for name in names},
        "bare_samples_per_s": round(statistics.median(other["samples_per_s"] for _, other in made), 2),
        "ours_over_bare": round(statistics.median(ratios), 3),
        "ours_over_bare_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "rounds": len(made),
    }


def _start_ray() -> None:
    """A Ray of its own, whose processes have this one's priority and find this repository."""
    os.environ.update(RAY_worker_niceness="0")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200 * 2**20,
        _node_ip_address="127.0.0.1",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a toy model in part 2: does the benchmark itself work?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="of both loops, warm-up included")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=("loop", "pruning", "formats"))
    parser.add_argument("--output", type=Path, default=RESULTS / "train.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen, start = options.only or ("loop", "pruning", "formats"), time.perf_counter()
    results: dict[str, Any] = {"hardware": hardware(CPU, torch.float32)}
    if "loop" in chosen:
        results["loop"] = measure_loop(options.workers, options.steps, options.rounds)
    if "pruning" in chosen:
        setup = tiny_setup() if options.tiny else cpu_setup()
        results["pruning"] = measure_pruning(setup, 1, options.rounds)
    if "formats" in chosen:
        results["formats"] = measure_formats(FORMATS_BATCH, options.rounds)
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    write_results(options.output, results)


if __name__ == "__main__":
    main()
