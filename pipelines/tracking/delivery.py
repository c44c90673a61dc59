"""Metric points to an MLflow run, each metric and step once: the one way of the logger and of the run's outbox."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from pipelines.io import storage
from pipelines.io.redact import redact_text
from pipelines.io.run_folder import RunFolder
from pipelines.tracking.metric_points import POINTS_PER_BATCH, MetricPoint, points_from_jsonl, write_points
from pipelines.tracking.server import is_passing, limit_http_waits

logger = logging.getLogger(__name__)

FAULTS = (MlflowException, OSError, ValueError)
"""What a call here may raise while the server or storage is away; requests' errors are OSErrors."""

# Errors that sending again cannot mend: they are about the points themselves.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


@dataclass(frozen=True)
class Sent:
    """What became of points that were offered to the server.

    Attributes:
        delivered: taken by the server.
        repeated: left out, since the run had a value of that metric and step.
        refused: refused by the server for what they are, for example for a bad name.
    """

    delivered: int
    repeated: int
    refused: tuple[MetricPoint, ...]


class LoggedSteps:
    """The steps of each metric that an MLflow run had before this process sent any; asked once per metric.

    Equal points collapse in MLflow only with equal times, and the times of a step that is made again differ.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        limit_http_waits()
        self.run_id = run_id
        self.client = MlflowClient(uri)
        self._names: frozenset[str] | None = None
        self._steps: dict[str, set[int]] = {}

    def fresh(self, points: Sequence[MetricPoint]) -> list[MetricPoint]:
        """The points whose (name, step) the run does not have.

        Raises:
            MlflowException and requests' errors: when the server is away.
        """
        if self._names is None:
            self._names = frozenset(self.client.get_run(self.run_id).data.metrics)
        for name in {point.name for point in points} - self._steps.keys():
            history = self.client.get_metric_history(self.run_id, name) if name in self._names else []
            self._steps[name] = {metric.step for metric in history}
        return [point for point in points if point.step not in self._steps[point.name]]

    def add(self, points: Sequence[MetricPoint]) -> None:
        """Count points that `fresh` was asked about as delivered."""
        for point in points:
            self._steps[point.name].add(point.step)


def send(client: MlflowClient, run_id: str, points: Sequence[MetricPoint]) -> list[MetricPoint]:
    """Send up to POINTS_PER_BATCH points; the points that the server refuses for what they are.

    Raises:
        MlflowException and requests' errors: when the server is away.
    """
    try:
        client.log_batch(run_id, [Metric(point.name, point.value, point.time_ms, point.step) for point in points])
    except MlflowException as error:
        if is_passing(error) or error.error_code not in _REFUSALS:
            raise
        if len(points) == 1:
            logger.warning("MLflow refuses metric %r: %s", points[0].name, redact_text(str(error))[:200])
            return list(points)
        half = len(points) // 2  # one bad name must not hold back the others
        return send(client, run_id, points[:half]) + send(client, run_id, points[half:])
    return []


def deliver(known: LoggedSteps, points: Sequence[MetricPoint]) -> Sent:
    """Send the points that the run does not have, in batches that MLflow accepts.

    Raises:
        MlflowException and requests' errors: when the server is away; batches before the failing one have arrived.
    """
    fresh = known.fresh(points)
    refused: list[MetricPoint] = []
    for start in range(0, len(fresh), POINTS_PER_BATCH):
        refused += send(known.client, known.run_id, fresh[start : start + POINTS_PER_BATCH])
    return Sent(len(fresh) - len(refused), len(points) - len(fresh), tuple(refused))


def deliver_outbox(uri: str, run_id: str, run_url: str) -> Sent:
    """Deliver the metric points in a run's outbox; those that the run has are left out.

    Raises:
        MlflowException and requests' errors: when the server is away; what was delivered is out of the outbox.
        ValueError: a file that holds something else.
    """
    known, total = LoggedSteps(uri, run_id), Sent(0, 0, ())
    root = RunFolder(run_url).outbox_points
    for name in storage.list_files(root):
        url = storage.join(root, name)
        points = points_from_jsonl(storage.read_bytes(url).decode(), url)
        sent = deliver(known, points)
        if sent.refused:
            write_points(RunFolder(run_url).outbox_refused, sent.refused)
        known.add(points)  # the next file may hold them again
        total = Sent(total.delivered + sent.delivered, total.repeated + sent.repeated, (*total.refused, *sent.refused))
        storage.delete(url)
    return total
