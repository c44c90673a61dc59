"""The searcher that Tune asks: an Optuna study over the space, which outlives the process that holds it.

The study itself is in memory; what it learnt from is in the records. A sweep that goes on makes the study anew:

1. ended trials are added with their results
2. trials that were under way run again, under the same names with the same choices
3. the rest is asked for

A configuration that is sure to be over its budget (by count of FLOPs) is told to the study and never run.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState, create_trial
from ray.tune.search import Searcher

from meteor_model.configuration_meteor import MeteorConfig
from pipelines.evaluation.scores import Score
from tune.records import Records, TrialRecord
from tune.settings import StudyPlan
from tune.space import Space, SpaceError

ATTEMPTS = 200
"""Configurations in a row that may be over the budget before a study says so."""
BUDGET = "budget"
Cost = Callable[[MeteorConfig], float]
Measure = Callable[[Score], float]


class StudySearch(Searcher):
    """Suggests the trials of one study and records how they end.

    Args:
        plan: of the study.
        space: of configurations.
        records: of the sweep.
        given: configurations: the trials of a "given" study.
        begin: choices that the first trials of another study take; what they lack is drawn.
        seed: of the sampler.
        expected_cost: of a configuration, known before it is run, in the budget's unit; None where it is bounded by the
            space already.
        measured_cost: of a score, in the budget's unit.
        ended: hears the record of every trial that ended.
    """

    def __init__(  # noqa: PLR0913 - the settings of a study, by name
        self,
        plan: StudyPlan,
        space: Space,
        records: Records,
        *,
        given: Sequence[MeteorConfig] = (),
        begin: Sequence[Mapping[str, Any]] = (),
        seed: int = 0,
        expected_cost: Cost | None = None,
        measured_cost: Measure = lambda score: score.kept_per_image,
        ended: Callable[[TrialRecord], None] = lambda record: None,
    ) -> None:
        super().__init__(metric="objective", mode="max")
        self.plan, self.space, self.records = plan, space, records
        self._expected_cost, self._measured_cost, self._ended = expected_cost, measured_cost, ended
        known = records.of(plan.name)
        self._total = len(given) if plan.sampler == "given" else plan.trials
        self._given, self._begin = given, begin
        self.study = new_study(plan, seed + len(known))
        for record in known:
            if record.status != "started" and plan.sampler != "given":
                self.study.add_trial(self._remembered(record))
        under_way = [record for record in known if record.status == "started"]
        self._again: Iterator[TrialRecord] = iter(under_way)
        self._number = len(known)
        self._live: dict[str, tuple[str, Trial | None]] = {}  # Tune's id -> ours, and Optuna's trial

    @property
    def left(self) -> int:
        """Trials that have not ended."""
        return self._total - sum(record.status != "started" for record in self.records.of(self.plan.name))

    # --------------------------------------------------------------------------------------------------- what Tune asks

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial, as its name and its configuration; FINISHED after the last one.

        Raises:
            SpaceError: where no configuration is found within the budget.
        """
        record = next(self._again, None)
        trial: Trial | None = None
        if record is not None:
            if self.plan.sampler != "given":
                self.study.enqueue_trial(record.choices)
                trial = self.study.ask()
                self.space.sample(trial)
        elif self._number >= self._total:
            return Searcher.FINISHED
        else:
            if self.plan.sampler == "given":
                config = self._given[self._number]
            else:
                trial, config = self._ask()
            choices = {} if trial is None else dict(trial.params)
            name = f"{self.plan.name}-{self._number:03d}"
            pruning = json.loads(json.dumps(asdict(config.pruning)))
            record = TrialRecord(name, self.plan.name, choices, pruning, config.ranks)
            self.records.save(record)
            self._number += 1
        self._live[trial_id] = (record.id, trial)
        # As text: Tune makes names and tables of nested values.
        return {"trial": record.id, "change": json.dumps({"pruning": record.pruning, "ranks": record.ranks})}

    def _ask(self) -> tuple[Trial, MeteorConfig]:
        costs: list[float] = []
        if self._number < len(self._begin):
            self.study.enqueue_trial(dict(self._begin[self._number]))
        while len(costs) < ATTEMPTS:
            trial = self.study.ask()
            config = self.space.sample(trial)
            if self._expected_cost is None or self.plan.budget is None:
                return trial, config
            cost = self._expected_cost(config)
            if cost <= self.plan.budget:
                return trial, config
            costs.append(cost)
            trial.set_constraint(BUDGET, cost - self.plan.budget)
            self.study.tell(trial, state=TrialState.PRUNED)
        raise SpaceError(
            f"study {self.plan.name}: {ATTEMPTS} configurations in a row cost more than {self.plan.budget:g}; the "
            f"cheapest of them {min(costs):g}: give a larger budget"
        )

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record how a trial ended and tell the study.

        Of an error Tune says no more here; its log has the rest.
        """
        if trial_id not in self._live:
            return  # Tune says it twice where it stops a trial that has just ended
        name, trial = self._live.pop(trial_id)
        result = result or {}
        changes: dict[str, Any] = {"seconds": result.get("time_total_s"), "objective": result.get("objective")}
        if error or "failed" in result:
            changes |= {
                "status": "failed",
                "objective": None,
                "error": result.get("failed", "its process ended, or raised what may pass, too often: see Ray's log"),
            }
        elif result.get("score"):
            ended = json.loads(result["score"])
            changes |= {"status": "completed", "score": ended["score"], "pruning": ended["pruning"]}
        else:
            changes |= {"status": "stopped"}
        record = self.records.update(name, **changes)
        if trial is not None:
            self._tell(trial, record)
        self._ended(record)

    def _tell(self, trial: Trial, record: TrialRecord) -> None:
        if record.status == "failed":
            self.study.tell(trial, state=TrialState.FAIL)
            return
        if record.status == "stopped":
            if record.objective is not None and not self._several:
                trial.report(record.objective, step=0)
            self.study.tell(trial, state=TrialState.PRUNED)
            return
        for key, value in self._constraints(record).items():
            trial.set_constraint(key, value)
        self.study.tell(trial, self._values(record))

    # ------------------------------------------------------------------------------------------------ results to values

    @property
    def _several(self) -> bool:
        return self.plan.budget is None

    def _values(self, record: TrialRecord) -> list[float]:
        """Optuna's values: the objective; of a front TFLOPs and visual tokens as well."""
        assert record.objective is not None
        score = record.scored
        return [record.objective, score.tflops, score.kept_per_image] if self._several else [record.objective]

    def _constraints(self, record: TrialRecord) -> dict[str, float]:
        if self.plan.budget is None:
            return {}
        return {BUDGET: self._measured_cost(record.scored) - self.plan.budget}

    def _remembered(self, record: TrialRecord) -> FrozenTrial:
        """An ended trial as Optuna's."""
        replay = FixedTrial(record.choices)
        self.space.sample(replay)
        facts: dict[str, Any] = {"params": record.choices, "distributions": replay.distributions}
        if record.status == "completed":
            return create_trial(values=self._values(record), constraints=self._constraints(record), **facts)
        if record.status == "failed":
            return create_trial(state=TrialState.FAIL, **facts)
        intermediate = {} if record.objective is None or self._several else {0: record.objective}
        return create_trial(state=TrialState.PRUNED, intermediate_values=intermediate, **facts)

    # ------------------------------------------------------------------------------------- Tune's own snapshots: unused

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are what a sweep goes on from."""
        Path(checkpoint_path).write_text("{}")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


def new_study(plan: StudyPlan, seed: int) -> optuna.Study:
    """An empty study of a plan. The seed counts what is known already, or a study that goes on would repeat itself."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = max(4, plan.trials // 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        samplers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
            "tpe": lambda: optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=start, multivariate=True, group=True, constant_liar=True
            ),
            "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=start),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
            "given": lambda: optuna.samplers.RandomSampler(seed=seed),
        }
        up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        directions = [up] if plan.budget is not None else [up, down, down]
        return optuna.create_study(sampler=samplers[plan.sampler](), directions=directions)
