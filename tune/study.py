"""The searcher that Tune asks: an Optuna study over the space, which outlives the process that holds it.

The study itself is in memory; what it learnt from is in the records. A sweep that goes on makes the study anew:

1. trials of earlier sweeps, and its own that ended, are added with their results
2. trials that were under way run again, under the same names with the same choices
3. the rest is asked for: first what the study begins with, then what the sampler draws

A configuration that is known already is told to the study with the result that it has, and never run twice.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState, create_trial
from ray.tune.search import Searcher

from meteor_model.configuration_meteor import PruningConfig
from tune.records import Records, TrialRecord
from tune.settings import CostUnit, Sampler
from tune.space import Space, SpaceError

ATTEMPTS = 200
"""Configurations in a row that may be known already before a study says that there are no others."""
STARTUP = 4
"""Trials that TPE draws at random at least, those that the study begins with among them."""


def cost_of(record: TrialRecord, unit: CostUnit) -> float:
    """What a completed trial costs, per image."""
    if unit == "ms":
        assert record.ms is not None, f"trial {record.id} was not timed"
        return record.ms
    return record.scored.tflops


class Recorded(Searcher):
    """A searcher that records how trials end; what is suggested is a subclass's.

    Args:
        phase: first part of the names of its trials.
        records: of the sweep.
        total: trials of the phase.
        ended: hears the record of every trial that ended.
    """

    def __init__(
        self, phase: str, records: Records, total: int, ended: Callable[[TrialRecord], None] = lambda record: None
    ) -> None:
        super().__init__(metric="objective", mode="max")
        self.phase, self.records, self.total, self._ended = phase, records, total, ended
        known = records.of(phase)
        self._again: Iterator[TrialRecord] = iter([record for record in known if record.status == "started"])
        self._number = len(known)
        self._live: dict[str, TrialRecord] = {}  # by Tune's id

    @property
    def left(self) -> int:
        """Trials that have not ended."""
        return self.total - sum(record.status != "started" for record in self.records.of(self.phase))

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial, as its name and its configuration; FINISHED after the last one."""
        record = next(self._again, None)
        if record is not None:
            self.begun_again(record)
        elif self._number >= self.total:
            return Searcher.FINISHED
        else:
            record = self.begin(f"{self.phase}-{self._number:03d}")
            self.records.save(record)
            self._number += 1
        self._live[trial_id] = record
        # As text: Tune makes names and tables of nested values.
        change = {"pruning": record.pruning, "ranks": record.ranks, "towers": record.towers, "of": record.of}
        return {"trial": record.id, "change": json.dumps(change)}

    def begin(self, name: str) -> TrialRecord:
        """A new trial."""
        raise NotImplementedError

    def begun_again(self, record: TrialRecord) -> None:
        """Hear of a trial that was under way when the sweep was killed."""

    def tell(self, record: TrialRecord) -> None:
        """Hear of a trial that ended."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record how a trial ended.

        Of an error Tune says no more here; its log has the rest.
        """
        if trial_id not in self._live:
            return  # Tune says it twice where it stops a trial that has just ended
        name, result = self._live.pop(trial_id).id, result or {}
        changes: dict[str, Any] = {"seconds": result.get("time_total_s"), "objective": result.get("objective")}
        if error or "failed" in result:
            changes |= {
                "status": "failed",
                "objective": None,
                "error": result.get("failed", "its process ended, or raised what may pass, too often: see Ray's log"),
            }
        elif result.get("score"):
            changes |= {"status": "completed", **json.loads(result["score"])}
        else:
            changes |= {"status": "stopped"}
        record = self.records.update(name, **changes)
        self.tell(record)
        self._ended(record)

    # ------------------------------------------------------------------------------------- Tune's own snapshots: unused

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records are what a sweep goes on from."""
        Path(checkpoint_path).write_text("{}")

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, see `save`."""


@dataclass(frozen=True)
class Given:
    """A configuration that is chosen already: a finalist."""

    of: str
    choices: dict[str, Any]
    pruning: PruningConfig
    ranks: dict[str, list[float]] | None
    towers: dict[str, int] | None = None


class GivenSearch(Recorded):
    """Suggests configurations one after the other.

    Args:
        phase, records, ended: as of `Recorded`.
        given: the configurations.
    """

    def __init__(
        self,
        phase: str,
        records: Records,
        given: Sequence[Given],
        ended: Callable[[TrialRecord], None] = lambda record: None,
    ) -> None:
        super().__init__(phase, records, len(given), ended)
        self._given = given

    def begin(self, name: str) -> TrialRecord:
        """The next one."""
        given = self._given[self._number]
        plain = as_plain(given.pruning)
        return TrialRecord(name, self.phase, given.choices, plain, given.ranks, of=given.of, towers=given.towers)


class StudySearch(Recorded):
    """Suggests the trials of the study and tells it how they end.

    Args:
        phase, records, total, ended: as of `Recorded`.
        space: of configurations.
        sampler: of Optuna, after the trials that it begins with.
        cost: that is lowered beside the NLL.
        begin: choices that the first trials take; what they lack is drawn.
        earlier: ended trials of earlier sweeps.
        seed: of the sampler.
    """

    def __init__(  # noqa: PLR0913 - the settings of a study, by name
        self,
        phase: str,
        space: Space,
        records: Records,
        total: int,
        *,
        sampler: Sampler = "tpe",
        cost: CostUnit = "tflops",
        begin: Sequence[Mapping[str, Any]] = (),
        earlier: Sequence[TrialRecord] = (),
        seed: int = 0,
        ended: Callable[[TrialRecord], None] = lambda record: None,
    ) -> None:
        super().__init__(phase, records, total, ended)
        self.space, self._cost, self._begin = space, cost, begin
        self._trials: dict[str, Trial] = {}  # of Optuna, by the name of the record
        known = records.of(phase)
        self.study = new_study(sampler, total, seed + len(known))
        self._known: dict[str, TrialRecord] = {}  # by configuration
        for record in [*earlier, *known]:
            self._known.setdefault(configuration_key(record.pruning, record.ranks, record.towers), record)
            if record.status != "started":
                self.study.add_trial(self._remembered(record))

    def begun_again(self, record: TrialRecord) -> None:
        """Ask the study for the same choices."""
        self.study.enqueue_trial(record.choices)
        trial = self.study.ask()
        self.space.sample(trial)
        self._trials[record.id] = trial

    def begin(self, name: str) -> TrialRecord:
        """What the study asks for next, passing over what is known.

        Raises:
            SpaceError: where everything that is drawn is known.
        """
        if self._number < len(self._begin):
            self.study.enqueue_trial(dict(self._begin[self._number]))
        for _ in range(ATTEMPTS):
            trial = self.study.ask()
            config = self.space.sample(trial)
            plain, towers = as_plain(config.pruning), self.space.towers_of(config)
            key = configuration_key(plain, config.ranks, towers)
            known = self._known.get(key)
            if known is None:
                choices = dict(trial.params)
                record = TrialRecord(name, self.phase, choices, plain, config.ranks, towers=towers)
                self._known[key] = record
                self._trials[name] = trial
                return record
            self._repeat(trial, known)
        raise SpaceError(
            f"study {self.phase}: {ATTEMPTS} configurations in a row are known already: there are hardly any others; "
            "take fewer --trials"
        )

    def _repeat(self, trial: Trial, known: TrialRecord) -> None:
        """Tell the study of a configuration that was drawn again what is known of it."""
        current = next((record for record in self.records.of(self.phase) if record.id == known.id), known)
        if current.status == "completed":
            self.study.tell(trial, self._values(current))
        else:
            self.study.tell(trial, state=TrialState.FAIL)

    def tell(self, record: TrialRecord) -> None:
        """Tell the study how a trial ended."""
        trial = self._trials.pop(record.id)
        if record.status == "completed":
            self.study.tell(trial, self._values(record))
        else:
            self.study.tell(trial, state=TrialState.PRUNED if record.status == "stopped" else TrialState.FAIL)

    def _values(self, record: TrialRecord) -> list[float]:
        """Optuna's values: the objective, and the cost."""
        assert record.objective is not None
        return [record.objective, cost_of(record, self._cost)]

    def _remembered(self, record: TrialRecord) -> FrozenTrial:
        """An ended trial as Optuna's."""
        replay = FixedTrial(record.choices)
        self.space.sample(replay)
        facts: dict[str, Any] = {"params": record.choices, "distributions": replay.distributions}
        if record.status == "completed":
            return create_trial(values=self._values(record), **facts)
        return create_trial(state=TrialState.PRUNED if record.status == "stopped" else TrialState.FAIL, **facts)


def as_plain(pruning: PruningConfig) -> dict[str, Any]:
    """A pruning as JSON reads it."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(pruning)))
    return plain


def configuration_key(
    pruning: Mapping[str, Any],
    ranks: Mapping[str, Sequence[float]] | None,
    towers: Mapping[str, int] | None = None,
) -> str:
    """Equal for configurations that compute the same: a lambda that follows from a target is no part of it."""
    decode = pruning["decode"]
    solved = decode.get("target_mean") is not None
    plain = {**pruning, "decode": {**decode, "lam": None}} if solved else pruning
    return json.dumps([plain, ranks, towers], sort_keys=True)


def new_study(sampler: Sampler, trials: int, seed: int) -> optuna.Study:
    """An empty study of objective (up) and cost (down).

    The seed counts what is known already, or a study that goes on would repeat itself.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    start = max(STARTUP, trials // 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=optuna.exceptions.ExperimentalWarning)
        samplers: dict[Sampler, Callable[[], optuna.samplers.BaseSampler]] = {
            "tpe": lambda: optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=start, multivariate=True, group=True, constant_liar=True
            ),
            "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=start),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        }
        up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        return optuna.create_study(sampler=samplers[sampler](), directions=[up, down])
