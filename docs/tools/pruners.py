"""Write the tables of docs/pruners.md: the pruners from the registry, what they cost from the benchmark's results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from meteor_model.pruners.named import PRUNERS

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "pruners.md", ROOT / "benchmarks" / "results" / "pruners.json"
BEGIN, END = "<!-- pruners: written by make docs -->\n", "<!-- end of pruners -->\n"
BEGIN_COST, END_COST = "<!-- costs: written by make docs -->\n", "<!-- end of costs -->\n"
COLUMNS = (
    "pruner",
    "kept",
    "fewer FLOPs",
    "faster (range)",
    "realised",
    "selection / dense time",
    "its memory",
    "peak / dense",
)


def table() -> str:
    """A line a pruner, in the order of the registry."""
    lines = ["| pruner | what it does | acts on | looks at | from |", "|---|---|---|---|---|"]
    for name, item in PRUNERS.items():
        lines.append(f"| `{name}` | {item.about} | {item.acts} | {item.needs} | {item.source} |")
    return "\n".join(lines) + "\n"


def costs() -> str:
    """What `make bench-pruners` found, layout by layout."""
    if not RESULTS.is_file():
        return (
            "Not measured on quiet cores yet: `make bench-pruners` writes `benchmarks/results/pruners.json`, and "
            "`make docs` this table.\n"
        )
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    layouts, about = results["layouts"], results["hardware"]
    note = f"; {results['note']}" if results["note"] else ""
    lines = [f"{about['cores']} cores, {about['cpu']}, {about['dtype']}, torch {about['torch']}{note}."]
    for layout, found in layouts.items():
        title = f"{found['visual_tokens']:,} visual tokens" + (" (`tiny`)" if layout == "tiny" else "")
        lines += [
            "",
            f"**{title}**, {found['dense_gflops']:,.0f} GFLOPs to the first token, {found['attention'].upper()}:",
            "",
            f"| {' | '.join(COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
        ]
        for name, row in found["pruners"].items():
            least, most = row["speed_up_range"]
            cells = (
                f"`{name}`",
                f"{row['kept']:g}",
                f"{row['flops_ratio']:.2f}",
                f"{row['speed_up']:.2f} ({least:.2f} to {most:.2f})",
                f"{row['realised']:.2f}",
                f"{row['selection_over_dense']:.2%}",
                f"{row['selection_peak_mib']:.1f} MiB",
                f"{row['peak_over_dense']:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with its tables as they must be."""
    text = PAGE.read_text()
    for begin, end, written in ((BEGIN, END, table), (BEGIN_COST, END_COST, costs)):
        head, rest = text.split(begin)
        text = head + begin + written() + end + rest.split(end)[1]
    return text


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
