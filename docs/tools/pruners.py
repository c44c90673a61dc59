"""Write the table of pruners into docs/pruners.md from the registry."""

from __future__ import annotations

from pathlib import Path

from meteor_model.pruners.named import PRUNERS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pruners.md"
BEGIN, END = "<!-- pruners: written by make docs -->\n", "<!-- end of pruners -->\n"


def table() -> str:
    """A line a pruner, in the order of the registry."""
    lines = ["| pruner | what it does | acts on | looks at | from |", "|---|---|---|---|---|"]
    for name, item in PRUNERS.items():
        lines.append(f"| `{name}` | {item.about} | {item.acts} | {item.needs} | {item.source} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table as it must be."""
    head, rest = PAGE.read_text().split(BEGIN)
    return head + BEGIN + table() + END + rest.split(END)[1]


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
