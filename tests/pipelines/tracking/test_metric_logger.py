"""Metrics arrive whatever happens to the server or to the process, once, with the time of the call; nobody waits."""

from __future__ import annotations

import json
import math
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from pipelines.io import storage
from pipelines.io.run_folder import RunFolder
from pipelines.tracking import metric_logger as metric_log
from pipelines.tracking.delivery import Sent, deliver_outbox, send
from pipelines.tracking.metric_logger import MetricLogger
from pipelines.tracking.metric_points import MetricPoint, points_from_jsonl, points_to_jsonl
from pipelines.tracking.mlflow_run import RunRequest, open_run
from pipelines.tracking.server import TrackingAwayError, is_passing, require_tracking
from pipelines.tracking.system_metrics import SystemMetrics
from tests.pipelines.mlflow_fixture import Server, answering, free_port

pytestmark = pytest.mark.stack

DEAD = "http://127.0.0.1:9"


def new_run(server: Server, name: str) -> str:
    return open_run(server.uri, RunRequest("metrics", name)).run_id


def history(server: Server, run_id: str, name: str) -> list[Metric]:
    return sorted(MlflowClient(server.uri).get_metric_history(run_id, name), key=lambda point: point.step)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_values_steps_and_bad_points(server: Server, tmp_path: Path) -> None:
    run_id = new_run(server, "values")
    metrics = pickle.loads(pickle.dumps(MetricLogger(run_id, server.uri, str(tmp_path))))
    metrics.log({"loss": 2.5, "visual_tokens/clip/kept_1": 48, "flag": True}, step=1)
    metrics.log({"loss": math.nan, "bad name?": 1.0, "text": "no number"}, step=2)
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
    assert (report.delivered, report.repeated, report.refused, report.undelivered) == (2506, 0, 1, 0)
    (refused,) = (tmp_path / "outbox" / "refused-points").iterdir()
    assert json.loads(refused.read_text())["name"] == "bad name?"
    metrics.log({"late": 1.0}, 4)
    assert metrics.pending_points() == []


def test_an_unused_logger_starts_nothing(tmp_path: Path) -> None:
    report = MetricLogger("run", DEAD, str(tmp_path)).close(5)
    assert (report.delivered, report.undelivered, report.kept) == (0, 0, True)
    assert list(tmp_path.iterdir()) == []


def test_points_keep_every_bit_as_text_and_other_lines_are_named() -> None:
    points = [MetricPoint("a/b", value, 2**41, step) for step, value in enumerate((0.1 + 0.2, 5e-324, math.inf, -0.0))]
    assert points_from_jsonl(points_to_jsonl(points), "here") == points
    (nan,) = points_from_jsonl(points_to_jsonl([MetricPoint("x", math.nan, 1, 1)]), "here")
    assert math.isnan(nan.value)
    with pytest.raises(ValueError, match=r"here, line 2 holds no metric point: "):
        points_from_jsonl(points_to_jsonl(points[:1]) + '{"name": "b"}\n', "here")


def test_system_metrics(server: Server, tmp_path: Path) -> None:
    run_id = new_run(server, "system")
    metrics = MetricLogger(run_id, server.uri, str(tmp_path))
    system = SystemMetrics(metrics, run_start_ms=time.time_ns() // 1_000_000 - 100_000, interval_s=1.2)
    system.start()
    time.sleep(2.3)
    system.stop()
    assert metrics.close(60).undelivered == 0
    memory = history(server, run_id, "system/system_memory_usage_percentage")
    assert len(memory) == 2
    assert all(100 <= point.step < 200 and 0 < point.value < 100 for point in memory)
    assert history(server, run_id, "system/cpu_utilization_percentage")


def test_every_point_comes_once_over_an_outage(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is killed in a stream of points and started again.

    One logger outlasts that; another is closed in it, and the outbox is delivered afterwards.
    """
    monkeypatch.setattr(metric_log, "KEEP_EVERY_S", 0.0)
    lasting_run, closed_run = new_run(server, "lasting"), new_run(server, "closed")
    lasting_url, closed_url = str(tmp_path / "lasting"), str(tmp_path / "closed")
    lasting = MetricLogger(lasting_run, server.uri, lasting_url)
    closed = MetricLogger(closed_run, server.uri, closed_url)
    slowest = 0.0
    for step in range(300):
        if step == 100:
            wait_for(lambda: len(lasting.pending_points()) < 100)
        if step == 110:
            server.kill()  # with points of the steps before it on their way
        before = time.monotonic()
        lasting.log({"loss": float(step), "rate": 0.1}, step)
        slowest = max(slowest, time.monotonic() - before)
        if step >= 200:
            closed.log({"loss": float(step)}, step)
        time.sleep(0.002)
    try:
        assert slowest < 0.5, "log waits for nobody"
        with pytest.raises(TrackingAwayError):
            require_tracking(server.uri, timeout_s=5)
        before = time.monotonic()
        report = closed.close(8)
        assert time.monotonic() - before < 15
        assert (report.delivered, report.undelivered, report.kept) == (0, 100, True)
        wait_for(lambda: storage.list_files(lasting_url), 20)  # what waits survives the process
        assert len(lasting.pending_points()) >= 2 * 190
        last_call_ms = time.time_ns() // 1_000_000
    finally:
        server.start()

    report = lasting.close(60)
    assert (report.delivered + report.repeated, report.undelivered) == (600, 0)
    points = history(server, lasting_run, "loss")
    assert [(point.step, point.value) for point in points] == [(step, float(step)) for step in range(300)]
    assert len(history(server, lasting_run, "rate")) == 300
    assert all(point.timestamp <= last_call_ms for point in points), "the time is that of the call"
    assert storage.list_files(lasting_url) == [], "what was kept and delivered is removed"

    assert history(server, closed_run, "loss") == []
    assert deliver_outbox(server.uri, closed_run, closed_url) == Sent(100, 0, ())
    assert [point.step for point in history(server, closed_run, "loss")] == list(range(200, 300))
    assert storage.list_files(closed_url) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines.tracking.metric_logger import MetricLogger
from pipelines.tracking.metric_points import points_to_jsonl
run_id, uri, run_url, checkpoint = sys.argv[1:]
metrics = MetricLogger(run_id, uri, run_url)
for step in range(1, 41):
    metrics.log({"loss": 1 / step, "speed": 100.0 + step}, step)
    if step == 30:
        Path(checkpoint).write_text(points_to_jsonl(metrics.pending_points()))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_points_of_a_killed_process_come_from_its_checkpoint_and_replayed_steps_once(
    server: Server, tmp_path: Path
) -> None:
    """Killed at step 40 with a checkpoint of step 30, the server away; steps 1 to 4 and 35 reached it otherwise.

    The resumed process makes 31 to 50, at another speed.
    """
    run_id, checkpoint = new_run(server, "killed"), tmp_path / "metrics.jsonl"
    arguments = [run_id, f"http://127.0.0.1:{free_port()}", str(tmp_path / "run"), str(checkpoint)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    pending = points_from_jsonl(checkpoint.read_text(), "checkpoint")
    assert [point.step for point in pending if point.name == "loss"] == list(range(1, 31))
    reached = [*pending[:8], MetricPoint("loss", 1 / 35, pending[-1].time_ms + 1, 35)]
    MetricLogger(run_id, server.uri, str(tmp_path), initial=reached).close(30)
    assert len(history(server, run_id, "loss")) == 5

    resumed = MetricLogger(run_id, server.uri, str(tmp_path), initial=pending)
    for step in range(31, 51):
        resumed.log({"loss": 1 / step, "speed": 7.0}, step)
    report = resumed.close(30)
    assert (report.delivered, report.repeated, report.undelivered) == (100 - 9, 9, 0)
    loss = history(server, run_id, "loss")
    assert [(point.step, point.value) for point in loss] == [(step, 1 / step) for step in range(1, 51)]
    assert [point.timestamp for point in loss[:30]] == [point.time_ms for point in pending if point.name == "loss"]
    assert [point.value for point in history(server, run_id, "speed")] == [100.0 + s for s in range(1, 31)] + [7.0] * 20


def test_equal_points_collapse_in_mlflow(server: Server) -> None:
    """What a batch whose answer was lost relies on; equal values of another time do not collapse."""
    run_id, client = new_run(server, "equal"), MlflowClient(server.uri)
    for points in ([(1, 1), (1, 2)], [(1, 2), (1, 3)], [(2, 3)]):
        send(client, run_id, [MetricPoint("loss", 0.5, time_ms, step) for time_ms, step in points])
    assert [(point.step, point.timestamp) for point in history(server, run_id, "loss")] == [
        (1, 1),
        (2, 1),
        (3, 1),
        (3, 2),
    ]


def test_a_logger_learns_its_run_from_storage(server: Server, tmp_path: Path) -> None:
    """The driver opens the run later than the workers start."""
    metrics = MetricLogger(None, server.uri, str(tmp_path))
    metrics.log({"loss": 1.0}, 1)
    storage.write_json(RunFolder(str(tmp_path)).record, {"mlflow_run_id": None})
    time.sleep(0.6)
    assert len(metrics.pending_points()) == 1
    run_id = new_run(server, "later")
    storage.write_json(RunFolder(str(tmp_path)).record, {"mlflow_run_id": run_id})
    assert metrics.close(30).delivered == 1
    assert [point.step for point in history(server, run_id, "loss")] == [1]


OF_DATABASE = (
    "(psycopg2.InterfaceError) connection already closed (Background on this error at: https://sqlalche.me/e/20/rvf5)"
)


@pytest.mark.parametrize(
    ("status", "body", "away"),
    [
        (500, "<html>no json</html>", True),
        (502, "", True),
        (503, json.dumps({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "database is locked"}), True),
        (500, json.dumps({"error_code": "INTERNAL_ERROR", "message": "x"}), True),
        (400, json.dumps({"error_code": "BAD_REQUEST", "message": OF_DATABASE}), True),
        (400, json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": "x"}), False),
    ],
)
def test_faults_of_the_server_are_no_refusals(
    monkeypatch: pytest.MonkeyPatch, status: int, body: str, away: bool
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    points = [MetricPoint("loss", 1.0, 1, 1), MetricPoint("loss", 1.0, 1, 2)]
    with answering(status, body) as uri:
        if away:
            with pytest.raises(MlflowException) as caught:
                send(MlflowClient(uri), "run", points)
            assert is_passing(caught.value)
        else:
            assert send(MlflowClient(uri), "run", points) == points
