"""What the rehearsals took, as lines and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.rehearsal.meter import MIB, Taken

WIDTH_IN, ROW_IN = 13.0, 0.24


def line_of(play: str, command: str, phase: str, taken: Taken) -> str:
    """One phase, aligned."""
    network = "  ".join(f"{way} {size / MIB:.0f}" for way, size in taken.network.items() if size >= MIB)
    return (
        f"{play:<14}{command:<15}{phase:<10}{taken.seconds:7.1f} s  memory {taken.memory / MIB:7.0f} MiB  "
        f"temp {taken.temp / MIB:6.0f} MiB  {network}"
    )


def draw(path: Path, rehearsals: Mapping[str, Any]) -> None:
    """Seconds, memory, temporary files and bytes on the network, phase by phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names: list[str] = []
    phases: list[Mapping[str, Any]] = []
    planned: list[Mapping[str, float]] = []
    for play, found in rehearsals.items():
        for command, row in found["commands"].items():
            for phase, taken in row["phases"].items():
                names.append(f"{play} {command}: {phase}")
                phases.append(taken)
                planned.append(row.get("estimate", {}).get(phase, {}))
    figure, places = pyplot.subplots(1, 4, figsize=(WIDTH_IN, 1.2 + ROW_IN * len(names)), sharey=True)
    columns = (
        ("seconds", [phase["seconds"] for phase in phases], ""),
        ("peak memory, MiB", [phase["peak_memory_mib"] for phase in phases], "memory_mib"),
        ("peak temporary files, MiB", [phase["peak_temp_mib"] for phase in phases], "temp_mib"),
        ("to and from the store, MiB", [sum(phase["network_mib"].values()) for phase in phases], ""),
    )
    for axes, (title, values, key) in zip(places, columns, strict=True):
        axes.barh(range(len(names)), values, color="0.45", height=0.65)
        if marks := [(plan[key], row) for row, plan in enumerate(planned) if plan.get(key)]:
            axes.plot(*zip(*marks, strict=True), "|", color="tab:orange", markersize=11, markeredgewidth=2)
            title += " (orange: make plan)"
        for row, value in enumerate(values):
            axes.text(value, row, f" {value:,.0f}", va="center", fontsize=7)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.2)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    places[0].set_yticks(range(len(names)), names, fontsize=7)
    places[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
