"""Write the table of levels into CONTRIBUTING.md from the one that tests/test_imports.py holds the code to."""

from __future__ import annotations

from pathlib import Path

from tests.test_imports import LEVELS

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
BEGIN, END = "<!-- levels: written by make docs -->\n", "<!-- end of levels -->\n"
WHAT = {
    "compat": "what is used of Ray and DeepSpeed beyond their public interfaces",
    "io": "storage, uploads, retries, a run's folder, checked settings, stored values, secrets hidden, signs of life",
    "data": "shards, their order and mixture, the ledger of what was trained, sources",
    "parts": "demo weights that travel in packages",
    "recovery": "what a failure means, when to start again, preemption, the lease of a run, the watchdog",
    "tracking": "MLflow runs, metric points",
    "config": "recipes and their settings",
    "evaluation": "suites, questions, scores",
    "checkpoint": "what is saved; the newest, the best; resharding, consolidation",
    "training": "the loop on Ray Train and ZeRO-3, checkpoints, validation",
    "registry": "exported folders, versions, cards, promotion",
    "sizing": "what a run will take of memory, disk, network and time, and whether the cluster has it",
    "calibration": "ranks, budgets, drift, lambda",
    "inference": "Ray Serve, batches to Parquet",
    "job": "a whole run, phase by phase",
}
"""What lives in each room of pipelines/."""


def table() -> str:
    """A line a room, lowest level first."""
    lines = ["| level | room | may import | what lives there |", "|---|---|---|---|"]
    for number, level in enumerate(LEVELS, start=1):
        lines += [
            f"| {number} | `{room}` | {', '.join(sorted(uses)) or '-'} | {WHAT[room]} |" for room, uses in level.items()
        ]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table as it must be."""
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
