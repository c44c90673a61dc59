"""What pruning costs and what it brings in wall-clock, on a CPU: `make bench-prune` (about 13 minutes on two cores).

1. overhead   selection (scores, sorting, gathering) over the dense model's time to the first token
2. growth     selection from 1k to 16k tokens, exponent fitted
3. realised   speed-up in time over speed-up in FLOPs: encoders, first token, whole answer, training step; the same for
              FastV, and for METEOR's stage 3 alone at FastV's tokens and FLOPs
4. memory     peak above the weights, each in a fresh process

Writes benchmarks/results/prune.json. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import hardware, peak_memory, take_turns
from benchmarks.harness import Setup, calls, count_work, describe, measure_overhead, measure_realised, works
from benchmarks.results_file import RESULTS, write_results
from benchmarks.sizes import cpu_setup, doubled, tiny_setup
from meteor_model.configuration_meteor import FusePruning
from meteor_model.encoders import EncoderConfig, build_encoder
from meteor_model.fusion import prune_pool
from meteor_model.pruners.fuse_criteria import Pool
from meteor_model.pruners.select import gather_tokens, select_top
from meteor_model.pruners.text_scores import text_guided_scores
from meteor_model.pruners.tower_scores import mean_similarity

CPU = torch.device("cpu")
DTYPE = torch.float32
#: Batch size and rounds of warm-up; what runs later is warm. A decode step is bound by reading the weights, which
#: pruning does not shrink; four samples share them. Two (`--answer-batch 2`) gave 0.84, see docs/LOG.md.
PLAN = {"encode": (1, 1), "first_token": (1, 1), "answer": (4, 0), "train": (1, 0)}
#: Memory is probed for these (variant, workload) pairs.
PROBES = (
    ("dense", "first_token"),
    ("meteor", "first_token"),
    ("fastv", "first_token"),
    ("dense", "train"),
    ("meteor", "train"),
)


def selection_steps(tokens: int, width: int = 768) -> dict[str, Callable[[], Any]]:
    """Every kind of selection on `tokens` tokens, with real towers' projections and half of the tokens kept."""
    heads = width // 64
    clip_tower = {
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
    }
    pix2struct = {"hidden_size": width, "d_ff": width, "d_kv": 64, "num_hidden_layers": 1, "num_attention_heads": heads}
    clip = build_encoder(EncoderConfig("clip", "clip", 512, {**clip_tower, "image_size": 512, "patch_size": 16})).eval()
    pix = build_encoder(EncoderConfig("pix", "pix2struct", 512, {**pix2struct, "patch_embed_hidden_size": 768})).eval()
    hidden, positions = torch.randn(1, tokens + 1, width), torch.arange(tokens)[None]
    scores = torch.randn(1, tokens)
    keep = select_top(scores, tokens // 2)
    part_1n = torch.arange(tokens // 4)[None]
    maps = tuple(torch.randn(1, tokens // 4, width) for _ in range(4))
    pool = Pool(maps, ((1, tokens // 4),) * 4, (part_1n,) * 4, tokens // 2)
    query, key = torch.randn(1, heads, 1, 64), torch.randn(1, heads, tokens, 64)
    visible = torch.ones(1, 1, tokens, dtype=torch.bool)
    return {
        "mean similarity": lambda: mean_similarity(hidden),
        "attention from CLS": lambda: clip.importance(0, hidden, positions, 256),
        "attention received": lambda: pix.importance(0, hidden[:, 1:], positions, 256),
        "sort and take": lambda: select_top(scores, tokens // 2),
        "gather": lambda: gather_tokens(hidden, keep),
        "fusion": lambda: prune_pool(pool, FusePruning()),
        "text-guided scores": lambda: text_guided_scores(query, key, visible[:, 0], visible, 0.125, heads // 4),
    }


@torch.no_grad()
def measure_growth(counts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Part 2: milliseconds by number of tokens, and the exponent of the straight line through their logarithms."""
    spent: dict[str, list[float]] = {}
    for tokens in counts:
        for name, values in take_turns(selection_steps(tokens), rounds, CPU).items():
            spent.setdefault(name, []).append(statistics.median(values))
    spent["all"] = [sum(values) for values in zip(*spent.values(), strict=True)]
    logs = [math.log(tokens) for tokens in counts]

    def exponent(values: list[float]) -> float:
        return statistics.linear_regression(logs, [math.log(value) for value in values]).slope

    return {
        "tokens": list(counts),
        "milliseconds": {name: [round(value * 1e3, 3) for value in values] for name, values in spent.items()},
        "exponent": {name: round(exponent(values), 3) for name, values in spent.items()},
        "last_doubling": {name: round(values[-1] / values[-2], 2) for name, values in spent.items()},
    }


def measure_memory(tiny: bool) -> dict[str, dict[str, float]]:
    """Part 4: MiB above the weights, each pair in a process of its own."""
    out: dict[str, dict[str, float]] = {}
    for variant, workload in PROBES:
        command = [
            sys.executable,
            "-m",
            "benchmarks.prune",
            "--probe",
            variant,
            workload,
            *(["--tiny"] if tiny else []),
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        out.setdefault(workload, {})[variant] = json.loads(done.stdout.splitlines()[-1])["peak_mib"]
    return out


def probe(setup: Setup, variant: str, workload: str) -> float:
    """MiB that one workload of one variant needs above what is there before it."""
    run = calls({variant: works(setup, CPU, DTYPE)[variant]}, workload)[variant]
    return peak_memory(run, CPU)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a toy model: does the benchmark itself work?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--answer-batch", type=int, default=PLAN["answer"][0], help="samples of the workload `answer`")
    parser.add_argument("--only", nargs="+", choices=("overhead", "growth", "realised", "memory"))
    parser.add_argument("--output", type=Path, default=RESULTS / "prune.json")
    parser.add_argument("--probe", nargs=2, metavar=("VARIANT", "WORKLOAD"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    setup = tiny_setup() if options.tiny else cpu_setup()
    if options.probe:
        print(json.dumps({"peak_mib": probe(setup, *options.probe)}))
        return
    chosen = options.only or ("realised", "overhead", "growth", "memory")
    start = time.perf_counter()
    results: dict[str, Any] = {"hardware": hardware(CPU, DTYPE), "sizes": describe(setup)}
    print(json.dumps(results["hardware"]), flush=True)
    counts = (64, 128, 256) if options.tiny else (1024, 2048, 4096, 8192, 16384)
    if "realised" in chosen:
        plan = {**PLAN, "answer": (options.answer_batch, 0)}
        results["realised"] = measure_realised(works(setup, CPU, DTYPE), count_work(setup), plan, options.rounds)
    if "overhead" in chosen:
        sizes = ((setup, options.rounds), (doubled(setup), 1))
        results["overhead"] = [measure_overhead(works(size, CPU, DTYPE), rounds, warm_up=0) for size, rounds in sizes]
        print(json.dumps(results["overhead"]), flush=True)
    if "growth" in chosen:
        results["growth"] = measure_growth(counts, rounds=5)
        print(json.dumps(results["growth"]), flush=True)
    if "memory" in chosen:
        results["peak_memory_mib"] = measure_memory(options.tiny)
        print(json.dumps(results["peak_memory_mib"]), flush=True)
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    write_results(options.output, results)


if __name__ == "__main__":
    main()
