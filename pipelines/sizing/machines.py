"""What a cluster is made of, where nobody can ask it."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from pipelines.config.settings import SettingsError
from pipelines.io.validation import settings_class


@settings_class("machines", SettingsError)
class Machines:
    """What the cluster is made of."""

    gpus_per_node: PositiveInt = 8
    """GPUs of a machine."""
    gpu_gb: PositiveFloat = 80.0
    """GB of a GPU; a tenth of it is left free, for fragments."""
    node_gb: PositiveFloat = 1000.0
    """GB of memory of a machine; a tenth is left free."""
    store_gb: PositiveFloat = 12.5
    """GB/s that the object store gives all machines together; each alone gets speeds.store-mb."""
    decoded: PositiveFloat = 100.0
    """Images that one data task reads, decodes and resizes in a second (`make bench-data`)."""

    def nodes(self, gpus: int) -> tuple[int, int]:
        """Machines for so many GPUs, and the GPUs of each. Raises ValueError where the last would not be full."""
        if gpus <= 0:
            raise ValueError(f"gpus is {gpus}; it must be above 0")
        if gpus > self.gpus_per_node and gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus is {gpus}; above machines.gpus-per-node, {self.gpus_per_node}, it must be a multiple of it"
            )
        return -(-gpus // self.gpus_per_node), min(gpus, self.gpus_per_node)
