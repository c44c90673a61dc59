"""Memory of a training step at a large vocabulary, with all logits and with those of a chunk: `make bench-loss`.

1. step   forward and backward of the architecture `tiny` with a vocabulary of 65,536, half of the tokens supervised:
          MiB at the peak above what is there before (the resident set, each in a process of its own), seconds of CPU
          time on one thread, taken in turns, and how far the loss is from that of the plain form
2. plan   bytes of a micro-batch of the published 7B recipes, every token supervised: counted on the meta device, as
          `make plan` does, at their vocabulary and at one of 151,936

Writes benchmarks/results/loss.json. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.clocks import peak_memory
from benchmarks.harness import SPECIAL_IDS
from benchmarks.packing import IMAGE, take_turns
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
PUBLISHED_CHUNKS = (None, 4096, 1024, 256)
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


def probe(precision: str, chunk: int | None) -> float:
    """MiB that a step needs above what is there before it, in this process; the first one makes the kernels' own."""
    model, inputs = workload(precision)
    small = {name: tensor[:1] for name, tensor in inputs.items()}
    train(model, small, 64)
    model.zero_grad(set_to_none=True)
    return peak_memory(lambda: print(train(model, inputs, chunk), file=sys.stderr), CPU)


def measure_step(precision: str, rounds: int) -> dict[str, Any]:
    """Part 1 in one number format."""
    model, inputs = workload(precision)
    spent, losses = take_turns({str(chunk): partial(train, model, inputs, chunk) for chunk in CHUNKS}, rounds)
    found: dict[str, Any] = {}
    for chunk in CHUNKS:
        command = [sys.executable, "-m", "benchmarks.loss", "--probe", precision, str(chunk)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        ratios = [one / plain for one, plain in zip(spent[str(chunk)], spent["None"], strict=True)]
        found[str(chunk)] = {
            "peak_mib": json.loads(done.stdout.splitlines()[-1]),
            "cpu_s": round(statistics.median(spent[str(chunk)]), 3),
            "times_plain": round(statistics.median(ratios), 3),
            "times_plain_range": [round(min(ratios), 3), round(max(ratios), 3)],
            "loss_difference": abs(losses[str(chunk)] / losses["None"] - 1),
        }
        print(precision, chunk, json.dumps(found[str(chunk)]), flush=True)
    return found


def count_published(job: str, vocabulary: int | None) -> dict[str, float]:
    """Part 2: GB of activations at the peak of a micro-batch by chunk."""
    made = recipe(job, "meteor_x4_7b")
    config, training = model_config(made), made.training
    if vocabulary is not None:
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
    parser.add_argument("--probe", nargs=2, metavar=("PRECISION", "CHUNK"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.probe:
        precision, chunk = options.probe
        print(json.dumps(probe(precision, None if chunk == "None" else int(chunk))))
        return
    start = time.perf_counter()
    results: dict[str, Any] = {
        "hardware": {**hardware(), "threads": 1, "torch": torch.__version__},
        "vocabulary": VOCABULARY,
        "tokens": {"all": SAMPLES * (TEXT + recipe("pretrain", "tiny").pruning.fuse.keep), "supervised": 512},
        "step": {precision: measure_step(precision, options.rounds) for precision in DTYPES},
        "plan_gb": {
            f"{job} of meteor_x4_7b, vocabulary {vocabulary or 32_000:,}": count_published(job, vocabulary)
            for job in ("pretrain", "finetune")
            for vocabulary in (None, LARGE_VOCABULARY)
        },
    }
    results["minutes"] = round((time.perf_counter() - start) / 60, 1)
    write_results(options.output, results)


if __name__ == "__main__":
    main()
