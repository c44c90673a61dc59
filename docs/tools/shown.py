"""The commands that a Markdown page shows.

1. every line of a block that is marked `bash`, without its comment; lines that end in a backslash go on
2. every block that is marked `python`, as one command
3. every code span in the text that begins like a command (`make help`), also one that breaks over two lines
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("make", "python", "ray", "mlflow models", "pip install", "source", "eval")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_COMMENT = re.compile(r"(^|\s{2,})# .*$")


@dataclass(frozen=True)
class Shown:
    """A command of a page.

    Attributes:
        page: path below the repository.
        line: of the page, counted from 1.
        text: of the command.
        python: whether it is a block of Python.
    """

    page: str
    line: int
    text: str
    python: bool = False


def commands_of(root: Path, page: Path) -> list[Shown]:
    """Every command of one page, in its order."""
    text, name = page.read_text(), str(page.relative_to(root))
    found = [*_of_blocks(text, name), *_of_spans(text, name)]
    return sorted(found, key=lambda shown: shown.line)


def _of_blocks(text: str, page: str) -> Iterator[Shown]:
    for block in _BLOCK.finditer(text):
        language, body = block.groups()
        first = text[: block.start()].count("\n") + 2
        if language == "python":
            yield Shown(page, first, body.strip(), python=True)
        elif language == "bash":
            for number, line in enumerate(body.replace("\\\n", " ").splitlines()):
                if command := _COMMENT.sub("", line).strip():
                    yield Shown(page, first + number, " ".join(command.split()))


def _of_spans(text: str, page: str) -> Iterator[Shown]:
    prose = _BLOCK.sub(lambda block: "\n" * block.group().count("\n"), text)
    for span in _SPAN.finditer(prose):
        command = " ".join(span.group(1).split()).replace("\\|", "|")
        if any(command.startswith(f"{program} ") for program in PROGRAMS):
            yield Shown(page, prose[: span.start()].count("\n") + 1, command)
