"""Metrics to MLflow without ever stopping, slowing or failing what is measured.

`MetricLogger.log` puts points in memory and returns; a background thread delivers them in order, stamped with the time
of the call, and goes on trying while the server is away. A point leaves memory only once the server has taken its
batch, so an outage loses nothing; a batch that is sent twice is stored once (MLflow drops equal points).

What is still undelivered at `close` goes to a local file; `python -m pipelines.metric_log FILE` delivers it later.
"""

import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipelines.tracking import hide_passwords, limit_http_waits, require_tracking

logger = logging.getLogger(__name__)

POINTS_PER_BATCH = 1000
GATHER_S = 0.5
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 10.0

# Errors that sending again cannot mend: they are about the points themselves.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


@dataclass(frozen=True)
class Point:
    """One value of one metric; `time_ms` is milliseconds since the epoch."""

    name: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class Delivery:
    """What `MetricLogger.close` can say: points delivered, points not delivered, and the file that holds the latter."""

    delivered: int
    undelivered: int
    file: Path | None


class MetricLogger:
    """Delivers the metrics of one run. Cheap to make and to pickle: the thread starts at the first `log`.

    Args:
        run_id: of the run, which exists.
        uri: of the tracking server.
        folder: where undelivered points are written at the end; the system's temporary folder by default.
    """

    def __init__(self, run_id: str, uri: str, folder: str | None = None) -> None:
        self.run_id = run_id
        self.uri = uri
        self.folder = folder
        self._points: deque[Point] = deque()
        self._refused: list[Point] = []
        self._delivered = 0
        self._changed = threading.Condition()  # guards everything above and below
        self._closing = False
        self._given_up = False
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        assert not self._points, "a logger with undelivered points must not be pickled: they would be sent twice"
        return MetricLogger, (self.run_id, self.uri, self.folder)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics of one step. Never waits for the server, never raises; non-finite values go as they are."""
        now_ms = _now_ms()
        points = []
        for name, value in metrics.items():
            try:
                points.append(Point(name, float(value), now_ms, int(step)))
            except (TypeError, ValueError):
                logger.warning("metric %s at step %s is no number: %.80r; left out", name, step, value)
        with self._changed:
            if self._closing:
                logger.warning("%d metrics came after the logger was closed; left out", len(points))
                return
            self._points.extend(points)
            if self._thread is None:
                self._thread = threading.Thread(target=self._deliver_all, name="metric-logger", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def pending(self) -> int:
        """Points that the server has not taken yet."""
        with self._changed:
            return len(self._points)

    def close(self, deadline_s: float = 30.0) -> Delivery:
        """Deliver what is left, for at most `deadline_s` seconds; the rest goes to a file. Never raises."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(deadline_s)
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
            left = [*self._refused, *self._points]
            self._points.clear()
            self._refused = []
        if not left:
            return Delivery(self._delivered, 0, None)
        file = self._write(left)
        logger.error(
            "%d metric points of run %s were not delivered to %s; they are in %s "
            "(deliver them later: python -m pipelines.metric_log FILE)",
            *(len(left), self.run_id, hide_passwords(self.uri), file),
        )
        return Delivery(self._delivered, len(left), file)

    def _write(self, points: Sequence[Point]) -> Path | None:
        folder = Path(self.folder) if self.folder is not None else Path(tempfile.gettempdir())
        path = folder / f"metrics-{self.run_id}-{_now_ms()}.jsonl"
        lines = "".join(json.dumps({"run_id": self.run_id, **asdict(point)}) + "\n" for point in points)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(lines)
        except OSError as error:
            logger.error("%d metric points are lost: %s cannot be written: %s", len(points), path, error)
            return None
        return path

    def _deliver_all(self) -> None:
        """The thread: batch by batch, oldest first, until closed and empty, or given up."""
        limit_http_waits()
        client = MlflowClient(self.uri)
        pause_s = 0.0
        while not self._given_up:
            batch = self._next_batch()
            if not batch:
                return
            try:
                refused = send(client, self.run_id, batch)
            except (MlflowException, requests.RequestException, OSError) as error:
                if not pause_s:
                    shown = hide_passwords(str(error))[:200]
                    logger.warning("MLflow takes no metrics (%s); they are kept and sent later", shown)
                pause_s = min(max(2 * pause_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
                self._pause(pause_s)
                continue
            if pause_s:
                logger.warning("MLflow takes metrics again; %d points wait", self.pending)
                pause_s = 0.0
            with self._changed:
                if self._given_up:
                    return
                for _ in batch:
                    self._points.popleft()
                self._refused += refused
                self._delivered += len(batch) - len(refused)

    def _next_batch(self) -> list[Point]:
        """The oldest points, which stay in the queue; waits for some, and for those of the same moment to come along.
        Empty once closed and all delivered."""
        with self._changed:
            self._changed.wait_for(lambda: self._points or self._closing)
            self._changed.wait_for(lambda: len(self._points) >= POINTS_PER_BATCH or self._closing, GATHER_S)
            return list(islice(self._points, POINTS_PER_BATCH))

    def _pause(self, seconds: float) -> None:
        """Wait before the next attempt; near the end only shortly."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing, seconds)
            if self._closing:
                self._changed.wait_for(lambda: self._given_up, FIRST_PAUSE_S)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def send(client: MlflowClient, run_id: str, points: Sequence[Point]) -> list[Point]:
    """Send up to POINTS_PER_BATCH points; the points that the server refuses for what they are.

    Raises:
        MlflowException and requests' errors: when the server is away.
    """
    try:
        client.log_batch(run_id, [Metric(point.name, point.value, point.time_ms, point.step) for point in points])
    except MlflowException as error:
        if error.error_code not in _REFUSALS:
            raise
        if len(points) == 1:
            logger.warning("MLflow refuses metric %r: %s", points[0].name, str(error)[:200])
            return list(points)
        half = len(points) // 2  # one bad name must not hold back the others
        return send(client, run_id, points[:half]) + send(client, run_id, points[half:])
    return []


def deliver_file(path: Path, uri: str) -> tuple[int, int]:
    """Deliver a file that `MetricLogger.close` wrote; (delivered, refused). Delivering twice does no harm.

    Raises:
        ValueError: a line that is no metric point, by number.
    """
    by_run: dict[str, list[Point]] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            fields = json.loads(line)
            point = Point(fields["name"], float(fields["value"]), int(fields["time_ms"]), int(fields["step"]))
            by_run.setdefault(fields["run_id"], []).append(point)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no metric point ({error})") from error
    client = MlflowClient(uri)
    refused = 0
    for run_id, points in by_run.items():
        for start in range(0, len(points), POINTS_PER_BATCH):
            refused += len(send(client, run_id, points[start : start + POINTS_PER_BATCH]))
    return sum(map(len, by_run.values())) - refused, refused


class SystemMetrics:
    """CPU, memory, disk, network and (where nvidia-ml-py is installed) GPU of this machine, as `system/...` metrics.

    MLflow's probes, but delivered through a `MetricLogger`: MLflow's own monitor ends at the first outage. Steps are
    seconds since the run began, so that they go on where they were when a run is resumed.

    Args:
        sink: the logger of the run; it stays open at `stop`.
        run_start_ms: start of the run, milliseconds since the epoch.
        interval_s: seconds between two samples.
    """

    def __init__(self, sink: MetricLogger, run_start_ms: int, interval_s: float = 10.0) -> None:
        self._sink = sink
        self._run_start_ms = run_start_ms
        self._interval_s = interval_s
        self._probes: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self._probes.append(GPUMonitor())
        except (ImportError, RuntimeError):
            logger.debug("no GPU metrics: nvidia-ml-py or a GPU is missing")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_all, name="system-metrics", daemon=True)

    def start(self) -> None:
        """Begin sampling."""
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end."""
        self._stop.set()
        self._thread.join()

    def _sample_all(self) -> None:
        self._probes[0].collect_metrics()  # CPU use is measured since the last call: the first one says nothing
        self._probes[0].clear_metrics()
        while not self._stop.wait(self._interval_s):
            self._sample()
        self._sample()

    def _sample(self) -> None:
        metrics: dict[str, float] = {}
        for probe in self._probes:
            probe.collect_metrics()
            metrics |= {f"system/{name}": value for name, value in probe.aggregate_metrics().items()}
            probe.clear_metrics()
        self._sink.log(metrics, (_now_ms() - self._run_start_ms) // 1000)


def main(files: Sequence[str]) -> int:
    """`python -m pipelines.metric_log FILE...`: deliver files of undelivered metrics to MLFLOW_TRACKING_URI."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    require_tracking(uri)
    for name in files:
        delivered, refused = deliver_file(Path(name), uri)
        print(f"{name}: {delivered} metric points delivered to {hide_passwords(uri)}, {refused} refused")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
