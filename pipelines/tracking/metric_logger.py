"""Metrics to MLflow without ever stopping, slowing or failing what is measured.

`MetricLogger.log` puts points in memory and returns; a background thread delivers them in order, stamped with the time
of the call, and goes on trying while the server is away. A point leaves memory only once the server has taken its
batch, so an outage loses nothing; a batch that is sent twice is stored once (MLflow drops equal points).

While the server is away the thread also writes the points to the run's outbox in storage, every `KEEP_EVERY_S`, and
`close` writes what is left: the driver delivers the outbox at the end of the run (`pipelines.tracking.run_tracker`). A
checkpoint holds `pending_points`, and the logger of the next start begins with them.

A resumed training makes the steps after its checkpoint again. One value per metric and step is stored, the one that
reached the server first: a new logger asks once which steps of a metric the run has and leaves those out
(`pipelines.tracking.delivery.LoggedSteps`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from pipelines.io import storage
from pipelines.io.redact import redact_text
from pipelines.io.retry import Backoff
from pipelines.io.run_folder import RunFolder
from pipelines.tracking.metric_points import POINTS_PER_BATCH, MetricPoint, write_points

if TYPE_CHECKING:
    from pipelines.tracking.delivery import Sent

logger = logging.getLogger(__name__)

GATHER_S = 0.5
BACKOFF = Backoff(first_s=0.5, longest_s=10.0)
KEEP_EVERY_S = 30.0


class NoRunYetError(ValueError):
    """The driver has not opened the MLflow run: the server has been away since the start."""


@dataclass(frozen=True)
class Delivery:
    """What `MetricLogger.close` can say about the points it was given."""

    delivered: int
    """Taken by the server."""
    repeated: int
    """Left out: the run had a value of that metric and step."""
    refused: int
    """Refused by the server for what they are, for example for a bad name."""
    undelivered: int
    """Kept in the run's outbox, or lost where storage was away, too (`kept` is False)."""
    kept: bool
    """Whether all that was refused or undelivered is in the outbox."""


class MetricLogger:
    """Delivers the metrics of one run. Cheap to make and to pickle: the thread starts at the first `log`.

    Args:
        run_id: of the MLflow run; None asks `run.json` for it until the driver has opened the run.
        uri: of the tracking server.
        run_url: folder of the run in storage.
        initial: points to deliver first, in their order: the `pending_points` of the checkpoint that is resumed from.
    """

    def __init__(self, run_id: str | None, uri: str, run_url: str, initial: Sequence[MetricPoint] = ()) -> None:
        self.run_id = run_id
        self.uri = uri
        self.run_url = run_url
        self._points: deque[MetricPoint] = deque(initial)
        self._refused: list[MetricPoint] = []
        self._delivered = 0
        self._repeated = 0
        self._kept = 0  # the first points of the queue that are in the outbox, in `_kept_files`
        self._kept_files: list[str] = []
        self._kept_at = 0.0
        self._changed = threading.Condition()  # guards everything above and below
        self._closing = False
        self._given_up = False
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        assert not self._points, "a logger with undelivered points must not be pickled: they would be sent twice"
        return MetricLogger, (self.run_id, self.uri, self.run_url)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Take the metrics of one step. Never waits for the server, never raises; non-finite values go as they are."""
        now_ms = time.time_ns() // 1_000_000
        points = []
        for name, value in metrics.items():
            try:
                points.append(MetricPoint(name, float(value), now_ms, int(step)))
            except (TypeError, ValueError):
                logger.warning("metric %s at step %s is no number: %.80r; left out", name, step, value)
        with self._changed:
            if self._closing:
                logger.warning("%d metrics came after the logger was closed; left out", len(points))
                return
            self._points.extend(points)
            self._start()
            self._changed.notify_all()

    def pending_points(self) -> list[MetricPoint]:
        """Points that the server has not taken yet, oldest first, for a checkpoint. Waits for nobody."""
        with self._changed:
            return list(self._points)

    def close(self, deadline_s: float = 15.0) -> Delivery:
        """Deliver what is left, for at most `deadline_s` seconds; never raises.

        With one last attempt where the server is away; the rest goes to the run's outbox.
        """
        with self._changed:
            self._closing = True
            if self._points:
                self._start()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(deadline_s)
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
            undelivered, to_keep = len(self._points), list(islice(self._points, self._kept, None))
            refused, self._refused = self._refused, []
            self._points.clear()
        kept = _try_to_keep(RunFolder(self.run_url).outbox_refused, refused) is not None if refused else True
        if to_keep:
            kept = _try_to_keep(RunFolder(self.run_url).outbox_points, to_keep) is not None and kept
        if undelivered and kept:
            logger.warning(
                "%d metric points did not reach MLflow yet; they are kept with the run, which delivers them at its end",
                undelivered,
            )
        elif not kept:
            logger.error(
                "MLflow and storage are away: of %d undelivered metric points those after the last checkpoint are lost",
                undelivered + len(refused),
            )
        return Delivery(self._delivered, self._repeated, len(refused), undelivered, kept)

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._deliver_all, name="metric-logger", daemon=True)
            self._thread.start()

    def _deliver_all(self) -> None:
        """The thread: batch by batch, oldest first, until closed and empty or without a server, or given up."""
        # Here: every rank holds a logger and one of them logs; MLflow costs a process 0.8 s of CPU and 38 MB.
        from pipelines.tracking.delivery import FAULTS, LoggedSteps, deliver

        known: LoggedSteps | None = None
        failures = 0
        while not self._given_up:
            batch = self._next_batch()
            if not batch:
                return
            try:
                known = known or LoggedSteps(self.uri, self._find_run())
                sent = deliver(known, batch)
            except FAULTS as error:
                if not failures:
                    shown = redact_text(str(error))[:200]
                    logger.warning("MLflow takes no metrics (%s); they are kept and sent later", shown)
                failures += 1
                if self._closing:
                    return
                self._keep()
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, BACKOFF.pause_s(failures))
                continue
            if failures:
                logger.warning("MLflow takes metrics again; %d points wait", len(self.pending_points()))
                failures = 0
            self._took(len(batch), sent)

    def _find_run(self) -> str:
        """The run's id, from `run.json` where the driver had not opened the run when this logger was made."""
        if self.run_id is None:
            self.run_id = storage.read_json(RunFolder(self.run_url).record)["mlflow_run_id"]
        if self.run_id is None:
            raise NoRunYetError("the run is not open yet")
        return self.run_id

    def _next_batch(self) -> list[MetricPoint]:
        """The oldest points, which stay in the queue.

        Waits for some, and for those of the same moment to come along. Empty once closed and all delivered.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._points or self._closing)
            self._changed.wait_for(lambda: len(self._points) >= POINTS_PER_BATCH or self._closing, GATHER_S)
            return list(islice(self._points, POINTS_PER_BATCH))

    def _took(self, points: int, sent: Sent) -> None:
        """Let go of the first `points` of the queue."""
        with self._changed:
            if self._given_up:
                return
            for _ in range(points):
                self._points.popleft()
            self._refused += sent.refused
            self._delivered += sent.delivered
            self._repeated += sent.repeated
            self._kept = max(0, self._kept - points)
            emptied, self._kept_files = (self._kept_files, []) if not self._kept else ([], self._kept_files)
        for url in emptied:
            try:
                storage.delete(url)
            except storage.StorageError as error:  # harmless: the driver leaves out what the run has
                logger.warning("%s was delivered but cannot be removed: %s", url, error)

    def _keep(self) -> None:
        """Write the points of the last KEEP_EVERY_S to the outbox, where they survive this process."""
        if time.monotonic() - self._kept_at < KEEP_EVERY_S:
            return
        self._kept_at = time.monotonic()
        with self._changed:
            points = list(islice(self._points, self._kept, None))
        url = _try_to_keep(RunFolder(self.run_url).outbox_points, points) if points else None
        if url is not None:
            with self._changed:
                self._kept += len(points)
                self._kept_files.append(url)


def _try_to_keep(folder: str, points: Sequence[MetricPoint]) -> str | None:
    try:
        return write_points(folder, points)
    except storage.StorageError as error:
        logger.warning("%d metric points cannot be written to the run's outbox: %s", len(points), error)
        return None
