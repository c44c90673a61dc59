"""What an estimate starts from beside the recipe: the cluster, the data, how fast things are."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pipelines.config.recipe import Recipe
from pipelines.config.settings import SettingsError
from pipelines.io.validation import settings_class

GB = 1e9
SAMPLE_BYTES = 0.2e6
"""Of a sample in a shard, where nothing is known of the data."""


@settings_class("cluster", SettingsError)
class Speeds:
    """How fast things are; a job measures the store, and nobody the rest before it runs."""

    gpu_tflops: PositiveFloat = 125.0
    """TFLOP/s that a GPU sustains in bf16; the default is 40 % of an A100's 312."""
    cpu_gflops: PositiveFloat = 79.0
    """GFLOP/s that a CPU core sustains in fp32; the default was measured on the machine of benchmarks/."""
    network_gbit: PositiveFloat = 100.0
    """Gbit/s of a node's network, for what the workers send each other."""
    store_mb: PositiveFloat = 500.0
    """MB/s between a node and the object store."""


@dataclass(frozen=True)
class Layout:
    """The cluster and the data of one run.

    Attributes:
        nodes: machines that work.
        gpus_per_node: of each; 0 trains on CPUs.
        samples: of the training split; None where nobody knows.
        data_bytes: of all its shards; None where nobody knows.
        text_tokens: of a sample, on average.
        answer_tokens: of a held-out answer, on average.
        speeds: how fast things are.
    """

    nodes: PositiveInt = 1
    gpus_per_node: NonNegativeFloat = 0.0
    samples: NonNegativeInt | None = None
    data_bytes: NonNegativeInt | None = None
    text_tokens: PositiveInt = 40
    answer_tokens: PositiveInt = 10
    speeds: Speeds = field(default_factory=Speeds)

    @property
    def sample_bytes(self) -> float:
        """Bytes of a sample in its shard, on average."""
        return self.data_bytes / self.samples if self.samples and self.data_bytes else SAMPLE_BYTES

    def workers_per_node(self, recipe: Recipe) -> int:
        """The most workers that share a node."""
        return -(-recipe.training.workers // self.nodes)

    def steps(self, recipe: Recipe) -> int | None:
        """Optimizer steps of the whole training; None without a number of samples."""
        if self.samples is None:
            return None
        return max(1, round(self.samples * recipe.data.weight * recipe.training.epochs) // recipe.training.global_batch)
