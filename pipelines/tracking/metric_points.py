"""Metric points as values and as lines of text, and the place in a run's folder where undelivered ones are kept.

Imports no MLflow: checkpoints are written and read with it on every worker.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelines.io import codec, storage

POINTS_PER_BATCH = 1000
"""Metric points that MLflow takes in one request."""


@dataclass(frozen=True, slots=True)
class MetricPoint:
    """One value of one metric; `time_ms` is milliseconds since the epoch."""

    name: str
    value: float
    time_ms: int
    step: int


def points_to_jsonl(points: Iterable[MetricPoint]) -> str:
    """One JSON object a line; values keep every bit, NaN and infinities included."""
    return "".join(codec.encode(point) + "\n" for point in points)


def points_from_jsonl(text: str, source: str) -> list[MetricPoint]:
    """The points of `points_to_jsonl`, read from `source`.

    Raises:
        ValueError: a line that is no metric point, by number and field.
    """
    lines = enumerate(text.splitlines(), start=1)
    return [codec.decode(MetricPoint, line, f"{source}, line {number}") for number, line in lines]


def write_points(folder: str, points: Sequence[MetricPoint]) -> str:
    """Write points to a new file of a folder in storage (one of a run's outbox); its URL. Raises StorageError."""
    url = storage.join(folder, f"{unique_name()}.jsonl")
    storage.write_bytes(url, points_to_jsonl(points).encode())
    return url


def unique_name() -> str:
    """A name for something in the outbox; names sort by time."""
    return f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
