"""Tokens against score, one panel a group, with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from benchmarks.quality.rows import TRAINED

SHOWN: dict[str, tuple[str, str]] = {
    "random": ("#9aa0a6", "random"),
    "average_pooling": ("#5f6368", "average pooling"),
    "smaller_image": ("#202124", "smaller image"),
    "divprune": ("#1a73e8", "DivPrune"),
    "cdpruner": ("#12b5cb", "CDPruner"),
    "visionzip": ("#7b1fa2", "VisionZip"),
    "fastv": ("#fbbc9a", "FastV, layer 1"),
    "fastv(layer=2)": ("#e8710a", "FastV, layer 2"),
    "sparsevlm": ("#f9ab00", "SparseVLM"),
    "meteor_stage_3(layer=2)": ("#d93025", "METEOR's stage 3 alone, layer 2"),
    "trained average_pooling": ("#5f6368", "average pooling, trained"),
    "trained smaller_image": ("#202124", "smaller image, trained"),
    "trained meteor": ("#188038", "METEOR, stages 1 and 2, trained"),
    "trained meteor, stage 3(layer=2)": ("#81c995", "... with stage 3 behind them, layer 2"),
}
"""Curves in this order: colour and name. Trained rows are stars: each is a model of its own."""


def draw_curves(summary: Mapping[str, Any], path: Path, title: str) -> None:
    """Write the picture of one dense model's rows, and of those of the models that were trained from it.

    Args:
        summary: one dense model's of `statistics.summarise`, rows by name.
        path: of a PNG.
        title: above all panels.
    """
    rows = [row for row in summary.values() if row["equal"] == "tokens"]
    groups = [name for name in rows[0]["scores"] if name != "all"]
    figure, axes = plt.subplots(1, len(groups), figsize=(3.4 * len(groups), 3.9), sharey=True, squeeze=False)
    dense = next(row for row in rows if row["pruner"] == "none")
    for axis, group in zip(axes[0], groups, strict=True):
        axis.axhline(100 * dense["scores"][group][0], color="#202124", linewidth=0.8, linestyle=":")
        for curve, (colour, label) in SHOWN.items():
            points = sorted((row["kept"], row["scores"][group]) for row in _of_curve(summary, curve))
            if not points:
                continue
            trained = curve.startswith(TRAINED)
            if not trained:
                points.append((dense["kept"], dense["scores"][group]))
            kept = [x for x, _ in points]
            middle = [100 * score for _, (score, _, _) in points]
            low = [100 * (score - end) for _, (score, end, _) in points]
            high = [100 * (end - score) for _, (score, _, end) in points]
            marks = {"marker": "*", "markersize": 9} if trained else {"marker": "o", "markersize": 3}
            line = ":" if curve.endswith("(layer=2)") and trained else "-"
            axis.errorbar(
                kept, middle, [low, high], color=colour, label=label, capsize=2, linewidth=1.3, linestyle=line, **marks
            )
        axis.set_title(group)
        axis.set_xscale("log", base=2)
        axis.set_xticks([9, 18, 36, 72, 144], ["9", "18", "36", "72", "144"])
        axis.set_xlabel("visual tokens in the last layer")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("exact match, %")
    axes[0][0].set_ylim(-2, 102)
    figure.suptitle(title, fontsize=10)
    _legend(figure, axes[0])
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _of_curve(summary: Mapping[str, Any], curve: str) -> list[Any]:
    """Rows whose name, without the model's and without its number, is the curve's."""
    return [
        row
        for name, row in summary.items()
        if row["equal"] == "tokens" and name.rpartition(": ")[2].rpartition("@")[0] == curve
    ]


def _legend(figure: Figure, axes: Any) -> None:
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
