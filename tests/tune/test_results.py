"""What a sweep says it found, on trials that are made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
from PIL import Image

from pipelines.evaluation.intervals import Interval
from pipelines.evaluation.scores import Score
from tests.meteor_model.builders import config
from tune.defaults import paper_settings
from tune.figures import draw_budgets, draw_fronts, draw_importances, draw_trials
from tune.records import Status, TrialRecord
from tune.results import best_within, fronts, importances, row, table
from tune.settings import StudyPlan, SweepSettings
from tune.study import new_study

SETTINGS = SweepSettings(budgets=(8.0,), storage="unused")


def record(study: str, number: int, kept: float, nll: float, status: Status = "completed") -> TrialRecord:
    interval = Interval(nll - 0.1, nll + 0.1)
    score = Score("suite", 64, 64, {}, 0.25, Interval(0.2, 0.3), nll, interval, 32, kept, kept / 1000)
    stored = score.to_dict() if status == "completed" else None
    return TrialRecord(f"{study}-{number:03d}", study, {"fuse.share": 0.5}, {}, None, status, -nll, stored)


def test_best_within_a_budget_is_by_what_was_measured() -> None:
    trials = [
        record("budget-8", 0, 8.1, 1.0),  # over it
        record("budget-8", 1, 7.9, 2.0),
        record("budget-8", 2, 3.0, 1.5, "stopped"),  # of other questions
        record("front", 0, 6.0, 1.9),
    ]
    best = best_within(SETTINGS, trials, 8.0)
    assert best is not None
    assert best.id == "front-000", "every study's trials count"
    assert best_within(SETTINGS, trials, 5.0) is None
    in_tflops = SweepSettings(budgets=(0.007,), budget_unit="tflops", storage="unused")
    assert best_within(in_tflops, trials, 0.007) == trials[3]


def test_hypervolumes_are_of_one_corner() -> None:
    by_study = {
        "front": [record("front", 0, 10, 1.0), record("front", 1, 2, 2.0)],
        "random": [record("random", 0, 10, 1.5), record("random", 1, 6, 3.0, "failed")],
        "defaults": [],
    }
    found = fronts(by_study)["kept_per_image"]
    assert found["front"] == ["front-001", "front-000"]
    assert found["reference"] == {"cost": pytest.approx(10.8), "objective": pytest.approx(-2.1)}
    assert found["hypervolume"]["front"] == pytest.approx(8.8 * 0.1 + 0.8 * 1.0)
    assert found["hypervolume"]["random"] == pytest.approx(0.8 * 0.6)
    assert found["hypervolume_share"]["front"] == 1.0
    assert found["trials_by_study"] == {"front": 2, "random": 1}


def test_importance_finds_the_choice_that_matters() -> None:
    study = new_study(StudyPlan("budget-8", 30, "random", 8.0), 0)
    for _ in range(30):
        trial = study.ask()
        matters, idle = trial.suggest_float("fuse.share", 0, 1), trial.suggest_float("encode.share.0", 0, 1)
        study.tell(trial, 3 * matters + 0.01 * idle)
    found = importances(study, several=False)
    assert found["fuse.share"] > 0.9
    assert sum(found.values()) == pytest.approx(1.0)


def test_importance_of_too_few_trials_is_left_out() -> None:
    study = optuna.create_study()
    for value in range(7):
        study.add_trial(optuna.create_trial(value=float(value), params={}, distributions={}))
    assert importances(study, several=False) == {}


def test_importance_of_equal_objectives_is_left_out() -> None:
    study = new_study(StudyPlan("front", 12, "random"), 0)
    for _ in range(12):
        trial = study.ask()
        trial.suggest_float("fuse.share", 0, 1)
        study.tell(trial, [0.0, 1.0, 2.0])
    assert importances(study, several=True) == {}


def test_pictures_and_tables(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    drawn = {s: [record(s, i, *rng.uniform(1, 30, 2)) for i in range(5)] for s in ("front", "random", "defaults")}
    draw_fronts(drawn, "answer_nll", tmp_path / "front.png")
    draw_budgets({8.0: drawn["front"][0], 16.0: None}, "accuracy", "tokens", tmp_path / "budgets.png")
    mattered = {f"budget-{number}": {"fuse.share": 0.7, "decode.layer": 0.3} for number in range(7)}
    draw_importances(mattered, tmp_path / "importances.png")
    trials = [*drawn["front"], record("front", 5, 3, 3, "stopped"), record("front", 6, 3, 3, "failed")]
    draw_trials(trials, "answer_nll", tmp_path / "trials.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            colours = len(picture.convert("RGB").getcolors(1 << 24) or [])
        assert colours > 20, f"{path.name} shows nothing"
    lines = table(trials).splitlines()
    assert len(lines) == 2 + 5
    assert row(trials[5])["status"] == "stopped"
    assert row(trials[5])["tflops"] is None


def test_the_papers_settings() -> None:
    given = paper_settings(config())
    assert [c.pruning.decode.enabled for c in given] == [False, True, True, True, True]
    assert [c.pruning.decode.target_mean for c in given[1:]] == [18.0, 12.0, 6.0, 3.0]
    assert all(c.pruning.encode.rank_exponent == 1.0 and c.tokens_per_image == 24 for c in given)
    assert {(c.pruning.decode.layer, c.decode_heads, c.pruning.decode.query) for c in given[1:]} == {(2, 1, "last")}
