"""What pruning costs and what it brings in wall-clock, on a CPU: `make bench-prune` (about ten minutes on two cores).

1. overhead   selection (scores, sorting, gathering) over the dense model's time to the first token
2. growth     selection from 1k to 16k tokens, exponent fitted
3. realised   speed-up in time over speed-up in FLOPs: encoders, first token, whole answer, training step; the same for
              FastV done the usual way, and for METEOR's stage 3 alone at FastV's tokens and FLOPs
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import (
    SelectionClock,
    Setup,
    Work,
    attention,
    build,
    hardware,
    peak_memory,
    realised,
    reports,
    take_turns,
    with_shared_llm,
    workload_flops,
)
from benchmarks.sizes import cpu_setup, doubled, tiny_setup
from meteor_model.encoders import EncoderConfig, build_encoder
from meteor_model.fusion import fuse_cooperatively
from meteor_model.pruning import gather_tokens, mean_similarity, select_top, text_guided_scores

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
DTYPE = torch.float32
#: Memory is probed for these (variant, workload) pairs.
PROBES = (
    ("dense", "first_token"),
    ("meteor", "first_token"),
    ("fastv", "first_token"),
    ("dense", "train"),
    ("meteor", "train"),
)


def works(setup: Setup, batch: int = 1) -> dict[str, Work]:
    """The four variants on one set of weights."""
    dense = build(setup.dense(), CPU, DTYPE)
    meteor, stage3 = (with_shared_llm(config, dense, CPU, DTYPE) for config in (setup.pruned(), setup.stage3_only()))
    return {
        "dense": Work(dense, setup, batch, CPU),
        "meteor": Work(meteor, setup, batch, CPU),
        "stage3": Work(stage3, setup, batch, CPU),
        "fastv": Work(dense, setup, batch, CPU, rival=setup.fastv()),
    }


def calls(variants: Mapping[str, Work], workload: str) -> dict[str, Callable[[], None]]:
    """One workload of every variant; a rival needs eager attention, for as long as it runs."""

    def call(work: Work) -> None:
        if work.rival is None:
            getattr(work, workload)()
            return
        with attention(work.model, "eager"):
            getattr(work, workload)()

    return {name: lambda work=work: call(work) for name, work in variants.items()}  # type: ignore[misc]


def measure_realised(setup: Setup, rounds: int, answer_batch: int) -> dict[str, Any]:
    """Part 3: every workload, all variants in turns."""
    counted = {name: workload_flops(report, config, setup) for name, (config, report) in reports(setup).items()}
    everyone, pair = ("dense", "meteor", "stage3", "fastv"), ("dense", "meteor")
    plan = {"encode": (pair, 1), "first_token": (everyone, 1), "answer": (everyone, answer_batch), "train": (pair, 1)}
    out: dict[str, Any] = {}
    for workload, (names, batch) in plan.items():
        variants = {name: work for name, work in works(setup, batch).items() if name in names}
        flops = {name: counted[name][workload] for name in names}
        spent = take_turns(calls(variants, workload), rounds, CPU)
        out[workload] = {
            "batch": batch,
            "dense_gflops_per_second": round(flops["dense"] * batch / statistics.median(spent["dense"]) / 1e9, 1),
            **{name: realised(spent, flops, "dense", name) for name in names if name != "dense"},
        }
        print(f"{workload}: {json.dumps(out[workload])}", flush=True)
    return out


def measure_overhead(setup: Setup, rounds: int) -> dict[str, Any]:
    """Part 1: selection within METEOR's run to the first token, over the dense model's time for it."""
    variants = {name: work for name, work in works(setup).items() if name in ("dense", "meteor")}
    clocks: list[SelectionClock] = []

    def clocked() -> None:
        clocks.append(SelectionClock(CPU))
        clocks[-1].measure(variants["meteor"].first_token)

    spent = take_turns({"dense": variants["dense"].first_token, "meteor": clocked}, rounds, CPU)
    dense = statistics.median(spent["dense"])
    by_stage = {
        stage: statistics.median(clock.seconds[stage] for clock in clocks[-rounds:]) for stage in clocks[-1].seconds
    }
    total = statistics.median(sum(clock.seconds.values()) for clock in clocks[-rounds:])
    return {
        "tokens": {**variants["meteor"].model.config.encoder_tokens, "llm": setup.concat_grid**2},
        "dense_seconds": round(dense, 4),
        "selection_seconds": round(total, 5),
        "selection_seconds_by_stage": {stage: round(value, 5) for stage, value in by_stage.items()},
        "overhead": round(total / dense, 5),
        "rounds": rounds,
    }


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
    pools = [torch.randn(1, tokens // 4, width) for _ in range(4)]
    query, key = torch.randn(1, heads, 1, 64), torch.randn(1, heads, tokens, 64)
    visible = torch.ones(1, 1, tokens, dtype=torch.bool)
    return {
        "mean similarity": lambda: mean_similarity(hidden),
        "attention from CLS": lambda: clip.importance(0, hidden, positions, 256),
        "attention received": lambda: pix.importance(0, hidden[:, 1:], positions, 256),
        "sort and take": lambda: select_top(scores, tokens // 2),
        "gather": lambda: gather_tokens(hidden, keep),
        "fusion": lambda: fuse_cooperatively(pools, tokens // 2),
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
    run = calls({variant: works(setup)[variant]}, workload)[variant]
    return peak_memory(run, CPU)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a toy model: does the benchmark itself work?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=("overhead", "growth", "realised", "memory"))
    parser.add_argument("--output", type=Path, default=RESULTS / "prune.json")
    parser.add_argument("--probe", nargs=2, metavar=("VARIANT", "WORKLOAD"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    setup = tiny_setup() if options.tiny else cpu_setup()
    if options.probe:
        print(json.dumps({"peak_mib": probe(setup, *options.probe)}))
        return
    chosen = options.only or ("realised", "overhead", "growth", "memory")
    start, results = time.perf_counter(), {"hardware": hardware(CPU, DTYPE), "sizes": describe(setup)}
    print(json.dumps(results["hardware"]), flush=True)
    counts = (64, 128, 256) if options.tiny else (1024, 2048, 4096, 8192, 16384)
    if "realised" in chosen:
        results["realised"] = measure_realised(setup, options.rounds, answer_batch=2)
    if "overhead" in chosen:
        results["overhead"] = [measure_overhead(setup, options.rounds), measure_overhead(doubled(setup), 1)]
        print(json.dumps(results["overhead"]), flush=True)
    if "growth" in chosen:
        results["growth"] = measure_growth(counts, rounds=5)
        print(json.dumps(results["growth"]), flush=True)
    if "memory" in chosen:
        results["peak_memory_mib"] = measure_memory(options.tiny)
        print(json.dumps(results["peak_memory_mib"]), flush=True)
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {options.output} after {results['minutes']} minutes")


def describe(setup: Setup) -> dict[str, Any]:
    """Sizes for the results file."""
    pruned = setup.pruned()
    return {
        "encoder_tokens": pruned.encoder_tokens,
        "encoder_budgets": {name: list(budget) for name, budget in pruned.encode_budgets.items()},
        "visual_tokens": {"dense": setup.concat_grid**2, "fused": setup.fused, "kept": setup.kept},
        "stage_3_after_layer": setup.layer,
        "text_tokens": setup.text_tokens,
        "new_tokens": setup.new_tokens,
        "llm": {key: value for key, value in setup.text_config.items() if key != "model_type"},
    }


if __name__ == "__main__":
    main()
