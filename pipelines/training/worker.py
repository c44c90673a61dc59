"""One process of the group that trains."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Worker:
    """A worker of the training.

    Attributes:
        engine: DeepSpeed's, around this worker's partition of the model.
        rank: its number, from 0; worker 0 writes what all have in common.
        world: how many there are.
        start: digest of the weight files that it started from, which hold what is frozen.
    """

    engine: Any
    rank: int
    world: int
    start: str

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.engine.device
        return device
