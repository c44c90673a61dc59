"""A score by what its questions are about: the tags of the data, each with its accuracy and interval.

A question has any number of tags, so their questions overlap. Imports no torch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.intervals import Interval, level
from pipelines.evaluation.scores import Record


@dataclass(frozen=True)
class OfTag:
    """The questions of a tag.

    Attributes:
        questions: how many.
        groups: of those that are no independent draws.
        accuracy: mean credit.
        interval: of it (`intervals.level`).
    """

    questions: int
    groups: int
    accuracy: float
    interval: Interval


def by_tag(records: Sequence[Record]) -> dict[str, OfTag]:
    """What was earned by tag, in alphabetical order; nothing of questions that were not answered."""
    found: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        for tag in record.tags if record.credit is not None else ():
            found[tag].append(record)
    return {tag: _of(found[tag]) for tag in sorted(found)}


def _of(records: Sequence[Record]) -> OfTag:
    credits = np.array([record.credit for record in records], dtype=np.float64)
    groups = [record.group for record in records]
    return OfTag(len(records), len(set(groups)), float(credits.mean()), level(credits, groups))


def tag_lines(found: Mapping[str, OfTag]) -> list[str]:
    """For people, a line a tag."""
    return [
        f"{tag:<24} {of.interval.beside(of.accuracy)} of {of.questions} questions in {of.groups} groups"
        for tag, of in found.items()
    ]
