"""What every pruner costs and what it brings in wall-clock, side by side on a CPU: `make bench-pruners`.

One model with random weights, a pool of 1,024 and one of 4,096 visual tokens (and the architecture `tiny`), and every
pruner on it at a quarter of the tokens, under SDPA, to the first token:

    speed_up        the dense model's time over the pruner's, round by round in turns, the median
    realised        that over the ratio of their FLOPs: 1 means that every FLOP saved is time saved
    selection       time inside scoring, choosing, sorting and gathering over the dense model's time (by Python's
                    profile hook, under which the dense model runs as well)
    memory          of tensors: selection's own peak, and the peak of the whole pass over the dense one's

Random weights say nothing of quality, and nothing of what a number that depends on attention would be.
Writes benchmarks/results/pruners.json, where layouts that are not run stay as they were; docs/pruners.md shows it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import SelectionClock, hardware, realised
from benchmarks.harness import DENSE, Setup, Work, build
from benchmarks.live_memory import Spent, spent_by
from benchmarks.results_file import RESULTS, write_results
from benchmarks.sizes import doubled, pool_setup, tiny_setup
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.flops import count_flops
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.pruners.cost import kept_at_the_end, mean_over_layers, solve_share
from meteor_model.pruners.named import PRUNERS, with_pruner
from meteor_model.pruners.spectra import singular_values

Clock = Callable[[], float]
#: "wall", or the process's own time on all cores, which others that share the machine do not change much.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}
CPU = torch.device("cpu")
DTYPE = torch.float32
#: Share of the visual tokens that a pruner keeps.
KEPT = 1 / 4
#: Pruners between two runs of the dense model.
GROUP = 4
#: Visual tokens from which a pass is long.
LONG = 1000
LAYOUTS = ("1024", "4096", "tiny")


def setup_of(layout: str) -> Setup:
    """One of `LAYOUTS`."""
    return {"tiny": tiny_setup, "1024": pool_setup, "4096": lambda: doubled(pool_setup())}[layout]()


@dataclass(frozen=True)
class Bench:
    """One model, which follows the configuration of whoever runs."""

    work: Work
    dense: MeteorConfig

    @classmethod
    def of(cls, setup: Setup) -> Bench:
        config = setup.config("post_projection", DENSE)
        return cls(Work(build(config, CPU, DTYPE), setup, 1, CPU), config)

    @property
    def model(self) -> MeteorForConditionalGeneration:
        return self.work.model

    def counted(self, config: MeteorConfig, clock: Clock) -> Spent:
        """The same with memory counted."""
        self.model.follow(config)
        prompt = self.work.prompt()
        return spent_by(
            self.work.first_token, [*self.model.parameters(), *self.model.buffers(), *prompt.values()], clock
        )

    def timed(self, config: MeteorConfig, clock: Clock) -> Spent:
        """The same with time alone."""
        self.model.follow(config)
        selection = SelectionClock(CPU, needed=set(), clock=clock)
        return Spent(selection.measure(self.work.first_token), sum(selection.seconds.values()), 0.0, 0.0)

    @torch.no_grad()
    def pruned(self, name: str) -> MeteorConfig:
        """The pruner at a quarter of the tokens; E-AdaPrune at most at what its energy can fill."""
        most = self.dense.tokens_per_image
        keep = most if name == "none" else round(most * KEPT)
        if name != "e_adaprune":
            return with_pruner(self.dense, name, keep)
        self.model.follow(self.dense)
        visual_MKC, _ = self.model.encode_images(self.work.pixels())
        spectra_MR = singular_values(visual_MKC)
        keep = min(keep, spectra_MR.shape[1] // 2)
        return with_pruner(self.dense, name, keep, share=solve_share(spectra_MR, keep))


def measure(bench: Bench, names: list[str], rounds: int, clock: Clock) -> dict[str, Any]:
    """Every pruner on one layout, in turns with the dense model.

    Memory is counted in the first turn. Where passes are long, counting (some microseconds an operation, on both sides)
    costs next to nothing and that turn is timed, too; else it is the warm-up.
    """
    long = bench.dense.tokens_per_image >= LONG
    configs = {"dense": bench.dense, **{name: bench.pruned(name) for name in names}}
    flops = {name: count_flops(config, bench.work.setup.text_tokens).total for name, config in configs.items()}
    rows: dict[str, Any] = {}
    for first in range(0, len(names), GROUP):
        group = ["dense", *names[first : first + GROUP]]
        counted = {name: bench.counted(configs[name], clock) for name in group}
        turns = {name: [counted[name]] if long else [] for name in group}
        for _ in range(rounds - long):
            for name in group:
                turns[name].append(bench.timed(configs[name], clock))
        seconds = {name: [turn.seconds for turn in spent] for name, spent in turns.items()}
        base = statistics.median(seconds["dense"])
        for name in group[1:]:
            selecting = statistics.median(turn.selection_seconds for turn in turns[name])
            rows[name] = {
                "kept": kept_at_the_end(configs[name]),
                "mean_over_layers": round(mean_over_layers(configs[name]), 1),
                **realised(seconds, flops, "dense", name),
                "selection_seconds": round(selecting, 5),
                "selection_over_dense": round(selecting / base, 5),
                "selection_peak_mib": round(counted[name].selection_mib, 2),
                "peak_over_dense": round(counted[name].peak_mib / counted["dense"].peak_mib, 3),
            }
            print(f"{name}: {json.dumps(rows[name])}", flush=True)
    return {
        "encoder_tokens": bench.dense.encoder_tokens,
        "visual_tokens": bench.dense.tokens_per_image,
        "text_tokens": bench.work.setup.text_tokens,
        "llm": {key: value for key, value in bench.work.setup.text_config.items() if key != "model_type"},
        "attention": bench.model.language_model.config._attn_implementation,
        "dense_gflops": round(flops["dense"] / 1e9, 1),
        "dense_peak_mib": round(counted["dense"].peak_mib, 1),
        "pruners": rows,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--only", nargs="+", choices=list(PRUNERS), help="some pruners alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: where the machine is shared")
    parser.add_argument("--note", default="", help="kept with the results: what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS / "pruners.json")
    options = parser.parse_args(arguments)
    before = json.loads(options.output.read_text())["layouts"] if options.output.is_file() else {}
    results: dict[str, Any] = {"hardware": hardware(CPU, DTYPE), "note": options.note, "share_kept": KEPT}
    results["layouts"] = {layout: before[layout] for layout in LAYOUTS if layout in before}
    print(json.dumps(results["hardware"]), flush=True)
    names = options.only or list(PRUNERS)
    for layout in options.layouts:
        print(f"layout {layout}", flush=True)
        started, clock = time.perf_counter(), CLOCKS[options.clock]
        found = measure(Bench.of(setup_of(layout)), names, options.rounds, clock)
        found |= {"clock": options.clock, "minutes": round((time.perf_counter() - started) / 60, 1)}
        results["layouts"][layout] = found
        write_results(options.output, results)


if __name__ == "__main__":
    main()
