"""Pictures of a sweep: trials and front against each cost, the best of each budget, what mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from meteor_model.visualize import COLOURS
from tune.pareto import front
from tune.records import TrialRecord
from tune.results import completed, compute_unit, points

LABELS = {
    "tflops": "{unit} of one image and a short prompt",
    "kept_per_image": "visual tokens per image after stage 3, mean",
}
NAMES = {"answer_nll": "NLL per token of the expected answer (nats)", "accuracy": "right answers (share)"}
STUDIES = {"front": "search", "random": "random search", "defaults": "paper's settings"}
MARKERS = {"front": "o", "random": "x", "defaults": "s"}


def draw_fronts(by_study: Mapping[str, Sequence[TrialRecord]], objective: str, path: Path) -> None:
    """Every completed trial, and the front of each study, a panel for each cost.

    Args:
        by_study: trials of each study that is drawn.
        objective: of the sweep: "answer_nll", which is drawn positive and falls, or "accuracy".
        path: of the PNG file.
    """
    sign = -1.0 if objective == "answer_nll" else 1.0
    dearest = max((p.cost for records in by_study.values() for p in points(records, "tflops")), default=0.0)
    factor, unit = compute_unit(dearest)
    scale = {"tflops": factor, "kept_per_image": 1.0}
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.4), dpi=150, sharey=True)
    for axes, cost in zip(panels, LABELS, strict=True):
        for index, (study, records) in enumerate(by_study.items()):
            members = points(records, cost)
            if not members:
                continue
            colour, name = COLOURS[index % len(COLOURS)], STUDIES.get(study, study)
            axes.scatter(
                [scale[cost] * p.cost for p in members],
                [sign * p.score for p in members],
                color=colour,
                marker=MARKERS.get(study, "o"),
                alpha=0.55,
                s=26,
                label=f"{name} ({len(members)})",
            )
            best = front(members)
            edge = scale[cost] * max(p.cost for s in by_study.values() for p in points(s, cost))
            costs, scores = [scale[cost] * p.cost for p in best], [sign * p.score for p in best]
            axes.step([*costs, edge], [*scores, scores[-1]], where="post", color=colour, linewidth=1.6)
        axes.set(xlabel=LABELS[cost].format(unit=unit))
        _plain(axes)
    panels[0].set(ylabel=NAMES[objective])
    panels[1].legend(frameon=False)
    figure.suptitle("What more compute buys: trials, and the best at each cost", x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def draw_budgets(best: Mapping[float, TrialRecord | None], objective: str, unit: str, path: Path) -> None:
    """The best score within each budget with its 95 % interval, and what the winner keeps."""
    found = [(budget, record) for budget, record in sorted(best.items()) if record is not None]
    factor, compute = compute_unit(max((record.scored.tflops for _, record in found), default=0.0))
    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=150)
    for place, (_, record) in enumerate(found):
        score = record.scored
        value, interval = score.answer_nll, score.answer_nll_interval
        if objective == "accuracy":
            assert score.accuracy is not None
            assert score.accuracy_interval is not None
            value, interval = score.accuracy, score.accuracy_interval
        axes.plot([place, place], [interval.low, interval.high], color=COLOURS[0], linewidth=2, alpha=0.5)
        axes.plot(place, value, "o", color=COLOURS[0], markersize=8)
        kept = f"{score.tokens_per_image} > {score.kept_per_image:.1f} tokens\n{factor * score.tflops:.3g} {compute}"
        axes.annotate(kept, (place, value), xytext=(10, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xticks(range(len(found)), [f"{budget:g}" for budget, _ in found])
    axes.set_xlim(-0.5, len(found) - 0.2)
    unit_name = "visual tokens per image after stage 3" if unit == "tokens" else "TFLOPs"
    axes.set(xlabel=f"budget ({unit_name})", ylabel=NAMES[objective], title="Best within each budget, 95 % intervals")
    _plain(axes)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


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


def draw_trials(records: Sequence[TrialRecord], objective: str, path: Path) -> None:
    """Objective of each trial in the order of its study, and how many were stopped or failed."""
    sign = -1.0 if objective == "answer_nll" else 1.0
    studies = sorted({record.study for record in records}, key=lambda name: (len(name), name))
    figure, axes = plt.subplots(figsize=(9, 4.2), dpi=150)
    for index, study in enumerate(studies):
        members = [record for record in records if record.study == study]
        done = [(place, r) for place, r in enumerate(members) if r.status == "completed"]
        early = [(place, r) for place, r in enumerate(members) if r.status == "stopped" and r.objective is not None]
        colour, failed = COLOURS[index % len(COLOURS)], sum(r.status == "failed" for r in members)
        label = f"{study}: {len(completed(members))} scored, {len(early)} stopped" + (
            f", {failed} failed" * bool(failed)
        )
        axes.plot([p for p, _ in done], [sign * (r.objective or 0) for _, r in done], "o", color=colour, label=label)
        axes.plot(
            [p for p, _ in early],
            [sign * (r.objective or 0) for _, r in early],
            "o",
            markerfacecolor="none",
            color=colour,
            alpha=0.7,
        )
    axes.set(xlabel="trial of its study", ylabel=NAMES[objective], title="Trials (hollow: stopped early)")
    _plain(axes)
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _sum(found: Mapping[str, Mapping[str, float]], name: str) -> float:
    return sum(values.get(name, 0.0) for values in found.values())


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
