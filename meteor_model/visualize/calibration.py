"""Chart of a calibration: expected ranks with their intervals, of one dataset or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image

from meteor_model.visualize.charts import new_figure, plain_axes, rendered, shortened
from meteor_model.visualize.panels import COLOURS, FAINT, INK, LINE

GROUP = 0.8
"""Width of all bars of one boundary, of 1."""


def draw_calibration(reports: Mapping[str, Mapping[str, Any]], note: str = "") -> Image.Image:
    """Mean rank of each encoder at each boundary, a panel per estimator, a bar per dataset.

    The dark line is the 95 % interval of the mean, the pale one the standard deviation over images.

    Args:
        reports: dataset -> `images` and `ranks` (estimator -> encoder -> {"mean", "std", "low", "high"} per boundary),
            all of one model.
        note: a line below the title, e.g. the verdict on drift.

    Raises:
        ValueError: without datasets, or for datasets with other encoders, boundaries or estimators.
    """
    first = _check(reports)
    panels = first["ranks"]
    places = _places(next(iter(panels.values())))
    inches = min(11.0, max(6.5, 0.62 * len(places) * max(1, 0.55 * len(reports)) + 2.2))
    figure = new_figure(inches, 2.35 * len(panels) + 1.1)
    width = GROUP / len(reports)
    for index, estimator in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, index + 1)
        for place, ((name, report), colour) in enumerate(zip(reports.items(), cycle(COLOURS), strict=False)):
            items = [item for row in report["ranks"][estimator].values() for item in row]
            xs = np.arange(len(items)) + (place - (len(reports) - 1) / 2) * width
            means = np.array([item["mean"] for item in items])
            label = f"{shortened(name, 60)} ({report['images']} images)"
            hatch = "///" if place >= len(COLOURS) else None  # colours begin anew
            axes.bar(xs, means, 0.92 * width, color=colour, alpha=0.75, label=label, hatch=hatch, edgecolor="white")
            if report["images"] > 1:
                stds = np.array([item["std"] for item in items])
                axes.errorbar(xs, means, yerr=stds, fmt="none", ecolor=FAINT, elinewidth=2.6, alpha=0.45)
                ends = np.array([[item["mean"] - item["low"], item["high"] - item["mean"]] for item in items]).T
                axes.errorbar(xs, means, yerr=ends, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2.5)
        axes.set_title(f"{estimator} rank", fontsize=10, color=INK, loc="left")
        axes.set_xticks(range(len(places)), [f"{name}\n{boundary}" for name, boundary in places])
        axes.set_xlim(-0.6, len(places) - 0.4)
        axes.set_ylim(0, None)
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        plain_axes(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=1 if len(labels) < 4 else 3,
        frameon=False,
        labelcolor=INK,
        fontsize=8,
    )
    legend = "dark: 95 % interval of the mean; pale: standard deviation over images"
    lines = [legend, *wrap(note, int(11 * inches))]
    return rendered(figure, "Expected rank by encoder and boundary", "\n".join(lines))


def _check(reports: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    if not reports:
        raise ValueError("there is no calibration to draw: give at least one dataset")
    shapes = {
        name: {e: {n: len(items) for n, items in row.items()} for e, row in report["ranks"].items()}
        for name, report in reports.items()
    }
    (first_name, first), *others = shapes.items()
    if not first or not all(first.values()):
        raise ValueError(f"{first_name} has no ranks to draw")
    for name, shape in others:
        if shape != first:
            raise ValueError(f"{name} has ranks of {shape}, {first_name} of {first}: draw datasets of one model")
    return reports[first_name]


def _places(encoders: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Encoder and boundary (counted from 1) of every group of bars; one with fewer boundaries has the last ones."""
    last = max(len(items) for items in encoders.values())
    return [(name, last - len(items) + 1 + index) for name, items in encoders.items() for index in range(len(items))]
