"""One line of log a minute on a file that is under way."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

SPEAK_S = 60.0
"""Seconds between two lines of log on a file that is under way."""

logger = logging.getLogger(__name__)


@dataclass
class ProgressLog:
    """Says once a minute how far a file is."""

    what: str
    total: int
    done: int = 0
    said: float = 0.0
    begun: float = 0.0

    def __post_init__(self) -> None:
        self.begun = self.said = time.monotonic()

    def add(self, count: int) -> None:
        """So many bytes more have arrived."""
        self.done += count
        now = time.monotonic()
        if now >= self.said + SPEAK_S:
            self.said = now
            logger.info(
                "%s: %.2f of %.2f GB, %.1f MB/s",
                self.what,
                self.done / 1e9,
                self.total / 1e9,
                self.done / (now - self.begun) / 1e6,
            )
