"""The driver's side of the MLflow run of a training: opened once, and told everything, whether MLflow is there or not.

What the driver logs goes to the run's outbox in storage first; a thread opens the run and empties the outbox as soon as
MLflow takes it, and `settle`, at the end, insists. Nobody else creates the run. Its id is written to `run.json`, where
the workers' `MetricLogger` finds it.

    outbox/artifacts/{name}/...   files to be artifacts, under their path; names sort by time, the last of a path wins
    outbox/points/*.jsonl         metric points that a `MetricLogger` could not deliver
    outbox/refused-points/        points that MLflow will never take (a bad name); left there
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from pipelines.io import storage
from pipelines.io.run_folder import RunFolder
from pipelines.tracking.metric_logger import POINTS_PER_BATCH, Delivered, send
from pipelines.tracking.mlflow_run import (
    TrackingAwayError,
    TrackingError,
    document,
    finish_run,
    limit_http_waits,
    log_files,
    open_run,
    patiently,
    require_tracking,
)
from pipelines.tracking.points import (
    Point,
    keep_points,
    points_from_jsonl,
    unique_name,
)

logger = logging.getLogger(__name__)

RETRY_EVERY_S = 5.0


@dataclass(frozen=True)
class RunRequest:
    """What the MLflow run of a training is opened with; see `pipelines.tracking.mlflow_run.open_run`."""

    experiment: str
    run_name: str
    settings: Mapping[str, Any]
    tags: Mapping[str, str]
    documents: Mapping[str, Any]
    training_id: str
    started_ms: int


class Tracker:
    """The MLflow run of one training, on the driver.

    Args:
        uri: of the tracking server.
        run_url: folder of the run in storage.
        request: what the run is opened with.
        run_id: of the run, where an earlier start has opened it.
        store_run_id: is called with the id when the run is open; writes it to `run.json`.
        patience_s: seconds for which `open` and `settle` outlast an absent server, for each call.
    """

    def __init__(
        self,
        uri: str,
        run_url: str,
        request: RunRequest,
        *,
        run_id: str | None,
        store_run_id: Callable[[str], None],
        patience_s: float,
    ) -> None:
        self.uri = uri
        self.run_url = run_url
        self.run_id = run_id
        self._request = request
        self._store_run_id = store_run_id
        self._patience_s = patience_s
        self._opened = False
        limit_http_waits()
        self._lock = threading.Lock()  # one at a time opens the run and empties the outbox
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> str:
        """Open the run; its id.

        Raises:
            TrackingAwayError: an absent server.
            TrackingError: a run or experiment that cannot be used.
        """
        with self._lock:
            return self._open(self._patience_s)

    def start(self) -> None:
        """Let a thread open the run and empty the outbox, as soon as MLflow is there."""
        self._wake.set()
        self._thread = threading.Thread(target=self._deliver_when_possible, name="tracker", daemon=True)
        self._thread.start()

    def log_documents(self, documents: Mapping[str, Any]) -> None:
        """Plain data as JSON artifacts: file name -> what `tracking.document` takes. Raises StorageError."""
        self._keep({name: document(content) for name, content in documents.items()})

    def log_files(self, folder: Path, artifact_path: str) -> None:
        """Every file of a local folder, as artifacts under `artifact_path`. Raises StorageError."""
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self._keep({f"{artifact_path}/{path.relative_to(folder).as_posix()}": path.read_bytes() for path in paths})

    def log_points(self, points: Sequence[Point]) -> None:
        """Metric points, delivered by `settle`; those whose metric and step the run has are left out there."""
        if points:
            keep_points(RunFolder(self.run_url).outbox_points, points)

    def settle(self) -> str:
        """Deliver everything that is in the outbox, points included; the run's id.

        Raises:
            TrackingAwayError: an absent server; says how much MLflow lacks and where that is.
            TrackingError: what MLflow refuses.
        """
        try:
            with self._lock:
                return self._settle(self._patience_s)
        except TrackingAwayError as error:
            files = storage.list_files(RunFolder(self.run_url).outbox)
            raise TrackingAwayError(
                f"{error}. MLflow lacks {len(files)} files of records, which are kept in "
                f"{RunFolder(self.run_url).outbox}"
            ) from error

    def finish(self) -> None:
        """Deliver everything and close the run as FINISHED. Raises as `settle`."""
        run_id = self.settle()
        self.stop()
        finish_run(self.uri, run_id, patience_s=self._patience_s)

    def fail(self) -> None:
        """Deliver what can be delivered at once and close the run as FAILED.

        Where MLflow is away, only say so: what ended the training must be the error that is seen.
        """
        self.stop()
        if not self._lock.acquire(timeout=1):
            logger.warning("MLflow does not answer: the run is not marked as FAILED there")
            return
        try:
            require_tracking(self.uri, timeout_s=5)
            finish_run(self.uri, self._settle(0), "FAILED", patience_s=0)
        except ValueError as error:  # TrackingError, StorageError
            logger.warning("the run is not marked as FAILED in MLflow: %s", error)
        finally:
            self._lock.release()

    def stop(self) -> None:
        """End the thread, without waiting for a request that is under way."""
        self._stopped.set()
        self._wake.set()

    # All below: with the lock held.

    def _open(self, patience_s: float) -> str:
        if not self._opened or self.run_id is None:
            request = self._request
            self.run_id = open_run(
                self.uri,
                experiment=request.experiment,
                run_name=request.run_name,
                settings=request.settings,
                tags=request.tags,
                documents=request.documents,
                run_id=self.run_id,
                training_id=request.training_id,
                started_ms=request.started_ms,
                patience_s=patience_s,
            )
            self._store_run_id(self.run_id)
            self._opened = True
        return self.run_id

    def _settle(self, patience_s: float) -> str:
        run_id = self._open(patience_s)
        self._deliver_artifacts(run_id, patience_s)
        patiently("metric points", lambda: deliver_points(self.uri, run_id, self.run_url), patience_s)
        return run_id

    def _deliver_artifacts(self, run_id: str, patience_s: float) -> None:
        root = RunFolder(self.run_url).outbox_artifacts
        for part, names in groupby(storage.list_files(root), key=lambda name: name.split("/", 1)[0]):
            with tempfile.TemporaryDirectory(prefix="meteor-outbox-") as folder:
                urls = []
                for name in names:
                    path = Path(folder) / name.removeprefix(f"{part}/")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    urls.append(storage.join(root, name))
                    path.write_bytes(storage.read_bytes(urls[-1]))
                log_files(self.uri, run_id, Path(folder), patience_s=patience_s)
            for url in urls:
                storage.delete(url)

    def _keep(self, files: Mapping[str, bytes]) -> None:
        """Needs no lock: every call writes to a folder of its own."""
        root = storage.join(RunFolder(self.run_url).outbox_artifacts, unique_name())
        for name, data in files.items():
            storage.write_bytes(storage.join(root, name), data)
        self._wake.set()

    def _deliver_when_possible(self) -> None:
        """The thread. Delivers no points: those of a worker that died may be made again and must not come twice."""
        away = False
        while True:
            self._wake.wait(RETRY_EVERY_S if away else None)
            self._wake.clear()
            if self._stopped.is_set():
                return
            try:
                with self._lock:
                    self._deliver_artifacts(self._open(0), 0)
                if away:
                    logger.warning("MLflow is there; the run's records are delivered")
                away = False
            except (TrackingAwayError, storage.StorageError) as error:
                if not away:
                    logger.warning("MLflow takes no records of the run (%s); they are kept and sent later", error)
                away = True
            except TrackingError as error:
                logger.error("the run's records are kept, and the end of the run will fail: %s", error)
                return


def deliver_points(uri: str, run_id: str, run_url: str) -> tuple[int, int]:
    """Deliver the metric points in a run's outbox; (delivered, refused). Those that the run has are left out.

    Raises:
        MlflowException and requests' errors: when the server is away; what was delivered is out of the outbox.
        ValueError: a file that holds something else.
    """
    client = MlflowClient(uri)
    known = Delivered(client, run_id)
    delivered, refused = 0, 0
    root = RunFolder(run_url).outbox_points
    for name in storage.list_files(root):
        url = storage.join(root, name)
        points = known.fresh(points_from_jsonl(storage.read_bytes(url).decode(), url))
        for start in range(0, len(points), POINTS_PER_BATCH):
            batch = points[start : start + POINTS_PER_BATCH]
            bad = send(client, run_id, batch)
            if bad:
                keep_points(RunFolder(run_url).outbox_refused, bad)
            known.add(batch)
            delivered, refused = delivered + len(batch) - len(bad), refused + len(bad)
        storage.delete(url)
    return delivered, refused
