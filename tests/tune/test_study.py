"""The searcher without a cluster: what it suggests, how it learns, and how it goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from pipelines.evaluation.intervals import Interval
from pipelines.evaluation.scores import Score
from tests.meteor_model.builders import PRUNED, config
from tune.folder import SweepFolder
from tune.records import Records, TrialRecord
from tune.settings import Sampler
from tune.space import Space, SpaceError
from tune.study import Given, GivenSearch, StudySearch, configuration_key


def search(folder: Path, total: int = 6, **options: Any) -> StudySearch:
    return StudySearch("search", Space(config(), {}), Records(SweepFolder(str(folder))), total, **options)


def finished(record: TrialRecord, objective: float, tflops: float = 1.0, ms: float | None = None) -> dict[str, Any]:
    """What a trial reports at its end: its pruning has the lambda that was solved."""
    score = Score("suite", 4, None, {}, None, None, -objective, Interval(0, 1), 16, 10.0, tflops)
    pruning = json.loads(json.dumps(record.pruning))
    pruning["decode"]["lam"] = 3.0 if pruning["decode"]["enabled"] else None
    ended = {"score": score.to_dict(), "pruning": pruning, "ms": ms}
    return {"objective": objective, "time_total_s": 2.0, "score": json.dumps(ended)}


def started(found: StudySearch | GivenSearch, tune_id: str) -> TrialRecord:
    suggested = found.suggest(tune_id)
    assert isinstance(suggested, dict)
    return found.records.get(suggested["trial"])


def test_trials_are_numbered_and_end(tmp_path: Path) -> None:
    found = search(tmp_path)
    names = [started(found, str(i)).id for i in range(6)]
    assert names == [f"search-{i:03d}" for i in range(6)]
    assert found.suggest("6") == Searcher.FINISHED
    assert [r.status for r in Records(SweepFolder(str(tmp_path))).all()] == ["started"] * 6


def test_every_ending_is_recorded_and_told(tmp_path: Path) -> None:
    heard: list[TrialRecord] = []
    found = search(tmp_path, ended=heard.append)
    first, *_ = (started(found, tune_id) for tune_id in "abcd")
    for tune_id, result in (
        ("a", finished(first, -1.0, 2.5, ms=4.0)),
        ("b", {"objective": -3.0, "time_total_s": 1.0}),
        ("c", {"objective": float("nan"), "failed": "lambda needs a target"}),
    ):
        found.on_trial_complete(tune_id, result)
    found.on_trial_complete("d", error=True)
    assert [r.status for r in heard] == ["completed", "stopped", "failed", "failed"]
    assert (heard[0].scored.kept_per_image, heard[0].ms) == (10.0, 4.0)
    assert (heard[2].error, heard[2].objective) == ("lambda needs a target", None)
    states = [t.state for t in found.study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    assert found.study.trials[0].values == [-1.0, 2.5]
    timed = search(tmp_path, cost="ms")
    assert timed.study.trials[0].values == [-1.0, 4.0]
    assert started(found, "e").id == "search-004", "a failure stops nothing"


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    first = search(tmp_path)
    before = [started(first, str(i)) for i in range(4)]
    first.on_trial_complete("0", finished(before[0], -1.0))
    first.on_trial_complete("1", {"objective": -3.0})
    first.on_trial_complete("2", {"failed": "no"})
    # The fourth was under way.
    second = search(tmp_path)
    assert [t.state for t in second.study.trials] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    old, new = first.study.trials[0], second.study.trials[0]
    assert (new.params, new.values) == (old.params, old.values)
    again = started(second, "x")
    assert again == before[3], "the same name, the same choices"
    fifth, sixth = started(second, "y"), started(second, "z")
    assert (fifth.id, sixth.id) == ("search-004", "search-005")
    assert all(fifth.choices != record.choices for record in before)
    assert second.suggest("end") == Searcher.FINISHED
    second.on_trial_complete("x", finished(again, -0.5))
    assert second.records.get(again.id).objective == -0.5
    assert [t.values[0] for t in search(tmp_path).study.best_trials] == [-0.5]


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


def completed(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Records as an earlier sweep left them."""
    ended = []
    for number, record in enumerate(records):
        result = json.loads(finished(record, -1.0 - number)["score"])
        ended.append(replace(record, id=f"first/{record.id}", status="completed", objective=-1.0 - number, **result))
    return ended


def test_earlier_sweeps_teach_and_nothing_is_run_twice(tmp_path: Path) -> None:
    first = search(tmp_path / "first")
    earlier = completed([started(first, str(i)) for i in range(3)])
    found = search(tmp_path / "second", total=2, earlier=earlier, begin=[earlier[0].choices, {"fuse.share": 0.5}])
    assert [t.values[0] for t in found.study.trials] == [-1.0, -2.0, -3.0]
    new = [started(found, "a"), started(found, "b")]
    assert [record.id for record in new] == ["search-000", "search-001"], "earlier trials are none of this sweep's"
    keys = [configuration_key(record.pruning, record.ranks) for record in [*earlier, *new]]
    assert len(set(keys)) == 5, "what is known was told to the study again, not run"
    assert found.study.trials[3].values == [-1.0, 1.0]


def test_a_lambda_that_follows_from_a_target_makes_no_other_configuration() -> None:
    plain = json.loads(json.dumps({"decode": {"target_mean": 8.0, "lam": None}, "fuse": {"keep": 4}}))
    solved = json.loads(json.dumps({"decode": {"target_mean": 8.0, "lam": 3.0}, "fuse": {"keep": 4}}))
    chosen = json.loads(json.dumps({"decode": {"target_mean": None, "lam": 3.0}, "fuse": {"keep": 4}}))
    assert configuration_key(plain, None) == configuration_key(solved, None) != configuration_key(chosen, None)
    assert configuration_key(plain, {"clip": [1.0]}) != configuration_key(plain, None)


def test_a_space_that_is_known_as_a_whole_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Space, "sample", lambda self, chooser: config())
    found = search(tmp_path)
    started(found, "a")
    with pytest.raises(SpaceError, match="200 configurations in a row are known already"):
        found.suggest("b")


def test_finalists_run_once_each(tmp_path: Path) -> None:
    given = [Given(f"search-{number:03d}", {"a": number}, PRUNED, None) for number in (4, 2)]
    found = GivenSearch("final", Records(SweepFolder(str(tmp_path))), given)
    assert [(r.id, r.of) for r in (started(found, i) for i in "ab")] == [
        ("final-000", "search-004"), ("final-001", "search-002"),
    ]  # fmt: skip
    assert found.suggest("c") == Searcher.FINISHED
    found.on_trial_complete("a", finished(found.records.get("final-000"), -1.0))
    second = GivenSearch("final", Records(SweepFolder(str(tmp_path))), given)
    assert started(second, "a").id == "final-001"
    assert second.suggest("b") == Searcher.FINISHED


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_every_sampler_goes_on_beyond_its_start(tmp_path: Path, sampler: Sampler) -> None:
    found = search(tmp_path, sampler=sampler, total=7)
    for number in range(6):
        record = started(found, str(number))
        found.on_trial_complete(str(number), finished(record, -1.0 / (1 + number), 1.0 + number))
    assert started(found, "last").id == "search-006"
