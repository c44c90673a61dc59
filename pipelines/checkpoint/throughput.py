"""How fast a training went: what its steps did, in how much time, with what share of what the devices can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Throughput:
    """Some optimizer steps, all workers together. Two of them add up; a worker's own part has its own numbers alone."""

    seconds: float = 0.0
    """Wall-clock, waiting for data included; without the start of workers and checkpoints."""
    worker_seconds: float = 0.0
    """The same of every worker, summed."""
    data_seconds: float = 0.0
    """Of the worker that waited longest for data."""
    samples: int = 0
    """Trained on."""
    tokens: int = 0
    """Trained on, visual ones that reach the language model included."""
    cells: int = 0
    """Places of all batches, padding included."""
    model_flops: float = 0.0
    """That forward and backward of the samples ask for, each at its own length; 0 where they are not counted."""
    hardware_flops: float = 0.0
    """That were computed: padding, empty batches and what is recomputed included."""
    peak_flops: float = 0.0
    """That the workers' devices could have done in that time."""
    peak_memory: int = 0
    """Most bytes that a worker held since it started: its GPU's allocations, on a CPU its resident set."""

    def __add__(self, other: Throughput) -> Throughput:
        sums = {item.name: getattr(self, item.name) + getattr(other, item.name) for item in dataclasses.fields(self)}
        return Throughput(**{**sums, "peak_memory": max(self.peak_memory, other.peak_memory)})

    def rates(self) -> dict[str, float]:
        """Samples and tokens per second, and the share of padding; there must be a step."""
        return {
            "samples_per_s": self.samples / self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "padding_share": 1 - self.tokens / max(1, self.cells),
        }

    def metrics(self) -> dict[str, float]:
        """`rates`, and what they cost; FLOPs where they are counted. Nothing without a step."""
        if not self.seconds:
            return {}
        found = {
            **self.rates(),
            "workers/data_wait_share": self.data_seconds / self.seconds,
            "workers/peak_memory_gb": self.peak_memory / 1e9,
        }
        if self.model_flops:
            found["workers/tflops"] = self.model_flops / self.worker_seconds / 1e12
            found["mfu"] = self.model_flops / self.peak_flops
            found["hfu"] = self.hardware_flops / self.peak_flops
        return found


def speed_text(metrics: Mapping[str, float]) -> str:
    """What `Throughput.metrics` gave, for people; "" for nothing."""
    if not metrics:
        return ""
    text = f"{metrics['tokens_per_s']:.0f} tokens/s, "
    if "mfu" in metrics:
        text += (
            f"{metrics['workers/tflops']:.3g} TFLOP/s a worker, MFU {metrics['mfu']:.0%}, HFU {metrics['hfu']:.0%}, "
        )
    return (
        f"{text}{metrics['workers/data_wait_share']:.0%} waiting for data, "
        f"{metrics['workers/peak_memory_gb']:.1f} GB a worker at most"
    )
