"""A score by tag: every question counts under each of its tags, and questions of one group count as one draw."""

from __future__ import annotations

import numpy as np
import pytest

from pipelines.evaluation.breakdown import by_tag, tag_lines
from pipelines.evaluation.intervals import level
from pipelines.evaluation.scores import Record


def _record(group: str, credit: float | None, *tags: str) -> Record:
    return Record("k", group, "p", "a", "a", credit, 1.0, ((1, 1, 1),), tags)


RECORDS = (
    _record("a", 1.0, "ocr", "ocr: line"),
    _record("a", 0.0, "ocr", "ocr: sign"),
    _record("b", 1.0, "ocr", "ocr: line"),
    _record("c", 0.5, "general"),
    _record("c", 1.0),
    _record("d", None, "general"),
)


def test_each_tag_has_its_questions() -> None:
    found = by_tag(RECORDS)
    assert {tag: (of.questions, of.groups, of.accuracy) for tag, of in found.items()} == {
        "general": (1, 1, 0.5),
        "ocr": (3, 2, pytest.approx(2 / 3)),
        "ocr: line": (2, 2, 1.0),
        "ocr: sign": (1, 1, 0.0),
    }
    assert found["ocr"].interval == level(np.array([1.0, 0.0, 1.0]), ["a", "a", "b"])
    assert [line.split(" ")[0] for line in tag_lines(found)] == ["general", "ocr", "ocr:", "ocr:"]
    assert by_tag([_record("a", None, "ocr")]) == {}
