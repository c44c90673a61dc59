"""CPU, memory, disk, network and GPU of this machine as metrics of a run."""

from __future__ import annotations

import logging
import threading
import time

from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

from pipelines.tracking.metric_logger import MetricLogger

logger = logging.getLogger(__name__)


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
        self._last_step = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_all, name="system-metrics", daemon=True)

    def start(self) -> None:
        """Begin sampling."""
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end."""
        self._stop.set()
        self._thread.join(self._interval_s)  # a probe that hangs must not hold the end of the run

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
        step = (time.time_ns() // 1_000_000 - self._run_start_ms) // 1000
        if step > self._last_step:  # one value per metric and step
            self._sink.log(metrics, step)
        self._last_step = step
