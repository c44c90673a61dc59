"""When a trial is stopped before its end: where another that costs no more is better for certain.

Trials report what they were asked so far, value by value (NLL of the same questions in the same order; of a training
the losses of the same steps), lower is better. At one place of progress the differences are paired, so a few questions
tell; that the intervals are of groups keeps alike ones from counting twice. What is merely dearer or merely worse goes
on: it may be the best at its cost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from pipelines.evaluation.intervals import mean

PROGRESS = "progress"
"""Per cent of a trial that is done: where trials are compared."""
REPORT = "report"
"""Key of a trial's report in its result, as JSON."""
CONFIDENT_ON = 16
"""Values below which nothing is certain."""


@dataclass(frozen=True)
class Report:
    """What a trial says before its end.

    Attributes:
        cost: expected, per image.
        values: lower is better; those of two trials at one place of progress are of the same questions or steps.
        groups: of the values.
    """

    cost: float
    values: list[float]
    groups: list[str]

    def to_json(self) -> str:
        """As a trial reports it."""
        return json.dumps([self.cost, self.values, self.groups])

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What `to_json` gave."""
        return cls(*json.loads(text))


def dominated(report: Report, other: Report) -> bool:
    """Whether the other costs no more and its values are lower for certain (95 %, paired, over groups)."""
    if other.cost > report.cost or len(report.values) < CONFIDENT_ON or len(report.values) != len(other.values):
        return False
    return mean(np.array(report.values) - np.array(other.values), report.groups).low > 0


class StopDominated(FIFOScheduler):
    """Tune's scheduler: first come, first served, and an end for what is dominated.

    Args:
        spared: name of a trial that is compared and never stopped: the one that all are compared with in the end.
    """

    def __init__(self, spared: str) -> None:
        super().__init__()
        self._spared = spared
        self._reports: dict[float, list[Report]] = {}  # by progress

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Compare a trial's report with all that were made at the same place."""
        if REPORT not in result:
            return str(TrialScheduler.CONTINUE)
        report, there = Report.from_json(result[REPORT]), self._reports.setdefault(result[PROGRESS], [])
        stopped = trial.config["trial"] != self._spared and any(dominated(report, other) for other in there)
        there.append(report)
        return str(TrialScheduler.STOP if stopped else TrialScheduler.CONTINUE)
