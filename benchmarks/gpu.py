"""What pruning brings on a GPU, at the published size: `make bench-gpu` (some minutes on one H100).

EAGLE-X4's towers and Vicuna-7B's layers, random bf16 weights made on the device; METEOR's published counts. Speed-up
in time over speed-up in FLOPs, selection overhead and peak memory, at one image and at a batch. Needs torch,
transformers, timm and meteor_model only. Writes benchmarks/results/gpu.json. See benchmarks/README.md.

Without a GPU, `--device cpu --tiny` runs the same code on a toy model.

`python -m benchmarks.gpu train-scenes` trains models on composed scenes and asks them under every pruner: what
benchmarks/quality does, on one GPU (`--device cpu --size toy` without one).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import hardware, peak_memory
from benchmarks.harness import PARTS, Work, calls, count_work, describe, measure_overhead, measure_realised, works
from benchmarks.quality.__main__ import main as quality_main
from benchmarks.results_file import RESULTS, write_results
from benchmarks.sizes import gpu_setup, tiny_setup

DTYPE = torch.bfloat16
TRAIN_SCENES = "train-scenes"


def measure_memory(variants: Mapping[str, Work], batches: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """MiB above the weights of every workload and variant."""
    out: dict[str, dict[str, float]] = {}
    for workload, batch in batches.items():
        chosen = {name: replace(variants[name], batch=batch) for name in PARTS[workload]}
        runs = calls(chosen, workload)
        out[workload] = {name: peak_memory(run, variants[name].device) for name, run in runs.items()}
        print(f"MiB above the weights, {workload}, batch {batch}: {json.dumps(out[workload])}", flush=True)
    return out


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [TRAIN_SCENES]:
        quality_main(["all", "--device", "cuda", *arguments[1:]])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model: does the benchmark itself work?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=8, help="images of the second pass")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: run on a machine with a GPU, or add --device cpu --tiny")
    setup, start = tiny_setup() if options.tiny else gpu_setup(), time.perf_counter()
    results: dict[str, Any] = {"hardware": hardware(device, DTYPE), "sizes": describe(setup)}
    print(json.dumps(results["hardware"]), flush=True)
    variants = works(setup, device, DTYPE)
    if device.type == "cuda":
        results["weights_mib"] = round(torch.cuda.memory_allocated(device) / 2**20)
    print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
    one = dict.fromkeys(PARTS, 1)
    many = {workload: options.batch for workload in PARTS if workload != "train"}
    counted = count_work(setup)
    results["realised"] = [
        measure_realised(
            variants, counted, {workload: (batch, 2) for workload, batch in batches.items()}, options.rounds
        )
        for batches in (one, many)
    ]
    results["overhead"] = measure_overhead(variants, options.rounds, warm_up=2)
    print(json.dumps(results["overhead"]), flush=True)
    results["peak_memory_mib"] = [{"batch": 1, **measure_memory(variants, one)}]
    results["peak_memory_mib"] += [{"batch": options.batch, **measure_memory(variants, many)}]
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    write_results(options.output, results)


if __name__ == "__main__":
    main()
