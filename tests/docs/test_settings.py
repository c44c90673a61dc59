"""The page of all settings is what the code says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from pydantic import PositiveInt

from docs.tools.settings import PAGE, page, settings_of, type_in_words
from pipelines.config.recipe import Recipe
from tune.settings import SweepSettings


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text() == page(), "docs/settings.md is not what the code says: run `make docs`"


def test_every_setting_has_a_text() -> None:
    settings = [*settings_of(Recipe, Recipe(), ""), *settings_of(SweepSettings, None, "")]
    assert len(settings) > 120
    assert [item.name for item in settings if not item.text] == []


@dataclass(frozen=True)
class Base:
    """A base."""

    first: int = 1
    """Of the base."""


@dataclass(frozen=True)
class Example(Base):
    """An example."""

    second: Annotated[Base, "named"] = field(default_factory=lambda: Base(5))
    """A part."""
    third: str = ""
    """Two
    lines."""


def test_parts_and_bases_are_read() -> None:
    found = [(item.name, item.default, item.text) for item in settings_of(Example, Example(), "x")]
    assert found == [
        ("x.first", "`1`", "Of the base."),
        ("x.second.first", "`5`", "Of the base."),
        ("x.third", "empty", "Two lines."),
    ]


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "whole number"),
        (PositiveInt | None, "whole number or None, at least 1"),
        (Literal["a", "b"], "`a` or `b`"),
        (dict[str, float], "mapping of text to number"),
        (tuple[float, ...], "list of number"),
        (tuple[str, str], "2 of text"),
    ],
)
def test_types_in_words(hint: Any, words: str) -> None:
    assert type_in_words(hint) == words
