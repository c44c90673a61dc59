"""A sweep in MLflow: one run, and under it one run for each trial that ended.

A trial is told to MLflow when it ends, and at the end of the sweep where MLflow was away. Its run is found again by its
training id, so none is made twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric

from pipelines.checkpoint.local import local_copy
from pipelines.io import storage
from pipelines.io.run_folder import run_folder
from pipelines.job.answers import PICTURES_FOLDER
from pipelines.tracking.mlflow_run import (
    TrackingError,
    finish_run,
    log_documents,
    log_files,
    open_run,
    patiently,
)
from tune.records import Records, TrialRecord, folder_of, training_name
from tune.settings import SweepSettings

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
SHORT_S = 5.0
"""Patience with MLflow while trials are under way: the search waits for it."""


class Logbook:
    """The runs of one sweep.

    Args:
        settings: of the sweep.
        sweep: its name.
        url: its folder in storage.
        records: of its trials.
        run_id: of its run, where an earlier start has opened it.
        tags: of its run and those of its trials.
    """

    def __init__(
        self,
        settings: SweepSettings,
        sweep: str,
        url: str,
        records: Records,
        *,
        run_id: str | None,
        tags: Mapping[str, str],
    ) -> None:
        self._settings, self._sweep, self._url, self._records = settings, sweep, url, records
        self._tags = dict(tags)
        self.run_id = open_run(
            settings.tracking.uri,
            experiment=settings.tracking.experiment,
            run_name=sweep,
            settings=settings.identity(),
            tags={"job": "sweep", **tags},
            documents={"sweep-settings.json": settings.identity()},
            run_id=run_id,
            training_id=sweep,
            patience_s=settings.tracking.patience_s,
        )

    def ended(self, record: TrialRecord) -> None:
        """Tell MLflow of a trial that ended; where it is away, later."""
        try:
            self._deliver(record, SHORT_S)
        except TrackingError as error:
            logger.warning("trial %s is told to MLflow at the end of the sweep: %s", record.id, error)

    def settle(self) -> None:
        """Tell MLflow of every trial that it lacks. Raises TrackingAwayError where it is still away."""
        for record in self._records.all():
            if record.status != "started" and record.run_id is None:
                self._deliver(record, self._settings.tracking.patience_s)

    def log(self, documents: Mapping[str, Any], metrics: Mapping[str, float], pictures: Path) -> None:
        """Results of the whole sweep: documents, numbers, and everything in a folder."""
        uri, patience_s = self._settings.tracking.uri, self._settings.tracking.patience_s
        log_documents(uri, self.run_id, documents, patience_s)
        log_files(uri, self.run_id, pictures, "pictures", patience_s)
        self._log_metrics(self.run_id, metrics, patience_s)

    def finish(self) -> None:
        """Close the sweep's run."""
        finish_run(self._settings.tracking.uri, self.run_id, patience_s=self._settings.tracking.patience_s)

    def fail(self) -> None:
        """Close it as FAILED; where MLflow is away, only say so: what ended the sweep is the error to be seen."""
        try:
            finish_run(self._settings.tracking.uri, self.run_id, "FAILED", SHORT_S)
        except TrackingError as error:
            logger.warning("the sweep's run is not marked as FAILED in MLflow: %s", error)

    def _deliver(self, record: TrialRecord, patience_s: float) -> None:
        uri = self._settings.tracking.uri
        run_id = open_run(
            uri,
            experiment=self._settings.tracking.experiment,
            run_name=record.id,
            settings={"choices": record.choices, "pruning": record.pruning},
            tags={
                "job": "trial",
                PARENT_TAG: self.run_id,
                "study": record.study,
                "status": record.status,
                **({"error": record.error[:500]} if record.error else {}),
                **self._training(record),
                **self._tags,
            },
            documents={"trial.json": {"ranks": record.ranks, "pruning": record.pruning, "score": record.score}},
            training_id=training_name(self._sweep, record.id),
            patience_s=patience_s,
        )
        self._log_metrics(run_id, _metrics(record), patience_s)
        folder = storage.join(folder_of(self._url, record.id), PICTURES_FOLDER)
        if record.status == "completed" and storage.list_files(folder):
            with local_copy(folder) as pictures:
                log_files(uri, run_id, pictures, "pictures", patience_s)
        # A trial that the scheduler stopped did what it should.
        finish_run(uri, run_id, "FAILED" if record.status == "failed" else "FINISHED", patience_s)
        self._records.update(record.id, run_id=run_id)

    def _training(self, record: TrialRecord) -> dict[str, str]:
        """Where the checkpoints of a trial that trained are."""
        if self._settings.kind != "finetune":
            return {}
        return {"run_url": run_folder(self._settings.storage, training_name(self._sweep, record.id)).url}

    def _log_metrics(self, run_id: str, metrics: Mapping[str, float], patience_s: float) -> None:
        client, now = MlflowClient(self._settings.tracking.uri), time.time_ns() // 1_000_000
        entries = [Metric(name, float(value), now, 0) for name, value in metrics.items()]
        patiently(f"metrics of run {run_id}", partial(client.log_batch, run_id, metrics=entries), patience_s)


def _metrics(record: TrialRecord) -> dict[str, float]:
    found: dict[str, float | None] = {"objective": record.objective, "seconds": record.seconds}
    if record.score is not None:
        found |= record.scored.numbers()
    return {name: value for name, value in found.items() if value is not None}
