"""Charts of a run, as PNG files: the loss curve and the ranks by boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = ("#2a6fbb", "#d1603d", "#3c8d5a", "#8a5aa8", "#b8860b")


def draw_loss(losses: Sequence[float], path: Path, heldout: Mapping[str, float]) -> None:
    """Loss of every step, its running mean over 10 steps, and the held-out losses as lines."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=120)
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color=COLOURS[0], alpha=0.25, linewidth=1, label="each step")
    running = [sum(losses[max(0, i - 10) : i]) / len(losses[max(0, i - 10) : i]) for i in steps]
    axes.plot(steps, running, color=COLOURS[0], linewidth=2, label="mean of 10 steps")
    for (name, value), colour in zip(heldout.items(), COLOURS[1:], strict=False):
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.3, label=f"{name} {value:.3f}")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token (nats)", title="Training loss")
    axes.set_ylim(bottom=0)
    _finish(figure, axes, path)


def draw_ranks(ranks: Mapping[str, Any], path: Path) -> None:
    """Expected rank of each encoder's feature map at each boundary, with its spread over images, by estimator."""
    estimators = ranks["ranks"]
    figure, all_axes = plt.subplots(1, len(estimators), figsize=(4.2 * len(estimators), 3.8), dpi=120, squeeze=False)
    for axes, (estimator, encoders) in zip(all_axes[0], estimators.items(), strict=True):
        boundaries = max(len(items) for items in encoders.values())
        for (name, items), colour in zip(encoders.items(), COLOURS, strict=False):
            places = range(boundaries - len(items) + 1, boundaries + 1)
            means, spreads = [item["mean"] for item in items], [item["std"] for item in items]
            axes.errorbar(places, means, yerr=spreads, color=colour, marker="o", capsize=3, label=name)
        axes.set(xlabel="boundary", title=f"{estimator} rank ({ranks['images']} images)")
        axes.set_xticks(range(1, boundaries + 1))
        axes.set_ylim(bottom=0)
    all_axes[0][0].set_ylabel("rank of the feature map, mean and std")
    _finish(figure, all_axes[0][0], path)


def _finish(figure: Any, axes: Any, path: Path) -> None:
    for one in figure.axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
