"""What a sweep found, for JSON, tables and people: the decision as plain values, what mattered, one trial as a row."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import optuna

from pipelines.evaluation.scores import MEASURED
from tune.choice import Answers, Judgement, best_within, cheapest, front_of, judged
from tune.records import TrialRecord

LEAST_FOR_IMPORTANCE = 8
"""Completed trials below which importances are noise and are left out."""


def decide(
    finalists: Sequence[Answers], groups: Sequence[str], paper: str, budgets: Sequence[float], margin: float
) -> dict[str, Any]:
    """The decision on the final questions, as plain values.

    Args:
        finalists: on the final questions.
        groups: of these.
        paper: name of the finalist with the paper's settings.
        budgets: per image.
        margin: nats that count as no worse.
    """
    reference = next(one for one in finalists if one.id == paper)
    judgements = judged(finalists, reference, groups, margin)
    found = cheapest(judgements)
    by_budget: dict[str, Any] = {}
    for budget in budgets:
        choice = best_within(finalists, groups, budget)
        by_budget[f"{budget:g}"] = None if choice is None else _budget(*choice)
    return {
        "paper": paper,
        "margin": margin,
        "questions": len(reference.nll),
        "groups": len(set(groups)),
        "finalists": [asdict(judgement) for judgement in judgements],
        "front": front_of(finalists),
        "cheapest": None if found is None else found.id,
        "saved": None if found is None else found.saved,
        "text": _text(found, margin, len(reference.nll)),
        "budgets": by_budget,
    }


def _text(found: Judgement | None, margin: float, questions: int) -> str:
    if found is None:
        return (
            f"no setting was found that costs less than the paper's and is no worse by {margin:g} nats "
            f"({questions} final questions)"
        )
    return (
        f"{found.id} saves {found.saved:.1%} of the cost of the paper's settings and is no worse by {margin:g} nats: "
        f"NLL {found.nll.interval.beside(found.nll.mean, '+')} on {questions} final questions, "
        f"p {found.p_adjusted:.2g} (Holm over the finalists that cost less)"
    )


def _budget(chosen: Answers, best: Answers, nll: Any) -> dict[str, Any]:
    told = (
        "the best by NLL, too"
        if chosen.id == best.id
        else (f"cheaper than {best.id}, the best by NLL, which it may equal: {nll.interval.beside(nll.mean, '+')}")
    )
    return {"trial": chosen.id, "best": best.id, "nll": chosen.mean, "difference": asdict(nll), "text": told}


def completed(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those with a score of a whole suite."""
    return [record for record in records if record.status == "completed"]


def importances(study: optuna.Study) -> dict[str, float]:
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
        found = optuna.importance.get_param_importances(
            alike, evaluator=evaluator, target=lambda trial: float(trial.values[0])
        )
    return {name: float(value) for name, value in found.items() if name != "decode.enabled"}


def row(record: TrialRecord) -> dict[str, Any]:
    """One trial for tables and JSON."""
    score = record.score or {}
    return {
        "trial": record.id,
        "of": record.of,
        "status": record.status,
        "objective": record.objective,
        **{name: score.get(name) for name in MEASURED},
        "ms": record.ms,
        "seconds": record.seconds,
        "error": record.error,
        "towers": record.towers,
        "maps": record.maps,
        "choices": record.choices,
        "pruning": record.pruning,
    }


def compute_unit(largest: float) -> tuple[float, str]:
    """Factor and name of the unit in which costs up to so many TFLOPs are written: small models count GFLOPs."""
    return (1.0, "TFLOPs") if largest >= 0.1 else (1e3, "GFLOPs")


def table(rows: Sequence[Mapping[str, Any]], decision: Mapping[str, Any]) -> str:
    """Finalists as a Markdown table, by rising cost, from their rows."""
    shown = sorted((one for one in rows if one["status"] == "completed"), key=lambda one: float(one["tflops"]))
    factor, unit = compute_unit(max((one["tflops"] for one in shown), default=0.0))
    against = {one["id"]: one for one in decision["finalists"]}
    lines = [
        f"| finalist | was | {unit} | ms | tokens per image into the LLM, after stage 3 | NLL (95 %) | right (95 %) | "
        "NLL against the paper's | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in shown:
        judgement, nll = against.get(one["trial"]), one["answer_nll_interval"]
        ms = "-" if one["ms"] is None else f"{one['ms']:.2f}"
        difference, verdict = "", "the paper's settings"
        if judgement is not None:
            interval = judgement["nll"]["interval"]
            low, high = interval["low"], interval["high"]
            difference = f"{judgement['nll']['mean']:+.4f} ({low:+.4f} to {high:+.4f})"
            verdict = f"{judgement['verdict']}, p {judgement['p_adjusted']:.2g}"
        lines.append(
            f"| {one['trial']} | {one['of']} | {factor * one['tflops']:.4g} | {ms} | {one['tokens_per_image']}, "
            f"{one['kept_per_image']:.1f} | {one['answer_nll']:.3f} ({nll['low']:.3f} to {nll['high']:.3f}) | "
            f"{_right(one)} | {difference} | {verdict} |"
        )
    return "\n".join(lines)


def _right(one: Mapping[str, Any]) -> str:
    if one["accuracy"] is None or one["accuracy_interval"] is None:
        return "not asked for"
    interval = one["accuracy_interval"]
    return f"{one['accuracy']:.1%} ({interval['low']:.1%} to {interval['high']:.1%})"
