"""The loss curve of a run, as a PNG file. What shows the model is drawn in `meteor_model.visualize`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from meteor_model.visualize import COLOURS


def draw_loss(losses: npt.NDArray[np.float64], path: Path, heldout: Mapping[str, float]) -> None:
    """Loss of every step, its running mean over 10 steps, and the held-out losses as lines."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=120)
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=COLOURS[0], alpha=0.25, linewidth=1, label="each step")
    sums, width = np.concatenate([[0.0], np.cumsum(losses)]), np.minimum(steps, 10)
    running = (sums[steps] - sums[steps - width]) / width
    axes.plot(steps, running, color=COLOURS[0], linewidth=2, label="mean of 10 steps")
    for (name, value), colour in zip(heldout.items(), COLOURS[1:], strict=False):
        axes.axhline(value, color=colour, linestyle="--", linewidth=1.3, label=f"{name} {value:.3f}")
    axes.set(xlabel="optimizer step", ylabel="loss per supervised token (nats)", title="Training loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
