"""The parts of a sweep that need no cluster: settings, resources, records, fronts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_model_alias_name

from pipelines.config.settings import SettingsError, TrainingSettings
from tune.folder import SweepFolder, sweep_folder
from tune.pareto import Point, front, hypervolume
from tune.prepare import SweepFacts, choose_sweep, earlier_records, store_facts
from tune.records import Records, TrialRecord
from tune.resources import bundles_of_trial, concurrent_trials
from tune.settings import SweepSettings

BASE = SweepSettings(budgets=(8.0, 16.0), storage="unused")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": (0.0,)}, r"budgets\.0 is 0\.0; it must be above 0"),
        ({"budgets": (8.0, 8.0)}, "must differ"),
        ({"trials": 0}, "trials is 0"),
        ({"portions": 300}, "only 256 questions"),
        ({"max_concurrent": 0}, "max_concurrent is 0"),
        ({"cpus_per_trial": 0.0}, "without bound"),
        ({"margin": 0.0}, "margin is 0"),
        ({"finalists": 0}, "finalists is 0"),
        ({"heldout_split": "train"}, "solved on the questions"),
    ],
)
def test_contradictions_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(BASE, **changes)  # type: ignore[arg-type]


def test_places_and_room_are_no_part_of_the_identity() -> None:
    other = replace(BASE, storage="elsewhere", max_concurrent=1, output="x.json", register=True, name="n")
    assert other.identity() == BASE.identity()
    assert replace(BASE, trials=3).identity() != BASE.identity()
    trained = replace(BASE.train, training=TrainingSettings(epochs=3))
    assert replace(BASE, train=trained).identity() == BASE.identity(), "evaluate trains nothing"
    assert replace(BASE, kind="finetune", train=trained).identity() != replace(BASE, kind="finetune").identity()


@pytest.mark.parametrize(("budget", "alias"), [(64.0, "64"), (12.5, "12_5"), (0.00011, "0_00011"), (2e6, "2e06")])
def test_aliases_are_ones_that_mlflow_takes(budget: float, alias: str) -> None:
    made = BASE.alias_of(budget)
    assert made == f"budget-{alias}"
    _validate_model_alias_name(made)


# ----------------------------------------------------------------------------------------------------------- resources


def test_trials_share_a_gpu() -> None:
    quarter = bundles_of_trial(replace(BASE, gpus_per_trial=0.25))
    assert concurrent_trials(quarter, [{"CPU": 16, "GPU": 1}]) == 4
    assert concurrent_trials(quarter, [{"CPU": 3, "GPU": 1}]) == 3
    assert concurrent_trials(quarter, [{"CPU": 16, "GPU": 1}] * 2, at_most=3) == 3


def test_a_bundle_does_not_span_nodes() -> None:
    pair = bundles_of_trial(replace(BASE, cpus_per_trial=2.0))
    assert concurrent_trials(pair, [{"CPU": 3}, {"CPU": 3}]) == 2
    with pytest.raises(SettingsError, match=r"cannot hold one trial: it needs 2 CPUs .* 1 CPUs, 1 CPUs"):
        concurrent_trials(pair, [{"CPU": 1}, {"CPU": 1}])


def test_what_a_training_trial_starts_in_turn_is_counted() -> None:
    """Its own bundle alone would let four start, whose workers would then wait for each other for ever."""
    settings = replace(BASE, kind="finetune", cpus_per_trial=1.0)
    needs = bundles_of_trial(settings)
    assert sum(bundle["CPU"] for bundle in needs) == 1 + 2 + 1, "itself, two workers, two data tasks"
    assert concurrent_trials(needs, [{"CPU": 3}, {"CPU": 3}]) == 1
    assert concurrent_trials(needs, [{"CPU": 8}]) == 2
    with pytest.raises(SettingsError, match="needs 4 CPUs"):
        concurrent_trials(needs, [{"CPU": 3.5}])


# ------------------------------------------------------------------------------------------------------------- records


def test_records_come_back_from_storage(tmp_path: Path) -> None:
    records = Records(SweepFolder(str(tmp_path)))
    assert records.all() == []
    for number in (1, 0):
        records.save(TrialRecord(f"search-{number:03d}", "search", {"a": 1}, {}, None))
    records.update("search-000", status="failed", error="no")
    (tmp_path / "trials" / "search-001").mkdir()
    (tmp_path / "trials" / "search-001" / "score.json").write_text("{}")
    again = Records(SweepFolder(str(tmp_path)))
    assert [(r.id, r.status) for r in again.of("search")] == [("search-000", "failed"), ("search-001", "started")]
    assert again.get("search-000").error == "no"
    assert again.of("other") == []


# -------------------------------------------------------------------------------------------------------------- fronts

numbers = st.integers(0, 12).map(float)
points = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12).map(
    lambda pairs: [Point(str(i), cost, score) for i, (cost, score) in enumerate(pairs)]
)


def dominates(one: Point, other: Point) -> bool:
    """No worse in both, better in one."""
    no_worse = one.cost <= other.cost and one.score >= other.score
    return no_worse and (one.cost < other.cost or one.score > other.score)


@given(points)
def test_the_front_is_what_nothing_dominates(given_points: list[Point]) -> None:
    kept = front(given_points)
    undominated = {(p.cost, p.score) for p in given_points if not any(dominates(o, p) for o in given_points)}
    assert {(p.cost, p.score) for p in kept} == undominated
    assert all(a.cost < b.cost and a.score < b.score for a, b in itertools.pairwise(kept))


@given(points)
def test_hypervolume_is_the_area_counted_cell_by_cell(given_points: list[Point]) -> None:
    """All coordinates are whole, so the unit cells below every point make the same area."""
    corner = (14.0, -1.0)
    cells = itertools.product(range(14), range(-1, 13))
    covered = sum(any(p.cost <= x and p.score >= y + 1 for p in given_points) for x, y in cells)
    assert hypervolume(given_points, corner) == pytest.approx(covered)


# ------------------------------------------------------------------------------------------------------------- its name


def test_the_last_sweep_goes_on_until_it_is_finished(tmp_path: Path) -> None:
    settings = replace(BASE, storage=str(tmp_path))

    def facts(model: str) -> SweepFacts:
        return SweepFacts(settings.identity(), model, {"sha256": "0", "questions": 8}, {"questions": 9})

    def store(name: str, facts: SweepFacts) -> None:
        store_facts(sweep_folder(str(tmp_path), name), facts)

    first, begun, continued = choose_sweep(settings, facts("models:/m/1"))
    assert (first[-4:], begun, continued) == ("-001", facts("models:/m/1"), False)
    store(first, replace(begun, mlflow_run_id="run"))
    assert choose_sweep(settings, facts("models:/m/1")) == (first, replace(begun, mlflow_run_id="run"), True)
    other, _, continued = choose_sweep(settings, facts("models:/m/2"))
    assert other != first, "another model is another sweep"
    assert not continued
    store(first, replace(begun, finished=True))
    assert choose_sweep(settings, facts("models:/m/1"))[0] == first.replace("-001", "-002")
    with pytest.raises(SettingsError, match="model: 'models:/m/1' -> 'models:/m/2'"):
        choose_sweep(replace(settings, name=first), facts("models:/m/2"))


def test_a_sweep_begins_with_earlier_ones_of_its_model_and_questions(tmp_path: Path) -> None:
    settings = replace(BASE, storage=str(tmp_path), warm_start=("first",))
    facts = SweepFacts(settings.identity(), "models:/m/1", {"questions": 8}, {"questions": 9})
    with pytest.raises(SettingsError, match=r"there is no sweep 'first' to begin with in .*; there are: none"):
        earlier_records(settings, facts)
    folder = sweep_folder(str(tmp_path), "first")
    store_facts(folder, replace(facts, final={"questions": 20}, finished=True))
    records = Records(folder)
    for number, status in enumerate(("completed", "stopped", "failed")):
        records.save(TrialRecord(f"search-{number:03d}", "search", {}, {}, None, status))  # type: ignore[arg-type]
    records.save(TrialRecord("final-000", "final", {}, {}, None, "completed"))
    assert [record.id for record in earlier_records(settings, facts)] == ["first/search-000"]
    with pytest.raises(SettingsError, match=r"(?s)cannot be begun with.*questions: 8 -> 16"):
        earlier_records(settings, replace(facts, suite={"questions": 16}))
    with pytest.raises(SettingsError, match=r"(?s)cannot be begun with.*model: 'models:/m/1' -> 'models:/m/2'"):
        earlier_records(settings, replace(facts, model="models:/m/2"))
