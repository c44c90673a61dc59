"""The driver's side of the MLflow run of a training: opened once, and told everything, whether MLflow is there or not.

What the driver logs goes to the run's outbox in storage first; a thread opens the run and empties the outbox as soon as
MLflow takes it, and `deliver`, at the end, insists. Nobody else creates the run. Its id is written to `run.json`, where
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
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines.io import storage
from pipelines.io.run_folder import RunFolder
from pipelines.tracking.delivery import deliver_outbox
from pipelines.tracking.metric_points import (
    MetricPoint,
    unique_name,
    write_points,
)
from pipelines.tracking.mlflow_run import MlflowRun, RunRequest, document, open_run
from pipelines.tracking.server import (
    TrackingAwayError,
    TrackingError,
    call_mlflow,
    limit_http_waits,
    require_tracking,
)

logger = logging.getLogger(__name__)

RETRY_EVERY_S = 5.0


class RunTracker:
    """The MLflow run of one training, on the driver.

    Args:
        uri: of the tracking server.
        run_url: folder of the run in storage.
        request: what the run is opened with.
        run_id: of the run, where an earlier start has opened it.
        store_run_id: is called with the id when the run is open; writes it to `run.json`.
        retry_s: seconds for which `open` and `deliver` outlast an absent server, for each call.
    """

    def __init__(
        self,
        uri: str,
        run_url: str,
        request: RunRequest,
        *,
        run_id: str | None,
        store_run_id: Callable[[str], None],
        retry_s: float,
    ) -> None:
        self.uri = uri
        self.run_url = run_url
        self.run_id = run_id
        self._request = request
        self._store_run_id = store_run_id
        self._retry_s = retry_s
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
            return self._open(self._retry_s).run_id

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

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        """Metric points, delivered by `deliver`; those whose metric and step the run has are left out there."""
        if points:
            write_points(RunFolder(self.run_url).outbox_points, points)

    def deliver(self) -> MlflowRun:
        """Deliver everything that is in the outbox, points included; the run.

        Raises:
            TrackingAwayError: an absent server; says how much MLflow lacks and where that is.
            TrackingError: what MLflow refuses.
        """
        try:
            with self._lock:
                return self._deliver(self._retry_s)
        except TrackingAwayError as error:
            files = storage.list_files(RunFolder(self.run_url).outbox)
            raise TrackingAwayError(
                f"{error}. MLflow lacks {len(files)} files of records, which are kept in "
                f"{RunFolder(self.run_url).outbox}"
            ) from error

    def finish(self) -> None:
        """Deliver everything and close the run as FINISHED. Raises as `deliver`."""
        run = self.deliver()
        self.stop()
        run.finish()

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
            self._deliver(0).finish("FAILED")
        except ValueError as error:  # TrackingError, StorageError
            logger.warning("the run is not marked as FAILED in MLflow: %s", error)
        finally:
            self._lock.release()

    def stop(self) -> None:
        """End the thread, without waiting for a request that is under way."""
        self._stopped.set()
        self._wake.set()

    # All below: with the lock held.

    def _open(self, retry_s: float) -> MlflowRun:
        if not self._opened or self.run_id is None:
            opened = open_run(self.uri, self._request, run_id=self.run_id, retry_s=retry_s)
            self.run_id = opened.run_id
            self._store_run_id(self.run_id)
            self._opened = True
        return MlflowRun(self.uri, self.run_id, retry_s)

    def _deliver(self, retry_s: float) -> MlflowRun:
        run = self._open(retry_s)
        self._deliver_artifacts(run)
        call_mlflow("metric points", lambda: deliver_outbox(run.uri, run.run_id, self.run_url), retry_s)
        return run

    def _deliver_artifacts(self, run: MlflowRun) -> None:
        root = RunFolder(self.run_url).outbox_artifacts
        for part, names in groupby(storage.list_files(root), key=lambda name: name.split("/", 1)[0]):
            with tempfile.TemporaryDirectory(prefix="meteor-outbox-") as folder:
                urls = []
                for name in names:
                    path = Path(folder) / name.removeprefix(f"{part}/")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    urls.append(storage.join(root, name))
                    path.write_bytes(storage.read_bytes(urls[-1]))
                run.log_files(Path(folder))
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
                    self._deliver_artifacts(self._open(0))
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
