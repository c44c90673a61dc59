"""How an answer is held against the expected one: named scorers, each a credit from 0 (wrong) to 1 (right).

The name is part of a suite's digest, for scores by two scorers say nothing of one another.

    exact     equal but for case, spaces and a final full stop
    vqa       equal after the normalisation of the VQA evaluation (S. Antol et al., ICCV 2015): number words are digits,
              articles and punctuation go, apostrophes and commas within numbers, too
    yesno     the first word of both is the same one of yes and no
    letter    the same letter of a multiple choice: `B`, `(b)`, `B. a dog`, `Answer: B`
    anls      1 - normalised edit distance, 0 from a half on (A. F. Biten et al., ICCV 2019): partial credit
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal, get_args

Scorer = Literal["exact", "vqa", "yesno", "letter", "anls"]
SCORERS: tuple[str, ...] = get_args(Scorer)

ANLS_THRESHOLD = 0.5
"""Normalised edit distance from which an answer earns nothing."""

_ARTICLES = frozenset({"a", "an", "the"})
_DIGITS = dict(
    zip(
        ["none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
        ["0", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "10"],
        strict=True,
    )
)
_WITHIN_NUMBERS = re.compile(r"(?<=\d),(?=\d{3})")
_PUNCTUATION = re.compile(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]|_")
_LETTER = re.compile(r"^(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?\s*:?\s*)?\(?([a-z])\)?(?=$|[\s.:,)])")


def credit(scorer: Scorer, answer: str, expected: str) -> float:
    """What an answer earns, from 0 to 1."""
    return _CREDITS[scorer](answer, expected)


def normalise(answer: str) -> str:
    """An answer without case, outer and repeated spaces, and a final full stop."""
    return " ".join(answer.casefold().split()).removesuffix(".").rstrip()


def normalise_vqa(answer: str) -> str:
    """An answer as the VQA evaluation compares it."""
    text = _WITHIN_NUMBERS.sub("", normalise(answer)).replace("'", "").replace("\u2019", "")
    words = _PUNCTUATION.sub(" ", text).split()
    return " ".join(_DIGITS.get(word, word) for word in words if word not in _ARTICLES)


def edit_distance(first: str, second: str) -> int:
    """Least number of letters inserted, deleted or replaced that makes one text the other (V. Levenshtein, 1966)."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, start=1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


def _exact(answer: str, expected: str) -> float:
    return float(normalise(answer) == normalise(expected))


def _vqa(answer: str, expected: str) -> float:
    return float(normalise_vqa(answer) == normalise_vqa(expected))


def _yesno(answer: str, expected: str) -> float:
    said, wanted = (next(iter(normalise_vqa(text).split()), "") for text in (answer, expected))
    return float(said == wanted and wanted in ("yes", "no"))


def _letter(answer: str, expected: str) -> float:
    said, wanted = (_LETTER.match(normalise(text)) for text in (answer, expected))
    return float(said is not None and wanted is not None and said[1] == wanted[1])


def _anls(answer: str, expected: str) -> float:
    said, wanted = normalise(answer), normalise(expected)
    distance = edit_distance(said, wanted) / max(len(said), len(wanted), 1)
    return 1.0 - distance if distance < ANLS_THRESHOLD else 0.0


_CREDITS: dict[str, Callable[[str, str], float]] = {
    "exact": _exact,
    "vqa": _vqa,
    "yesno": _yesno,
    "letter": _letter,
    "anls": _anls,
}
