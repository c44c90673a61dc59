"""Finalists, the decision on them, what is stopped, and what is said: on trials that are made up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.evaluation.intervals import Interval, Verdict
from pipelines.evaluation.scores import Score
from tune.choice import (
    LEVEL,
    Answers,
    Judgement,
    best_within,
    cheapest,
    front_of,
    judged,
    nearest_to_front,
    saving,
    with_budgets,
)
from tune.figures import draw_finalists, draw_importances, draw_search, draw_trials
from tune.records import Status, TrialRecord
from tune.redo import main, redo
from tune.results import decide, importances, row, table
from tune.stopping import CONFIDENT_ON, REPORT, Report, StopDominated, dominated
from tune.study import new_study

MARGIN = 0.02
GROUPS = [str(number // 2) for number in range(200)]


def trial(name: str, cost: float, nll: Sequence[float] | np.ndarray, budgeted: float | None = None) -> Answers:
    return Answers(name, cost, cost if budgeted is None else budgeted, tuple(float(value) for value in nll))


def noisy(seed: int, shift: float = 0.0, spread: float = 0.05) -> np.ndarray:
    """NLLs of 200 questions whose differences to those of seed 0 are small."""
    base = np.random.default_rng(0).exponential(size=200)
    return base + shift + (np.random.default_rng(seed).normal(0, spread, size=200) if seed else 0.0)


def test_finalists_are_the_nearest_to_the_front_and_none_that_is_worse_for_certain() -> None:
    paper = trial("paper", 10.0, noisy(0))
    trials = [
        paper,
        trial("cheap", 4.0, noisy(1, 0.01)),
        trial("same but dearer", 9.0, noisy(1, 0.012)),
        trial("much worse", 2.0, noisy(2, 0.5)),
        trial("dearer and worse", 9.5, noisy(3, 0.02)),
        trial("best", 11.0, noisy(4, -0.05)),
    ]
    chosen = nearest_to_front(trials, paper, GROUPS, 3, MARGIN)
    assert [one.id for one in chosen] == ["cheap", "best", "same but dearer"]
    assert "much worse" not in [one.id for one in nearest_to_front(trials, paper, GROUPS, 9, MARGIN)]
    small = with_budgets([paper, *chosen], trials, [20.0, 3.0, 1.0])
    assert [one.id for one in small] == ["paper", "cheap", "best", "same but dearer", "much worse"]


def test_the_cheapest_that_is_no_worse_is_chosen_over_the_better_one() -> None:
    paper = trial("paper", 10.0, noisy(0))
    finalists = [
        paper,
        trial("equal", 4.0, noisy(1)),
        trial("better", 6.0, noisy(2, -0.1)),
        trial("w", 2.0, noisy(3, 0.1)),
    ]
    judgements = {one.id: one for one in judged(finalists, paper, GROUPS, MARGIN)}
    assert judgements["better"].verdict is Verdict.BETTER
    assert judgements["w"].verdict is Verdict.INFERIOR
    assert judgements["w"].p_margin > 0.99
    found = cheapest(list(judgements.values()))
    assert found is not None
    assert found.id == "equal"
    assert found.saved == pytest.approx(0.6)
    assert cheapest([judgements["w"]]) is None
    dearer = judged([paper, trial("dear", 20.0, noisy(1))], paper, GROUPS, MARGIN)
    assert dearer[0].no_worse
    assert cheapest(dearer) is None, "no better found is an answer"


def test_a_setting_that_is_worse_by_the_margin_is_chosen_at_the_stated_rate() -> None:
    """Six of them, all cheaper: with Holm over all, one passes in at most one of forty sweeps."""
    random = np.random.default_rng(5)
    wrong = 0
    for _ in range(100):
        base = random.exponential(size=128)
        paper = trial("paper", 10.0, base)
        others = [trial(str(i), float(i + 1), base + MARGIN + random.normal(0, 0.1, size=128)) for i in range(6)]
        wrong += cheapest(judged([paper, *others], paper, [str(i) for i in range(128)], MARGIN)) is not None
    assert wrong / 100 <= LEVEL + 2 * np.sqrt(LEVEL * (1 - LEVEL) / 100)


def test_a_tie_within_noise_takes_the_cheaper_one() -> None:
    finalists = [
        trial("best", 9.0, noisy(1, -0.002), 8.0),
        trial("tie", 4.0, noisy(2), 7.0),
        trial("worse", 1.0, noisy(3, 0.2), 6.0),
        trial("over", 0.5, noisy(4, -1.0), 30.0),
    ]
    found = best_within(finalists, GROUPS, 8.0)
    assert found is not None
    chosen, best, nll = found
    assert (chosen.id, best.id) == ("tie", "best")
    assert nll.interval.low <= 0 <= nll.interval.high
    assert best_within(finalists, GROUPS, 5.0) is None
    assert front_of(finalists) == ["over"]


points = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), min_size=1, max_size=8)


@settings(max_examples=25, deadline=None)
@given(points)
def test_the_nearest_are_those_by_the_literal_gap(drawn: list[tuple[int, int]]) -> None:
    """Without noise: how much better the best of no higher cost is."""
    trials = [trial(f"{i:02d}", float(cost), np.full(20, float(nll))) for i, (cost, nll) in enumerate(drawn)]
    paper = replace(trials[0], id="paper", nll=tuple(np.full(20, 9.0)))
    chosen = nearest_to_front([*trials, paper], paper, [str(i) for i in range(20)], 3, 100.0)
    gaps = {a.id: max(a.mean - b.mean for b in trials if b.cost <= a.cost) for a in trials}
    expected = sorted(trials, key=lambda one: (gaps[one.id], one.cost))[:3]
    assert [(gaps[one.id], one.cost) for one in chosen] == [(gaps[one.id], one.cost) for one in expected]


def test_saving_at_no_noise() -> None:
    known = {"paper": (10.0, 0.5), "a": (4.0, 0.51), "b": (1.0, 0.6)}
    assert saving(known, "paper", 0.02) == pytest.approx(0.6)
    assert saving(known, "paper", 0.001) == 0.0


# ------------------------------------------------------------------------------------------------------------ stopping


def test_only_what_is_worse_for_certain_and_no_cheaper_is_dominated() -> None:
    good, bad = Report(1.0, list(noisy(0)), GROUPS), Report(1.0, list(noisy(1, 0.2)), GROUPS)
    assert dominated(bad, good)
    assert not dominated(good, bad)
    assert not dominated(replace(bad, cost=0.9), good), "it is cheaper"
    assert not dominated(Report(1.0, list(noisy(1, 0.001)), GROUPS), good), "chance may explain it"
    few = CONFIDENT_ON - 1
    assert not dominated(Report(1.0, bad.values[:few], GROUPS[:few]), Report(1.0, good.values[:few], GROUPS[:few]))


def test_the_scheduler_compares_at_one_place_and_spares_the_reference() -> None:
    scheduler = StopDominated(spared="search-000")

    def hear(name: str, progress: float, shift: float) -> str:
        told = Report(1.0, list(noisy(0, shift)), GROUPS).to_json()
        running: Any = SimpleNamespace(config={"trial": name})
        return scheduler.on_trial_result(None, running, {"progress": progress, REPORT: told})

    assert hear("search-001", 50, 0.0) == "CONTINUE"
    assert hear("search-002", 50, 0.5) == "STOP"
    assert hear("search-003", 25, 0.5) == "CONTINUE", "of other questions"
    assert hear("search-000", 50, 0.5) == "CONTINUE"
    running: Any = SimpleNamespace(config={"trial": "search-004"})
    assert scheduler.on_trial_result(None, running, {"progress": 100}) == "CONTINUE"


# ------------------------------------------------------------------------------------------------------- what is said


def record(number: int, tflops: float, nll: float, status: Status = "completed", of: str = "") -> TrialRecord:
    score = Score("s", 64, 60, {}, 0.25, Interval(0.2, 0.3), nll, Interval(nll - 0.1, nll + 0.1), 32, 8.0, tflops)
    stored = score.to_dict() if status == "completed" else None
    phase = "final" if of else "search"
    name = f"{phase}-{number:03d}"
    return TrialRecord(name, phase, {"fuse.share": 0.5}, {}, None, status, of, -nll, stored, ms=1.5)


def result_of(finalists: Sequence[Answers], searched: Sequence[Answers]) -> dict[str, Any]:
    """The parts of `sweep.json` that a decision is made again from."""
    phases = {
        phase: {
            "groups": GROUPS,
            "trials": {
                one.id: {"cost": one.cost, "budgeted": one.budgeted, "nll": list(one.nll), "of": of}
                for one, of in zip(trials, names, strict=True)
            },
        }
        for phase, trials, names in (
            ("search", searched, [""] * len(searched)),
            ("final", finalists, [one.id.replace("final", "search") for one in finalists]),
        )
    }
    decision = decide(finalists, GROUPS, "final-000", [8.0, 0.1], MARGIN)
    chosen = {"finalists": 2, "margin": MARGIN, "budgets": [8.0, 0.1], "cost": "tflops"}
    rows = [row(record(i, 10.0 - 3 * i, 0.5, of=f"search-{i:03d}")) for i in range(3)]
    plain = {"settings": chosen, "paper": "search-000", "records": phases, "decision": decision, "trials": rows}
    made: dict[str, Any] = json.loads(json.dumps(plain))
    return made


def test_the_stored_records_give_the_decision_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    searched = [trial(f"search-{i:03d}", 10.0 - 3 * i, noisy(i, 0.01 * i)) for i in range(3)]
    finalists = [trial(f"final-{i:03d}", 10.0 - 3 * i, noisy(10 * i, 0.001 * i)) for i in range(3)]
    result = result_of(finalists, searched)
    assert result["decision"]["cheapest"] == "final-002"
    assert "saves 60.0% of the cost of the paper's settings" in result["decision"]["text"]
    assert result["decision"]["budgets"]["0.1"] is None
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(result))
    assert main([str(path)]) == 0
    assert "equal to the stored decision" in capfd.readouterr().out
    result["decision"]["cheapest"] = "final-001"
    path.write_text(json.dumps(result))
    assert main([str(path)]) == 1
    assert main([str(path), "--write"]) == 0
    written = json.loads(path.read_text())
    assert written["decision"]["cheapest"] == "final-002"
    level = written["trials"][0]["answer_nll_interval"]
    assert level["low"] < finalists[0].mean < level["high"]
    assert (tmp_path / "sweep-finalists.png").stat().st_size > 1000
    assert "non-inferior, p " in (tmp_path / "sweep-finalists.md").read_text()
    result["records"]["final"]["trials"]["final-002"]["of"] = "search-009"
    with pytest.raises(ValueError, match="search-002 should have been finalists"):
        redo(result)


def test_importance_finds_the_choice_that_matters() -> None:
    study = new_study("random", 30, 0)
    assert importances(study) == {}
    for _ in range(30):
        asked = study.ask()
        matters, idle = asked.suggest_float("fuse.share", 0, 1), asked.suggest_float("encode.share.0", 0, 1)
        study.tell(asked, [3 * matters + 0.01 * idle, 1.0])
    found = importances(study)
    assert found["fuse.share"] > 0.9
    assert sum(found.values()) == pytest.approx(1.0)
    equal = new_study("random", 12, 0)
    for _ in range(12):
        asked = equal.ask()
        asked.suggest_float("fuse.share", 0, 1)
        equal.tell(asked, [0.0, 1.0])
    assert importances(equal) == {}


def test_pictures_and_tables(tmp_path: Path) -> None:
    finalists = [trial(f"final-{i:03d}", 10.0 - 3 * i, noisy(10 * i, 0.001 * i)) for i in range(3)]
    decision = json.loads(json.dumps(decide(finalists, GROUPS, "final-000", [8.0], MARGIN)))
    names = {one.id: one.id.replace("final", "search") for one in finalists}
    draw_search(finalists, "final-000", "tflops", tmp_path / "search.png")
    draw_finalists(finalists, decision, names, "ms", tmp_path / "finalists.png")
    draw_importances({"search": {"fuse.share": 0.7, "decode.layer": 0.3}}, tmp_path / "importances.png")
    finals = [record(i, 1.0 - 0.3 * i, 0.5, of=f"search-{i:03d}") for i in range(3)]
    trials = [*finals, record(5, 3, 3, "stopped"), record(6, 3, 3, "failed"), record(7, 2.0, 0.4)]
    draw_trials(trials, tmp_path / "trials.png")
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            colours = len(picture.convert("RGB").getcolors(1 << 24) or [])
        assert colours > 20, f"{path.name} shows nothing"
    rows = json.loads(json.dumps([row(one) for one in [*finals, record(4, 1, 1, "failed", of="search-004")]]))
    lines = table(rows, decision).splitlines()
    assert len(lines) == 2 + 3
    assert "the paper's settings" in lines[-1]
    assert "non-inferior, p " in lines[2]
    assert row(trials[3])["status"] == "stopped"
    assert row(trials[3])["tflops"] is None


def test_a_judgement_is_plain() -> None:
    paper = trial("paper", 10.0, noisy(0))
    (one,) = judged([paper, trial("equal", 4.0, noisy(1))], paper, GROUPS, MARGIN)
    assert json.loads(json.dumps(asdict(one)))["nll"]["interval"]["low"] == one.nll.interval.low
    assert isinstance(one, Judgement)
