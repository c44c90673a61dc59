"""How fast batches come. Imports nothing beyond Python, for it runs in the peers' environment, too."""

from __future__ import annotations

import time
from typing import Any

WARM_UP = 8
"""Batches before the steady part: what was prefetched while the first one was waited for is among them."""


class Pace:
    """Clock of one pass over a stream, from now on."""

    def __init__(self) -> None:
        self._start = time.time()
        self._times: list[float] = []
        self._samples: list[int] = []

    def batch(self, samples: int) -> None:
        """A batch of so many samples is there."""
        self._times.append(time.time())
        self._samples.append(samples)

    def found(self) -> dict[str, Any]:
        """Start and first batch (seconds since the epoch), all samples, and samples/s of the steady part."""
        steady = None
        if len(self._times) > WARM_UP + 1:
            spent = self._times[-1] - self._times[WARM_UP]
            steady = sum(self._samples[WARM_UP + 1 :]) / spent
        return {
            "start": self._start,
            "first_batch": self._times[0],
            "samples": sum(self._samples),
            "samples_per_s": steady,
        }
