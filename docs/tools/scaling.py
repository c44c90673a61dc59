"""Write the tables of docs/scaling.md as `make plan` prints them: `python -m docs.tools.scaling` (some 20 seconds)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jobs.plan import JOB, estimated
from pipelines.sizing.table import table, terms_text
from pipelines.sizing.terms import Estimate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
ARGUMENTS = ("--recipe", "meteor_x4_7b", "--nodes", "2", "--gpus-per-node", "8")
BEGIN, END = "<!-- {}: written by make docs -->\n```text\n", "```\n<!-- end -->\n"


@cache
def found() -> Estimate:
    """The estimate that the page shows."""
    return estimated(JOB.parse(ARGUMENTS))


def page(text: str) -> str:
    """A text with both blocks as they must be."""
    for name, block in (("table", table(found())), ("terms", terms_text(found()))):
        begin = BEGIN.format(name)
        head, rest = text.split(begin)
        text = head + begin + block + "\n" + END + rest.split(END, 1)[1]
    return text


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
