"""Metrics arrive whatever happens to the server, once, with the time of the call; and nobody waits for them."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from pipelines.metric_log import MetricLogger, SystemMetrics, deliver_file
from pipelines.tracking import TrackingError, open_run, require_tracking
from tests.registry.conftest import Server

pytestmark = pytest.mark.stack


def new_run(server: Server, name: str) -> str:
    return open_run(server.uri, experiment="metrics", run_name=name, settings={}, tags={}, documents={})


def history(server: Server, run_id: str, name: str) -> list[Metric]:
    return sorted(MlflowClient(server.uri).get_metric_history(run_id, name), key=lambda point: point.step)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_values_steps_and_bad_points(server: Server, tmp_path: Path) -> None:
    run_id = new_run(server, "values")
    metrics = pickle.loads(pickle.dumps(MetricLogger(run_id, server.uri, str(tmp_path))))
    metrics.log({"loss": 2.5, "visual_tokens/clip/kept_1": 48, "flag": True}, step=1)
    metrics.log({"loss": math.nan, "bad name?": 1.0, "text": "no number"}, step=2)  # type: ignore[dict-item]
    metrics.log({"loss": math.inf, "many": 7}, step=3)
    for step in range(2500):
        metrics.log({"long": step / 2}, step)
    before = time.monotonic()
    report = metrics.close(60)
    assert time.monotonic() - before < 30, "close ends with the last point, not with its deadline"
    loss = history(server, run_id, "loss")
    assert [point.step for point in loss] == [1, 2, 3]
    assert loss[0].value == 2.5
    assert math.isnan(loss[1].value)
    assert loss[2].value > 1e300  # MLflow stores infinity as the largest float
    assert [point.value for point in history(server, run_id, "flag")] == [1.0]
    assert [point.value for point in history(server, run_id, "long")] == [step / 2 for step in range(2500)]
    assert (report.delivered, report.undelivered) == (2506, 1)
    assert report.file is not None
    assert json.loads(report.file.read_text())["name"] == "bad name?"
    metrics.log({"late": 1.0}, 4)
    assert metrics.pending == 0


def test_an_unused_logger_starts_nothing(tmp_path: Path) -> None:
    report = MetricLogger("run", "http://127.0.0.1:9", str(tmp_path)).close(5)
    assert (report.delivered, report.undelivered, report.file) == (0, 0, None)
    assert list(tmp_path.iterdir()) == []


def test_system_metrics(server: Server, tmp_path: Path) -> None:
    run_id = new_run(server, "system")
    metrics = MetricLogger(run_id, server.uri, str(tmp_path))
    system = SystemMetrics(metrics, run_start_ms=time.time_ns() // 1_000_000 - 100_000, interval_s=1.2)
    system.start()
    time.sleep(1.5)
    system.stop()
    assert metrics.close(60).undelivered == 0
    memory = history(server, run_id, "system/system_memory_usage_percentage")
    assert len(memory) == 2
    assert all(100 <= point.step < 200 and 0 < point.value < 100 for point in memory)
    assert history(server, run_id, "system/cpu_utilization_percentage")


def test_nothing_is_lost_over_an_outage(server: Server, tmp_path: Path) -> None:
    """One logger outlasts the outage; another is closed in it, and its file is delivered afterwards, twice."""
    lasting_run, closed_run = new_run(server, "lasting"), new_run(server, "closed")
    lasting = MetricLogger(lasting_run, server.uri, str(tmp_path))
    closed = MetricLogger(closed_run, server.uri, str(tmp_path))
    for step in range(5):
        lasting.log({"loss": float(step)}, step)
    wait_for(lambda: lasting.pending == 0)

    server.kill()
    try:
        before = time.monotonic()
        for step in range(5, 30):
            lasting.log({"loss": float(step), "rate": 0.1}, step)
            closed.log({"loss": float(step)}, step)
        assert time.monotonic() - before < 2
        with pytest.raises(TrackingError):
            require_tracking(server.uri, timeout_s=5)
        report = closed.close(1)
        assert time.monotonic() - before < 20
        assert (report.delivered, report.undelivered) == (0, 25)
        assert report.file is not None
        assert report.file.parent == tmp_path
        assert lasting.pending == 50
        last_call_ms = time.time_ns() // 1_000_000
    finally:
        server.start()

    report_of_lasting = lasting.close(60)
    assert (report_of_lasting.delivered, report_of_lasting.undelivered) == (55, 0)
    points = history(server, lasting_run, "loss")
    assert [(point.step, point.value) for point in points] == [(step, float(step)) for step in range(30)]
    assert all(point.timestamp <= last_call_ms for point in points), "the time is that of the call"

    assert history(server, closed_run, "loss") == []
    for _ in range(2):
        assert deliver_file(report.file, server.uri) == (25, 0)
        assert [point.step for point in history(server, closed_run, "loss")] == list(range(5, 30))


def test_a_foreign_file_is_refused_by_line(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "points.jsonl"
    path.write_text('{"run_id": "r", "name": "a", "value": 1, "time_ms": 1, "step": 1}\n{"name": "b"}\n')
    with pytest.raises(ValueError, match=r"points\.jsonl, line 2"):
        deliver_file(path, server.uri)
