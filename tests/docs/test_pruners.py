"""docs/pruners.md says what the registries hold."""

from __future__ import annotations

import re

import pytest

from docs.tools.pruners import PAGE, page
from meteor_model.pruners.builtin import DECODE_BUDGETS, DECODE_CRITERIA, ENCODE_BUDGETS, ENCODE_CRITERIA, FUSE_CRITERIA


def test_the_table_is_what_make_docs_writes() -> None:
    assert PAGE.read_text() == page(), "make docs writes the page anew"


@pytest.mark.parametrize(
    ("setting", "registry"),
    [
        ("encode.criterion", ENCODE_CRITERIA),
        ("encode.budget", ENCODE_BUDGETS),
        ("fuse.criterion", FUSE_CRITERIA),
        ("decode.criterion", DECODE_CRITERIA),
        ("decode.budget", DECODE_BUDGETS),
    ],
)
def test_every_criterion_of_a_stage_is_listed(setting: str, registry: object) -> None:
    (line,) = (line for line in PAGE.read_text().splitlines() if line.startswith(f"| `pruning.{setting}`"))
    assert re.findall(r"`(\w+)`", line.split("|", 2)[2]) == list(registry)  # type: ignore[call-overload]
