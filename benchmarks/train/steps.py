"""Training steps in one process, in turns: what pruning saves of them, and what other number formats do.

Seconds are the process's own, on one thread: what else runs on the machine is not in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.clocks import realised, take_turns
from benchmarks.harness import DENSE, Setup, Work, build, train_flops, with_shared_llm
from benchmarks.sizes import tiny_setup

CPU = torch.device("cpu")


def measure_pruning(setup: Setup, batch: int, rounds: int) -> dict[str, Any]:
    """METEOR's step beside two without pruning: maps joined on the channels (EAGLE), and the tokens of all in one pool.

    Speed-up in time over speed-up in FLOPs, as in `clocks.realised`; the same towers and LLM, all of it trained.
    """
    configs = {"concat": setup.dense(), "dense": setup.config("post_projection", DENSE), "meteor": setup.pruned()}
    first = build(configs["concat"], CPU, torch.float32)
    models = {
        name: first if name == "concat" else with_shared_llm(config, first, CPU, torch.float32)
        for name, config in configs.items()
    }
    calls = {name: Work(model, setup, batch, CPU).train for name, model in models.items()}
    flops = {name: train_flops(config, setup.text_tokens) for name, config in configs.items()}
    spent = take_turns(calls, rounds, CPU, clock=time.process_time)
    return {
        "batch": batch,
        "tokens_into_llm": {name: config.tokens_per_image for name, config in configs.items()},
        **{f"meteor against {name}": realised(spent, flops, name, "meteor") for name in ("concat", "dense")},
    }


@dataclass(frozen=True)
class Autocast:
    """A call whose products run in bf16 over fp32 weights."""

    call: Callable[[], None]

    def __call__(self) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            self.call()


def measure_formats(batch: int, rounds: int) -> dict[str, Any]:
    """METEOR's step of the architecture `tiny`: weights in fp32, weights in bf16, and bf16 by autocast over fp32."""
    setup = replace(tiny_setup(), text_tokens=24)
    work = {
        dtype: Work(build(setup.pruned(), CPU, dtype), setup, batch, CPU) for dtype in (torch.float32, torch.bfloat16)
    }
    plain = work[torch.float32].train
    calls: dict[str, Callable[[], None]] = {
        "fp32": plain,
        "bf16": work[torch.bfloat16].train,
        "bf16_autocast": Autocast(plain),
    }
    spent, same = take_turns(calls, rounds, CPU, clock=time.process_time), dict.fromkeys(calls, 1)
    return {"batch": batch, **{name: realised(spent, same, "fp32", name) for name in calls if name != "fp32"}}
