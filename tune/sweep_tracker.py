"""A sweep in MLflow: one run, and under it one run for each trial that ended.

A trial is told to MLflow when it ends, and at the end of the sweep where MLflow was away. Its run is found again by its
training id, so none is made twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.checkpoint.local import local_copy
from pipelines.io import storage
from pipelines.io.run_folder import run_folder
from pipelines.tracking.mlflow_run import RunRequest, open_run
from pipelines.tracking.server import TrackingError
from tune.folder import SweepFolder
from tune.records import Records, TrialRecord, training_name
from tune.settings import SweepSettings

logger = logging.getLogger(__name__)

PARENT_TAG = "mlflow.parentRunId"
SHORT_S = 5.0
"""Patience with MLflow while trials are under way: the search waits for it."""


class SweepTracker:
    """The runs of one sweep.

    Args:
        settings: of the sweep.
        sweep: its name.
        folder: of the sweep.
        records: of its trials.
        run_id: of its run, where an earlier start has opened it.
        tags: of its run and those of its trials.
    """

    def __init__(
        self,
        settings: SweepSettings,
        sweep: str,
        folder: SweepFolder,
        records: Records,
        *,
        run_id: str | None,
        tags: Mapping[str, str],
    ) -> None:
        self._settings, self._sweep, self._folder, self._records = settings, sweep, folder, records
        self._tags = dict(tags)
        request = RunRequest(
            settings.tracking.experiment,
            sweep,
            settings.identity(),
            {"job": "sweep", **tags},
            {"sweep-settings.json": settings.identity()},
            training_id=sweep,
        )
        self._run = open_run(settings.tracking.uri, request, run_id=run_id, retry_s=settings.tracking.patience_s)
        self.run_id = self._run.run_id

    def ended(self, record: TrialRecord) -> None:
        """Tell MLflow of a trial that ended; where it is away, later."""
        try:
            self._deliver(record, SHORT_S)
        except TrackingError as error:
            logger.warning("trial %s is told to MLflow at the end of the sweep: %s", record.id, error)

    def deliver(self) -> None:
        """Tell MLflow of every trial that it lacks. Raises TrackingAwayError where it is still away."""
        for record in self._records.all():
            if record.status != "started" and record.run_id is None:
                self._deliver(record, self._settings.tracking.patience_s)

    def log(self, documents: Mapping[str, Any], metrics: Mapping[str, float], pictures: Path) -> None:
        """Results of the whole sweep: documents, numbers, and everything in a folder."""
        self._run.log_documents(documents)
        self._run.log_files(pictures, "pictures")
        self._run.log_metrics(metrics)

    def finish(self) -> None:
        """Close the sweep's run."""
        self._run.finish()

    def fail(self) -> None:
        """Close it as FAILED; where MLflow is away, only say so: what ended the sweep is the error to be seen."""
        try:
            replace(self._run, retry_s=SHORT_S).finish("FAILED")
        except TrackingError as error:
            logger.warning("the sweep's run is not marked as FAILED in MLflow: %s", error)

    def _deliver(self, record: TrialRecord, retry_s: float) -> None:
        request = RunRequest(
            self._settings.tracking.experiment,
            record.id,
            {"choices": record.choices, "pruning": record.pruning},
            {
                "job": "trial",
                PARENT_TAG: self.run_id,
                "study": record.study,
                **({"of": record.of} if record.of else {}),
                "status": record.status,
                **({"error": record.error[:500]} if record.error else {}),
                **self._training(record),
                **self._tags,
            },
            {"trial.json": {"ranks": record.ranks, "pruning": record.pruning, "score": record.score}},
            training_id=training_name(self._sweep, record.id),
        )
        run = open_run(self._settings.tracking.uri, request, retry_s=retry_s)
        run.log_metrics(_metrics(record))
        folder = self._folder.trial_pictures(record.id)
        if record.status == "completed" and storage.list_files(folder):
            with local_copy(folder) as pictures:
                run.log_files(pictures, "pictures")
        # A trial that the scheduler stopped did what it should.
        run.finish("FAILED" if record.status == "failed" else "FINISHED")
        self._records.update(record.id, run_id=run.run_id)

    def _training(self, record: TrialRecord) -> dict[str, str]:
        """Where the checkpoints of a trial that trained are; of a finalist those of its trial."""
        if self._settings.kind != "finetune":
            return {}
        sweep, _, trial = (record.of or record.id).rpartition("/")
        return {"run_url": run_folder(self._settings.storage, training_name(sweep or self._sweep, trial)).url}


def _metrics(record: TrialRecord) -> dict[str, float]:
    found: dict[str, float | None] = {
        "objective": record.objective,
        "seconds": record.seconds,
        "ms_per_image": record.ms,
    }
    if record.score is not None:
        found |= record.scored.numbers()
    return {name: value for name, value in found.items() if value is not None}
