"""Memory of a training step at a large vocabulary, with all logits and with those of a chunk: `make bench-loss`.

1. step   forward and backward of the architecture `tiny` with a vocabulary of 65,536, half of the tokens supervised:
          MiB at the peak above what is there before (the resident set of a process forked for it), seconds of CPU
          time on one thread, taken in turns, and how far the loss is from that of the plain form
2. plan   GB of activations of a micro-batch of the fine-tuning of `meteor_x4_7b`, every token supervised: counted on
          the meta device, as `make plan` does, at its vocabulary of 32,000 and at one of 151,936

Writes benchmarks/results/loss.json. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import peak_memory
from benchmarks.harness import SPECIAL_IDS
from benchmarks.packing import IMAGE, take_valued_turns
from benchmarks.results_file import RESULTS, hardware, write_results
from jobs.recipes import recipe
from meteor_model.architectures import build_config
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from pipelines.checkpoint.zero3 import weight_dtype
from pipelines.sizing.activations import count_activations
from pipelines.sizing.model_size import model_config, model_size

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VOCABULARY, SAMPLES, TEXT = 65_536, 8, 128
CHUNKS = (None, 4096, 1024, 256, 64)
"""Of the measured step; it has 512 supervised tokens, so the largest is one chunk."""
PUBLISHED_CHUNKS = (None, 1024)
LARGE_VOCABULARY = 151_936


def workload(precision: str) -> tuple[MeteorForConditionalGeneration, dict[str, torch.Tensor]]:
    """Model and batch: an image a sample, then text whose second half is supervised."""
    torch.manual_seed(0)
    config = build_config("tiny", recipe("pretrain", "tiny").pruning, VOCABULARY, SPECIAL_IDS, IMAGE)
    model = MeteorForConditionalGeneration(config).to(DTYPES[precision]).train()
    visual = torch.full((SAMPLES, config.tokens_per_image), IMAGE)
    ids = torch.cat([visual, torch.randint(10, VOCABULARY, (SAMPLES, TEXT))], dim=1)
    labels = ids.clone()
    labels[:, : -TEXT // 2] = -100
    size = config.image_size
    pixels = torch.randint(0, 256, (SAMPLES, 3, size, size), dtype=torch.uint8)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}


def train(model: MeteorForConditionalGeneration, inputs: dict[str, torch.Tensor], chunk: int | None) -> float:
    """Forward and backward; the loss."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, loss_chunk=chunk).loss
    loss.backward()
    return loss.item()


def measure_memory(precision: str) -> dict[str, float]:
    """MiB of a step by chunk; before this process has run a backward pass, which none forked later could."""
    model, inputs = workload(precision)
    fork, peaks = multiprocessing.get_context("fork"), {}
    for chunk in CHUNKS:
        receives, sends = fork.Pipe(duplex=False)
        child = fork.Process(target=_probe, args=(partial(train, model, inputs, chunk), sends))
        child.start()
        peaks[str(chunk)] = receives.recv()
        child.join()
    return peaks


def _probe(work: Callable[[], float], results: Connection) -> None:
    def call() -> None:
        work()

    results.send(peak_memory(call, CPU))


def measure_step(precision: str, peaks: Mapping[str, float], rounds: int) -> dict[str, Any]:
    """Part 1 in one number format."""
    model, inputs = workload(precision)
    spent, losses = take_valued_turns({str(chunk): partial(train, model, inputs, chunk) for chunk in CHUNKS}, rounds)
    found: dict[str, Any] = {}
    for name, seconds in spent.items():
        ratios = [one / plain for one, plain in zip(seconds, spent["None"], strict=True)]
        found[name] = {
            "peak_mib": peaks[name],
            "cpu_s": round(statistics.median(seconds), 3),
            "times_plain": round(statistics.median(ratios), 3),
            "times_plain_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "loss_difference": abs(losses[name] / losses["None"] - 1),
        }
        print(precision, name, json.dumps(found[name]), flush=True)
    return found


def count_published(vocabulary: int) -> dict[str, float]:
    """Part 2: GB of activations at the peak of a micro-batch by chunk."""
    made = recipe("finetune", "meteor_x4_7b")
    config, training = model_config(made), made.training
    config.text_config.vocab_size = vocabulary
    count = partial(
        count_activations,
        config,
        model_size(made).trained,
        micro_batch=training.micro_batch,
        length=made.data.max_length,
        dtype=weight_dtype(training),
        checkpointing=training.gradient_checkpointing,
    )
    found = {}
    for chunk in PUBLISHED_CHUNKS:
        live = count(loss_chunk=chunk)
        found[str(chunk)] = round(max(live.forward, live.kept + max(live.logits, 2 * live.block)) / 1e9, 2)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "loss.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    peaks = {precision: measure_memory(precision) for precision in DTYPES}
    results: dict[str, Any] = {
        "hardware": {**hardware(), "threads": 1, "torch": torch.__version__},
        "vocabulary": VOCABULARY,
        "tokens": {"all": SAMPLES * (TEXT + recipe("pretrain", "tiny").pruning.fuse.keep), "supervised": 512},
        "step": {precision: measure_step(precision, peaks[precision], options.rounds) for precision in DTYPES},
        "finetune_of_meteor_x4_7b_gb": {
            f"vocabulary {vocabulary}": count_published(vocabulary) for vocabulary in (32_000, LARGE_VOCABULARY)
        },
    }
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    write_results(options.output, results)


if __name__ == "__main__":
    main()
