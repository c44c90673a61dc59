"""Every tag that is written has a line in the module of tags, and docs/registry.md shows the same lines."""

from __future__ import annotations

import re
from pathlib import Path

from pipelines.registry.tags import DATA_TAGS, MODEL_TAGS, TRAINING_TAGS, VERSION_TAGS, is_known

DOCS = Path(__file__).resolve().parents[3] / "docs" / "registry.md"


def documented(heading: str) -> dict[str, str]:
    """Tag -> meaning in the table of docs/registry.md that begins with this heading; prefixes without their star."""
    table = DOCS.read_text().split(f"| {heading} | says |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [re.fullmatch(r"\| `([a-z0-9_.]+)\*?` \| (.+) \|", line) for line in table.splitlines()]
    assert all(rows), table
    return {row[1]: row[2] for row in rows if row}


def test_the_docs_show_every_tag() -> None:
    assert documented("tag of a version") == VERSION_TAGS
    assert documented("tag of the registered model") == MODEL_TAGS


def test_what_a_variant_takes_over_has_a_line() -> None:
    assert {*DATA_TAGS, *TRAINING_TAGS} <= set(VERSION_TAGS)


def test_a_tag_is_known_by_its_name_or_its_prefix() -> None:
    assert is_known("accuracy")
    assert is_known("licence.weights.llm")
    assert not is_known("licence")
    assert not is_known("accuracy.")
