"""Pictures of a sweep: what was searched, the finalists against the paper's settings, what mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from meteor_model.visualize import COLOURS
from tune.choice import Answers
from tune.pareto import Point, front
from tune.records import TrialRecord
from tune.results import completed, compute_unit
from tune.settings import CostUnit

NLL = "NLL per token of the expected answer (nats)"


def _scale(trials: Sequence[Answers], cost: CostUnit) -> tuple[float, str]:
    """Factor and label of a cost axis."""
    if cost == "ms":
        return 1.0, "milliseconds per image"
    factor, unit = compute_unit(max((trial.cost for trial in trials), default=0.0))
    return factor, f"{unit} of one image and a short prompt"


def draw_search(trials: Sequence[Answers], paper: str, cost: CostUnit, path: Path) -> None:
    """Every completed trial of the search, the front of them, and the paper's settings."""
    factor, label = _scale(trials, cost)
    figure, axes = plt.subplots(figsize=(7.5, 4.4), dpi=150)
    axes.scatter([factor * t.cost for t in trials], [t.mean for t in trials], color=COLOURS[0], s=26, label="trials")
    best = front(Point(trial.id, trial.cost, -trial.mean) for trial in trials)
    edge = factor * max(trial.cost for trial in trials)
    costs, scores = [factor * point.cost for point in best], [-point.score for point in best]
    axes.step([*costs, edge], [*scores, scores[-1]], where="post", color=COLOURS[0], linewidth=1.6)
    own = next(trial for trial in trials if trial.id == paper)
    axes.plot(factor * own.cost, own.mean, "s", color=COLOURS[1], markersize=9, label="paper's settings")
    axes.set(xlabel=label, ylabel=NLL, title="The search, on its own questions")
    axes.legend(frameon=False)
    _plain(axes)
    _save(figure, path)


def draw_finalists(
    finalists: Sequence[Answers], decision: Mapping[str, Any], names: Mapping[str, str], cost: CostUnit, path: Path
) -> None:
    """NLL of each finalist minus that of the paper's settings with its 95 % interval, a row each by rising cost."""
    factor, label = _scale(finalists, cost)
    rows = sorted(finalists, key=lambda one: one.cost)
    against = {judgement["id"]: judgement for judgement in decision["finalists"]}
    own = next(one for one in finalists if one.id == decision["paper"])
    figure, axes = plt.subplots(figsize=(7.5, 1.5 + 0.42 * len(rows)), dpi=150)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.axvline(decision["margin"], color="black", linewidth=0.8, linestyle=":")
    told = []
    for place, one in enumerate(rows):
        saved = 1 - one.cost / own.cost
        told.append(f"{names[one.id]}   {factor * one.cost:.3g}" + f" ({-saved:+.0%})" * (one is not own))
        if one is own:
            axes.plot(0.0, place, "s", color="black", markersize=7)
            told[-1] = f"the paper's settings   {factor * one.cost:.3g}"
            continue
        nll = against[one.id]["nll"]
        colour = COLOURS[1] if one.id == decision["cheapest"] else COLOURS[0]
        axes.plot([nll["interval"]["low"], nll["interval"]["high"]], [place, place], color=colour, linewidth=2)
        axes.plot(nll["mean"], place, "o", color=colour, markersize=7)
    axes.set_yticks(range(len(rows)), told)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set(xlabel="NLL minus that of the paper's settings (nats; dotted: the margin)", ylabel=label)
    axes.set_title(f"Finalists on {decision['questions']} final questions")
    _plain(axes)
    _save(figure, path)


def draw_importances(found: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Bars of importance, choice by choice, a colour for each study that has them."""
    names = sorted({n for values in found.values() for n in values}, key=lambda n: _sum(found, n))
    figure, axes = plt.subplots(figsize=(7.5, 1.2 + 0.34 * len(names)), dpi=150)
    height = 0.8 / max(1, len(found))
    for index, (study, values) in enumerate(found.items()):
        places = [place + (index - (len(found) - 1) / 2) * height for place in range(len(names))]
        axes.barh(
            places, [values.get(n, 0.0) for n in names], height=height, color=COLOURS[index % len(COLOURS)], label=study
        )
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="share of the objective's variance (fANOVA)", title="Which choices mattered (stage 3 on)")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_trials(records: Sequence[TrialRecord], path: Path) -> None:
    """NLL of each trial in the order of its phase, and how many were stopped or failed."""
    phases = sorted({record.study for record in records}, reverse=True)
    figure, axes = plt.subplots(figsize=(9, 4.2), dpi=150)
    for index, phase in enumerate(phases):
        members = [record for record in records if record.study == phase]
        done = [(place, -(r.objective or 0)) for place, r in enumerate(members) if r.status == "completed"]
        early = [(place, -r.objective) for place, r in enumerate(members) if r.status == "stopped" and r.objective]
        colour, failed = COLOURS[index % len(COLOURS)], sum(r.status == "failed" for r in members)
        label = f"{phase}: {len(completed(members))} scored, {len(early)} stopped" + f", {failed} failed" * bool(failed)
        axes.plot([place for place, _ in done], [nll for _, nll in done], "o", color=colour, label=label)
        hollow = {"markerfacecolor": "none", "alpha": 0.7}
        axes.plot([place for place, _ in early], [nll for _, nll in early], "o", color=colour, **hollow)
    axes.set(xlabel="trial of its phase", ylabel=NLL, title="Trials (hollow: stopped early)")
    _plain(axes)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _sum(found: Mapping[str, Mapping[str, float]], name: str) -> float:
    return sum(values.get(name, 0.0) for values in found.values())


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
