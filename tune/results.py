"""What a sweep found: the best of each budget, the fronts with their hypervolumes, what mattered."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna

from pipelines.evaluation.scores import MEASURED, Score
from tune.pareto import Point, front, hypervolume, reference
from tune.records import TrialRecord
from tune.settings import SweepSettings

COSTS = ("tflops", "kept_per_image")
"""Fields of a score that a front is drawn against."""
LEAST_FOR_IMPORTANCE = 8
"""Completed trials below which importances are noise and are left out."""


def cost_of(settings: SweepSettings, score: Score) -> float:
    """A score's cost in the unit of the budgets."""
    return score.tflops if settings.budget_unit == "tflops" else score.kept_per_image


def completed(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those with a score of the whole suite."""
    return [record for record in records if record.status == "completed"]


def best_within(settings: SweepSettings, records: Sequence[TrialRecord], budget: float) -> TrialRecord | None:
    """The trial with the best objective whose measured cost is within the budget; None where there is none.

    Trials of every study count: a trial of the front may be the best within a budget.
    """
    fitting = [record for record in completed(records) if cost_of(settings, record.scored) <= budget]
    return max(fitting, key=lambda record: (record.objective or 0.0, -cost_of(settings, record.scored)), default=None)


def points(records: Sequence[TrialRecord], cost: str) -> list[Point]:
    """Completed trials as points: the cost, and the objective."""
    return [Point(r.id, float(getattr(r.scored, cost)), float(r.objective or 0.0)) for r in completed(records)]


def fronts(by_study: Mapping[str, Sequence[TrialRecord]]) -> dict[str, Any]:
    """For each cost the front over all trials, and the hypervolume that each study reaches by itself.

    One reference corner for all studies, a tenth of the range of all points beyond the worst of them; hypervolumes are
    also given as a share of all studies' together.
    """
    found: dict[str, Any] = {}
    for cost in COSTS:
        sets = {study: points(records, cost) for study, records in by_study.items()}
        everything = [point for members in sets.values() for point in members]
        if not everything:
            continue
        corner = reference(everything)
        whole = hypervolume(everything, corner)
        areas = {study: hypervolume(members, corner) for study, members in sets.items() if members}
        found[cost] = {
            "front": [point.id for point in front(everything)],
            "reference": {"cost": corner[0], "objective": corner[1]},
            "hypervolume": areas,
            "hypervolume_share": {study: area / whole if whole else None for study, area in areas.items()},
            "front_by_study": {study: [p.id for p in front(members)] for study, members in sets.items() if members},
            "trials_by_study": {study: len(members) for study, members in sets.items() if members},
        }
    return found


def importances(study: optuna.Study, several: bool) -> dict[str, float]:
    """Share of the objective's variance that each choice explains (fANOVA; Hutter, Hoos and Leyton-Brown, ICML 2014).

    Over the completed trials with stage 3 on, so that its own settings can be compared with the others; empty where
    there are fewer than `LEAST_FOR_IMPORTANCE`, or all have one objective.
    """
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    done = [t for t in done if t.params.get("decode.enabled", True)]
    if len(done) < LEAST_FOR_IMPORTANCE or len({trial.values[0] for trial in done}) == 1:
        return {}
    alike = optuna.create_study(directions=study.directions)
    alike.add_trials(done)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        target = (lambda trial: float(trial.values[0])) if several else None
        found = optuna.importance.get_param_importances(alike, evaluator=evaluator, target=target)
    return {name: float(value) for name, value in found.items() if name != "decode.enabled"}


def row(record: TrialRecord) -> dict[str, Any]:
    """One trial for tables and JSON."""
    pruning = record.pruning
    score = record.score or {}
    return {
        "trial": record.id,
        "status": record.status,
        "objective": record.objective,
        **{name: score.get(name) for name in MEASURED},
        "seconds": record.seconds,
        "error": record.error,
        "choices": record.choices,
        "pruning": pruning,
    }


def compute_unit(largest: float) -> tuple[float, str]:
    """Factor and name of the unit in which costs up to so many TFLOPs are written: small models count GFLOPs."""
    return (1.0, "TFLOPs") if largest >= 0.1 else (1e3, "GFLOPs")


def table(records: Sequence[TrialRecord]) -> str:
    """Completed trials as a Markdown table, by rising cost."""
    shown = sorted(completed(records), key=lambda item: item.scored.tflops)
    factor, unit = compute_unit(max((record.scored.tflops for record in shown), default=0.0))
    lines = [
        f"| trial | {unit} | tokens per image into the LLM | per image after stage 3 | NLL (95 %) | right (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for record in shown:
        score = record.scored
        nll = score.answer_nll_interval
        lines.append(
            f"| {record.id} | {factor * score.tflops:.4g} | {score.tokens_per_image} | {score.kept_per_image:.1f} | "
            f"{score.answer_nll:.3f} ({nll.low:.3f} to {nll.high:.3f}) | "
            f"{_right(score)} |"
        )
    return "\n".join(lines)


def _right(score: Score) -> str:
    if score.accuracy is None or score.accuracy_interval is None:
        return "not asked for"
    return f"{score.accuracy:.1%} ({score.accuracy_interval.low:.1%} to {score.accuracy_interval.high:.1%})"
