"""What is known of each trial: one small JSON in storage, written when it starts and when it ends.

A sweep that was killed is put together from them: ended trials teach the study anew, started ones run again under the
same name with the same choices.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from meteor_model.configuration_meteor import PruningConfig
from pipelines.evaluation.scores import Score
from pipelines.io import codec, storage
from tune.folder import SweepFolder

DENSE = "dense"
"""The model without pruning, among the finalists."""
Status = Literal["started", "completed", "stopped", "failed"]
"""completed: scored on the whole suite. stopped: ended early by the scheduler. failed: with an error."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        id: PHASE-NUMBER.
        study: the phase that it belongs to: `tune.settings.SEARCH` or `FINAL`.
        choices: by name, as the sampler made them.
        pruning: what they come to (`PruningConfig` as a dictionary); after the trial with the lambda that was solved.
        ranks: of the estimator that was chosen, or None.
        status: see `Status`.
        of: of a finalist, the trial of the search that it was, or `DENSE`.
        objective: higher is better; of a stopped trial the last one that it reported.
        ms: per image, measured; None where it was not.
        score: `Score.to_dict`, of a completed trial.
        error: of a failed one.
        towers: image side of each tower that is kept; None: all at their own.
        maps: what became of the towers' maps (`pipelines.evaluation.tower_store`); None where none are kept.
        seconds: that it took.
        run_id: of its MLflow run, once it is logged there.
    """

    id: str
    study: str
    choices: dict[str, Any]
    pruning: dict[str, Any]
    ranks: dict[str, list[float]] | None
    status: Status = "started"
    of: str = ""
    objective: float | None = None
    score: dict[str, Any] | None = None
    ms: float | None = None
    error: str | None = None
    seconds: float | None = None
    run_id: str | None = None
    towers: dict[str, int] | None = None
    maps: dict[str, int] | None = None

    @property
    def scored(self) -> Score:
        """The score of a completed trial."""
        assert self.score is not None, f"trial {self.id} is {self.status}"
        return Score.from_dict(self.score, f"the record of trial {self.id}")

    @property
    def pruning_config(self) -> PruningConfig:
        """The pruning as settings."""
        return PruningConfig.from_dict(self.pruning)


class Records:
    """The trials of one sweep, in storage and here."""

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder
        files = [name for name in storage.list_files(folder.trials) if name.endswith(".json") and "/" not in name]
        loaded = [_load(folder.record(name.removesuffix(".json"))) for name in files]
        self._by_id = {record.id: record for record in loaded}

    def save(self, record: TrialRecord) -> None:
        """Keep a record, in place of what was known of its trial. Raises StorageError."""
        storage.write_json(self._folder.record(record.id), asdict(record))
        self._by_id[record.id] = record

    def update(self, trial_id: str, **changes: Any) -> TrialRecord:
        """Change and keep the record of a trial."""
        changed = replace(self._by_id[trial_id], **changes)
        self.save(changed)
        return changed

    def get(self, trial_id: str) -> TrialRecord:
        """The record of a trial that was started."""
        return self._by_id[trial_id]

    def of(self, study: str) -> list[TrialRecord]:
        """The trials of one study, by number."""
        return [record for record in self.all() if record.study == study]

    def all(self) -> list[TrialRecord]:
        """Every trial, by name."""
        return sorted(self._by_id.values(), key=lambda record: record.id)


def _load(url: str) -> TrialRecord:
    return codec.decode(TrialRecord, storage.read_bytes(url), url)


def training_name(sweep: str, trial_id: str) -> str:
    """Name of the run that a `finetune` trial trains."""
    return f"{sweep}-{trial_id}"
