"""Charts of what decides the budgets: feature-map ranks by boundary, attention on visual tokens by head.

matplotlib is imported when a chart is drawn: the model alone does not need it.

Legend: M images, L layers of the LLM, H heads.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image

from meteor_model.visualize.panels import COLOURS, FAINT, INK, LETTERS, LINE

DPI = 200  # for a display of double density
BARS, CHOSEN = "#b9c2cc", COLOURS[1]


def rank_report(measured: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """What `draw_ranks` draws, from what `measure_ranks` measured.

    Args:
        measured: estimator -> encoder -> ranks (M, boundaries).

    Returns:
        `images`: M, and `ranks`: estimator -> encoder -> a `mean` and a sample `std` per boundary (0 for one image).
    """
    ranks: dict[str, dict[str, list[dict[str, float]]]] = {}
    images = 0
    for estimator, encoders in measured.items():
        for name, values_MB in encoders.items():
            images = len(values_MB)
            spread_B = values_MB.std(axis=0, ddof=1) if images > 1 else np.zeros(values_MB.shape[1])
            ranks.setdefault(estimator, {})[name] = [
                {"mean": float(mean), "std": float(std)}
                for mean, std in zip(values_MB.mean(axis=0), spread_B, strict=True)
            ]
    return {"images": images, "ranks": ranks}


def draw_ranks(
    report: Mapping[str, Any],
    expected: Mapping[str, Sequence[float]] | None = None,
    estimator: str | None = None,
) -> Image.Image:
    """Rank of each encoder's feature map at each boundary, mean and spread over images, a panel per estimator.

    Args:
        report: `images` and `ranks` (estimator -> encoder -> {"mean", "std"} per boundary): what `rank_report` returns
            and what calibration stores as ranks.json. An encoder with fewer boundaries has the last ones.
        expected: encoder -> expected rank at each boundary (`MeteorConfig.ranks`), drawn hollow beside what was
            measured.
        estimator: the one that `expected` was measured by.

    Raises:
        ValueError: for a report without ranks.
    """
    if not report["ranks"] or not all(report["ranks"].values()):
        raise ValueError("there are no ranks to draw: measure at least one estimator on one encoder")
    panels = report["ranks"]
    figure = new_figure(max(5.4, 3.7 * len(panels)), 4.1)
    for index, (name, encoders) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), index + 1)
        last = max(len(items) for items in encoders.values())
        for place, ((encoder, items), colour) in enumerate(zip(encoders.items(), cycle(COLOURS), strict=False)):
            # A little beside each other, so that bars do not hide bars.
            shift = 0.05 * (place - (len(encoders) - 1) / 2)
            means, spreads = [item["mean"] for item in items], [item["std"] for item in items]
            places = np.arange(last - len(items) + 1, last + 1) + shift
            bars = spreads if report["images"] > 1 else None
            axes.errorbar(
                places,
                means,
                yerr=bars,
                color=colour,
                marker="o",
                markersize=5,
                linewidth=1.8,
                capsize=3,
                label=encoder,
            )
            if expected is not None and name == estimator:
                values = list(expected[encoder])
                places = np.arange(last - len(values) + 1, last + 1) + shift
                axes.plot(places, values, color=colour, marker="o", markersize=8, mfc="none", linestyle=":")
        axes.set_title(f"{name} rank", fontsize=10, color=INK, loc="left")
        axes.set_xlabel("boundary", color=INK)
        axes.set_xticks(range(1, last + 1))
        axes.set_xlim(0.7, last + 0.3)
        axes.set_ylim(0, 1.06 * max(axes.get_ylim()[1], 1.0))
        axes.grid(axis="y", color=LINE, linewidth=0.7)
        plain_axes(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, labelcolor=INK)
    spread = "one image" if report["images"] == 1 else f"mean and standard deviation over {report['images']} images"
    hollow = "; hollow and dotted: expected, from calibration" if expected is not None else ""
    return rendered(figure, "Rank of the feature map at each boundary", f"{spread}{hollow}")


def draw_head_vav(
    vav: Mapping[str, np.ndarray], chosen: Mapping[str, Sequence[int]] | None = None, layer: int | None = None
) -> Image.Image:
    """Visual attention value (VAV) of each head: its attention mass on visual tokens, a column of charts per prompt.

    For all layers (L, H) a heat map, and below it the heads of `layer` as bars; for one layer (H,) the bars alone.

    Args:
        vav: prompt -> attention mass on visual tokens, (L, H) or (H,), each between 0 and 1.
        chosen: prompt -> the heads that stage 3 listens to.
        layer: the layer, counted from 1, at which they are chosen; needed for (L, H) alone.

    Raises:
        ValueError: without prompts; for shapes that differ, values that are no shares, a layer or head there is not.
    """
    arrays = {prompt: np.asarray(values, dtype=np.float64) for prompt, values in vav.items()}
    _check_vav(arrays, chosen or {}, layer)
    by_layer = next(iter(arrays.values())).ndim == 2
    layers, heads = next(iter(arrays.values())).shape if by_layer else (0, len(next(iter(arrays.values()))))
    top = max(float(values.max()) for values in arrays.values()) or 1.0
    heights = [min(4.5, 0.9 + 0.2 * layers), 2.0] if by_layer else [2.2]
    width = max(4.6, min(8.0, 0.19 * heads))
    figure = new_figure(width * len(arrays) + 0.6, sum(heights) + 1.3)
    grid = figure.add_gridspec(len(heights), len(arrays), height_ratios=heights)
    maps, mesh = [], None
    for column, (prompt, values) in enumerate(arrays.items()):
        mine = [] if chosen is None else list(chosen[prompt])
        title = shortened(f"{LETTERS[column % len(LETTERS)]}: {prompt}", int(10 * width))
        if by_layer:
            assert layer is not None
            axes = figure.add_subplot(grid[0, column])
            mesh = _heat_map(axes, values, mine, layer, top)
            maps.append(axes)
            axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes = figure.add_subplot(grid[-1, column])
        _bars(axes, values[layer - 1] if by_layer and layer else values, mine, top)
        if by_layer:
            axes.set_title(f"layer {layer}", fontsize=10, color=INK, loc="left")
        else:
            axes.set_title(title, fontsize=10, color=INK, loc="left")
    if mesh is not None:
        bar = figure.colorbar(mesh, ax=maps, pad=0.02, shrink=0.9)
        bar.outline.set_visible(False)
        bar.ax.tick_params(color=LINE, labelcolor=INK, labelsize=8)
    where = "" if layer is None else f" at layer {layer}"
    note = f"orange: the heads that stage 3 listens to{where}" if chosen else ""
    return rendered(figure, "Attention mass on visual tokens by head", note)


def _check_vav(arrays: Mapping[str, np.ndarray], chosen: Mapping[str, Sequence[int]], layer: int | None) -> None:
    if not arrays:
        raise ValueError("there is nothing to draw: give the attention of at least one prompt")
    shapes = {values.shape for values in arrays.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) not in (1, 2) or 0 in next(iter(shapes)):
        raise ValueError(
            f"attention by head must be (layers, heads) or (heads,), the same for all prompts, got {shapes}"
        )
    shape = next(iter(shapes))
    for prompt, values in arrays.items():
        # A little above 1 is rounding of half-precision attention.
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1.01:
            raise ValueError(f"attention mass is a share between 0 and 1; prompt {prompt!r} has other values")
        wrong = [head for head in chosen.get(prompt, ()) if not 0 <= head < shape[-1]]
        if wrong:
            raise ValueError(f"head {wrong[0]} of prompt {prompt!r} is not one of the {shape[-1]} heads")
    if chosen and set(chosen) != set(arrays):
        raise ValueError(f"heads are chosen for prompts {sorted(chosen)}, attention is of {sorted(arrays)}")
    if len(shape) == 2 and (layer is None or not 1 <= layer <= shape[0]):
        raise ValueError(f"layer {layer} is not one of the {shape[0]} layers, counted from 1")


def _heat_map(axes: Any, values_LH: np.ndarray, chosen: Sequence[int], layer: int, top: float) -> Any:
    """Layers downwards, heads to the right; the layer that stage 3 asks framed, its chosen heads dotted."""
    from matplotlib.patches import Rectangle

    layers, heads = values_LH.shape
    mesh = axes.imshow(values_LH, cmap="Blues", vmin=0.0, vmax=top, aspect="auto", interpolation="nearest")
    axes.add_patch(Rectangle((-0.5, layer - 1.5), heads, 1, fill=False, edgecolor=CHOSEN, linewidth=1.4, clip_on=False))
    axes.plot(list(chosen), [layer - 1] * len(chosen), "o", color=CHOSEN, markersize=4.5, mec="white", mew=0.6)
    every = max(1, -(-layers // 16))
    ticks = sorted({*range(0, layers, every), layer - 1})
    axes.set_yticks(ticks, [str(index + 1) for index in ticks])
    axes.set_xticks(range(0, heads, max(1, heads // 16)))
    axes.set_ylabel("LLM layer", color=INK)
    plain_axes(axes)
    return mesh


def _bars(axes: Any, values_H: np.ndarray, chosen: Sequence[int], top: float) -> None:
    """A bar per head, the chosen ones coloured."""
    heads = range(len(values_H))
    axes.bar(heads, values_H, color=[CHOSEN if head in set(chosen) else BARS for head in heads], width=0.75)
    axes.set_xlim(-0.5, len(values_H) - 0.5)
    axes.set_ylim(0, top * 1.05)
    axes.set_xticks(range(0, len(values_H), max(1, len(values_H) // 16)))
    axes.set_xlabel("head", color=INK)
    axes.set_ylabel("mass", color=INK)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    plain_axes(axes)


def shortened(text: str, most: int) -> str:
    """A text of at most `most` characters."""
    return text if len(text) <= most else text[: most - 3].rstrip() + "..."


def new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches. Raises ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("charts need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def plain_axes(axes: Any) -> None:
    """No frame, quiet ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.set_axisbelow(True)
    axes.tick_params(color=LINE, labelcolor=FAINT, labelsize=8)


def rendered(figure: Any, title: str, note: str) -> Image.Image:
    """The finished figure under its title and a line that says what is shown."""
    figure.suptitle(f"{title}\n{note}".strip(), x=0.01, ha="left", fontsize=11, color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")
