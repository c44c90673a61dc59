"""How fast training is: `make bench-train`.

1. loop       the recipe `tiny` by our loop on Ray Train beside a bare DeepSpeed loop, on one and on two workers, both
              from samples that are decoded already; how long ours waits for data, its MFU and HFU
2. pruning    a training step with METEOR's tokens beside two without pruning: speed-up in time and in FLOPs
3. formats    a step of `tiny` in bf16 and under bf16 autocast beside fp32

Everything is compared within a round, in turns; the median of the rounds counts. Writes benchmarks/results/train.json;
parts that are left out (`--only`) stay there as they were. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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


def measure_loop(workers: int, steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Part 1: how fast both loops are on so many workers; after every round, of all rounds so far."""
    with tempfile.TemporaryDirectory(prefix="meteor-train-") as name:
        _start_ray()
        try:
            made = []
            for turn in range(rounds):
                made.append(_round(Path(name), turn, workers, steps))
                yield {"steps": steps, **compared(made)}
        finally:
            ray.shutdown()


def once(measure: Callable[..., dict[str, Any]], *arguments: Any) -> Iterator[dict[str, Any]]:
    """A part whose rounds are too short to be kept one by one."""
    yield measure(*arguments)


def _round(root: Path, turn: int, workers: int, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Both loops, ours' metrics first; who goes first changes from round to round."""
    loops = {"ours": ours, "bare": bare}
    order = sorted(loops, reverse=turn % 2 == 0)
    found = {name: loops[name](root, f"{name}-{workers}-{turn}", workers, steps) for name in order}
    return found["ours"], found["bare"]


def compared(made: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """Medians of both loops' metrics over the rounds, and of our speed over the bare loop's within each.

    By wall-clock, and by the seconds that a worker computes for a step, in which whoever else uses the machine is not.
    """
    both = {"ours": [mine for mine, _ in made], "bare": [other for _, other in made]}
    wall = [mine["wall_samples_per_s"] / other["wall_samples_per_s"] for mine, other in made]
    cpu = [other["cpu_s_per_step"] / mine["cpu_s_per_step"] for mine, other in made]
    return {
        **{name: _medians(metrics) for name, metrics in both.items()},
        "ours_over_bare": _spread(wall),
        "ours_over_bare_by_cpu": _spread(cpu),
        "rounds": len(made),
    }


def _medians(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(one[name] for one in metrics), 4) for name in metrics[0]}


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {name: round(of(ratios), 3) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


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
    parser.add_argument("--beside", default="", help="what else runs on the machine; kept with the results")
    parser.add_argument("--output", type=Path, default=RESULTS / "train.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    setup = tiny_setup() if options.tiny else cpu_setup()
    parts: dict[str, dict[str, Callable[[], Iterator[dict[str, Any]]]]] = {
        "loop": {
            f"loop, {n} workers": partial(measure_loop, n, options.steps, options.rounds) for n in options.workers
        },
        "pruning": {"pruning": partial(once, measure_pruning, setup, 1, options.rounds)},
        "formats": {"formats": partial(once, measure_formats, FORMATS_BATCH, options.rounds)},
    }
    results = json.loads(options.output.read_text()) if options.output.is_file() else {}
    for part, measure in itertools.chain.from_iterable(parts[name].items() for name in options.only or parts):
        start, machine = time.perf_counter(), {**hardware(CPU, torch.float32), "beside": options.beside}
        for found in measure():
            results[part] = {"hardware": machine, **found, "minutes": round((time.perf_counter() - start) / 60, 1)}
            write_results(options.output, results)


if __name__ == "__main__":
    main()
