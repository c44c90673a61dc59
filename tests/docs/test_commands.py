"""Every command that a page shows is run: by `make docs-check`, or by a test; the quick ones here as well."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.tools import levels
from docs.tools.check import ROOT, faults, pages, shown_commands, typed
from docs.tools.commands import ROWS, Row
from docs.tools.shown import commands_of

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")


def test_every_command_is_in_the_table_and_the_table_holds_no_other() -> None:
    assert faults() == [], "docs/tools/commands.py says what is run for each command of README.md and docs/"


def test_pages_show_commands() -> None:
    shown = {item.text for item in shown_commands()}
    assert {"make pretrain", "make test", "make docs"} <= shown
    assert any("--data.mixture" in text for text in shown)
    assert len(shown) > 40


def test_quick_commands_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "docs.tools.check", "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr


def jobs_of(command: str) -> list[list[str]]:
    """Name and arguments of the jobs that a command starts; of `make` those of its recipe."""
    lines = command.replace("$PORT", "8000").replace("$WORK", "work").replace(" && ", "\n").splitlines()
    for line in [line for line in lines if line.startswith("make ")]:
        listed = ["make", "--dry-run", "--old-file=.venv/.installed", *shlex.split(line)[1:]]
        recipe = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        lines += recipe.replace("\\\n", " ").splitlines()
    found = [re.search(r"jobs/(\w+)\.py(.*)", line) for line in lines]
    return [[match.group(1), *shlex.split(match.group(2))] for match in found if match]


@pytest.mark.parametrize("command", sorted({shown.text for shown in shown_commands() if not shown.python}))
def test_jobs_take_the_arguments_that_are_shown(command: str) -> None:
    row = next(row for row in ROWS if row.shown == command)
    started = [*jobs_of(command), *(jobs_of(typed(row)) if not row.by else [])]
    for name, *arguments in started:
        if not {"--help", "--tyro-print-completion"} & set(arguments):
            importlib.import_module(f"jobs.{name}").JOB.parse(arguments)


def test_links_lead_somewhere() -> None:
    for page in [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "docs" / "LOG.md", *sorted(ROOT.glob("*/**/README.md"))]:
        if ".venv" in page.parts:
            continue
        for link in LINK.finditer(page.read_text()):
            address = link.group(1).replace("\\", "")
            assert "://" in address or (page.parent / address).exists(), f"{page.relative_to(ROOT)}: {address}"


def test_the_readme_is_short_and_names_every_room() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1200
    rooms = {room for level in levels.LEVELS for room in level}
    assert [room for room in sorted(rooms) if f"`pipelines/{room}/`" not in text] == []


def test_the_table_of_levels_is_that_of_the_test() -> None:
    assert levels.PAGE.read_text() == levels.page(), "CONTRIBUTING.md is not what the code says: run `make docs`"


def test_commands_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        'Type `make a` or `make\nb ARGS="--c"`, not `makefile` or `a.make x`.\n\n```bash\nmake c   # a comment\n\n'
        "# a comment\npython d.py \\\n  --e 'f # g'\n```\n\n```\nmake output\n```\n\n"
        "```python\nimport a\n\na.b()\n```\n"
    )
    found = [(item.line, item.text, item.python) for item in commands_of(tmp_path, page)]
    assert found == [
        (1, "make a", False),
        (1, 'make b ARGS="--c"', False),
        (5, "make c", False),
        (8, "python d.py --e 'f # g'", False),
        (17, "import a\n\na.b()", True),
    ]


@pytest.mark.parametrize(
    ("row", "command"),
    [
        (Row("make a", also="--b 1"), 'make a ARGS="--b 1"'),
        (Row('make a ARGS="--c"', also="--b 1"), 'make a ARGS="--c --b 1"'),
        (Row("python a.py X", also="--b 1", replace={"X": "y"}), "python a.py y --b 1"),
        (Row("make a", before="make b"), "make b\nmake a"),
    ],
)
def test_what_is_typed_for_a_row(row: Row, command: str) -> None:
    assert typed(row) == command


def test_a_row_changes_sizes_and_places_only() -> None:
    """What a row adds are options; what it takes away stands for something: a name in capitals, an example, a size."""
    blocks = {shown.text.splitlines()[0]: shown.text for shown in shown_commands() if shown.python}
    for row in ROWS:
        assert not row.also or row.also.startswith("--"), row.shown
        text = blocks.get(row.shown, row.shown)
        assert all(placeholder in text for placeholder in row.replace), row.shown
