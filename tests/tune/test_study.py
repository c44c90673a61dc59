"""The searcher without a cluster: what it suggests, how it learns, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from meteor_model.configuration_meteor import MeteorConfig
from pipelines.evaluation.intervals import Interval
from pipelines.evaluation.scores import Score
from tests.meteor_model.builders import config
from tune.folder import SweepFolder
from tune.records import Records, TrialRecord
from tune.settings import StudyPlan
from tune.space import Space, SpaceError
from tune.study import StudySearch

BUDGET = StudyPlan("budget-12", 6, "tpe", 12.0, early_stopping=True)
FRONT = StudyPlan("front", 6, "tpe")


def search(folder: Path, plan: StudyPlan = BUDGET, **options: Any) -> StudySearch:
    return StudySearch(plan, Space(config(), {}, cap=plan.budget), Records(SweepFolder(str(folder))), **options)


def finished(objective: float, kept: float = 10.0, tflops: float = 1.0) -> dict[str, Any]:
    """What a trial reports at its end."""
    score = Score("suite", 4, 4, {}, 0.5, Interval(0, 1), -objective, Interval(0, 1), 16, kept, tflops)
    ended = {"score": score.to_dict(), "pruning": {"fuse": {"keep": 7}}}
    return {"objective": objective, "time_total_s": 2.0, "score": json.dumps(ended)}


def started(found: StudySearch, tune_id: str) -> TrialRecord:
    suggested = found.suggest(tune_id)
    assert isinstance(suggested, dict)
    return found.records.get(suggested["trial"])


def test_trials_are_numbered_and_end(tmp_path: Path) -> None:
    found = search(tmp_path)
    names = [started(found, str(i)).id for i in range(6)]
    assert names == [f"budget-12-{i:03d}" for i in range(6)]
    assert found.suggest("6") == Searcher.FINISHED
    assert [r.status for r in Records(SweepFolder(str(tmp_path))).all()] == ["started"] * 6


def test_every_ending_is_recorded_and_told(tmp_path: Path) -> None:
    heard: list[TrialRecord] = []
    found = search(tmp_path, ended=heard.append)
    for tune_id in "abcd":
        started(found, tune_id)
    found.on_trial_complete("a", finished(-1.0))
    found.on_trial_complete("b", {"objective": -3.0, "time_total_s": 1.0})
    found.on_trial_complete("c", {"objective": float("nan"), "failed": "lambda needs a target"})
    found.on_trial_complete("d", error=True)
    assert [r.status for r in heard] == ["completed", "stopped", "failed", "failed"]
    assert heard[0].scored.kept_per_image == 10.0
    assert heard[0].pruning == {"fuse": {"keep": 7}}, "with the lambda that was solved"
    assert (heard[2].error, heard[2].objective) == ("lambda needs a target", None)
    states = [t.state for t in found.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    assert found.study.trials[0].constraints == {"budget": -2.0}
    assert started(found, "e").id == "budget-12-004", "a failure stops nothing"


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    first = search(tmp_path)
    before = [started(first, str(i)) for i in range(4)]
    first.on_trial_complete("0", finished(-1.0))
    first.on_trial_complete("1", {"objective": -3.0})
    first.on_trial_complete("2", {"failed": "no"})
    # The fourth was under way.
    second = search(tmp_path)
    assert [t.state for t in second.study.trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    old, new = first.study.trials[0], second.study.trials[0]
    assert (new.params, new.values, new.constraints) == (old.params, old.values, old.constraints)
    again = started(second, "x")
    assert again == before[3], "the same name, the same choices"
    fifth, sixth = started(second, "y"), started(second, "z")
    assert (fifth.id, sixth.id) == ("budget-12-004", "budget-12-005")
    assert all(fifth.choices != record.choices for record in before)
    assert second.suggest("end") == Searcher.FINISHED
    second.on_trial_complete("x", finished(-0.5))
    assert second.records.get(again.id).objective == -0.5
    assert search(tmp_path).study.best_value == -0.5


def test_a_study_begins_with_what_it_is_given(tmp_path: Path) -> None:
    begin = [{"fuse.share": 0.5}, {"fuse.share": 0.75, "decode.enabled": False}]
    found = search(tmp_path, begin=begin)
    first = started(found, "a")
    assert first.choices["fuse.share"] == 0.5
    assert set(first.choices) > {"encode.share.0"}, "the rest is drawn"
    second = started(search(tmp_path, begin=begin), "a")  # the first was under way
    assert second == first
    again = search(tmp_path, begin=begin)
    started(again, "a")
    assert started(again, "b").choices["fuse.share"] == 0.75
    assert started(again, "c").choices["fuse.share"] not in (0.5, 0.75)


def test_a_front_has_three_values(tmp_path: Path) -> None:
    found = search(tmp_path, FRONT)
    started(found, "a")
    found.on_trial_complete("a", finished(-1.0, kept=9.0, tflops=3.0))
    assert found.study.trials[0].values == [-1.0, 3.0, 9.0]
    assert search(tmp_path, FRONT).study.trials[0].values == [-1.0, 3.0, 9.0]


def test_given_configurations_run_once_each(tmp_path: Path) -> None:
    plan, given = StudyPlan("defaults", 0, "given"), [config(), config()]
    found = search(tmp_path, plan, given=given)
    assert [started(found, i).id for i in "ab"] == ["defaults-000", "defaults-001"]
    assert found.suggest("c") == Searcher.FINISHED
    found.on_trial_complete("a", finished(-1.0))
    second = search(tmp_path, plan, given=given)
    assert started(second, "a").id == "defaults-001"
    assert second.suggest("b") == Searcher.FINISHED


def _keep(config: MeteorConfig) -> float:
    return float(config.tokens_per_image)


@pytest.mark.parametrize("fits", [True, False])
def test_what_is_over_the_budget_is_not_run(tmp_path: Path, fits: bool) -> None:
    cost: Callable[[MeteorConfig], float] = _keep if fits else lambda config: 100.0 + config.tokens_per_image
    plan = StudyPlan("budget-12", 3, "tpe", 12.0)
    found = StudySearch(plan, Space(config(), {}), Records(SweepFolder(str(tmp_path))), expected_cost=cost)
    if not fits:
        with pytest.raises(
            SpaceError, match=r"200 configurations in a row cost more than 12; the cheapest of them 1\d\d"
        ):
            found.suggest("a")
        return
    records = [started(found, str(i)) for i in range(3)]
    assert all(r.pruning["fuse"]["keep"] <= 12 for r in records)
    assert [r.id for r in records] == ["budget-12-000", "budget-12-001", "budget-12-002"]
