"""Named scorers against their definitions, and groups against a slow closure."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.evaluation.groups import SEARCH_SHARE, components, part_of
from pipelines.evaluation.scorers import SCORERS, Scorer, credit, edit_distance


@pytest.mark.parametrize(
    ("scorer", "answer", "expected", "earned"),
    [
        ("exact", "  A  Grinning face. ", "a grinning face", 1),
        ("exact", "red", "reddish", 0),
        ("exact", "two", "2", 0),
        ("vqa", "two", "2", 1),
        ("vqa", "A dog.", "dog", 1),
        ("vqa", "no!", "no", 1),
        ("vqa", "1,000", "1000", 1),
        ("vqa", "it's 3.5", "its 3.5", 1),
        ("vqa", "red, and blue", "red and blue", 1),
        ("vqa", "cat", "dog", 0),
        ("yesno", "Yes, it is.", "yes", 1),
        ("yesno", "No", "yes", 0),
        ("yesno", "maybe", "maybe", 0),
        ("letter", "(B)", "B", 1),
        ("letter", "b. a dog", "B", 1),
        ("letter", "Answer: C", "c", 1),
        ("letter", "The correct answer is (d).", "D", 1),
        ("letter", "blue", "B", 0),
        ("letter", "A", "B", 0),
        ("anls", "hallo", "hello", 0.8),
        ("anls", "Hello", "hello", 1),
        ("anls", "ab", "cd", 0),
        ("anls", "abcd", "abxy", 0),
        ("anls", "", "", 1),
    ],
)
def test_what_an_answer_earns(scorer: Scorer, answer: str, expected: str, earned: float) -> None:
    assert credit(scorer, answer, expected) == pytest.approx(earned)


words = st.text("ab c", max_size=6)


@given(words, words)
def test_edit_distance_is_the_recursive_one(first: str, second: str) -> None:
    @functools.cache
    def slow(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(slow(i - 1, j) + 1, slow(i, j - 1) + 1, slow(i - 1, j - 1) + (first[i - 1] != second[j - 1]))

    assert edit_distance(first, second) == slow(len(first), len(second))


@given(st.text(max_size=20), st.text(max_size=20))
def test_every_scorer_gives_a_share_and_its_own_text_all_of_it(answer: str, expected: str) -> None:
    for scorer in SCORERS:
        assert 0 <= credit(scorer, answer, expected) <= 1  # type: ignore[arg-type]
    for scorer in ("exact", "vqa", "anls"):
        assert credit(scorer, expected, expected) == 1  # type: ignore[arg-type]


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=3), max_size=10))
def test_groups_are_what_is_linked(names: list[list[str]]) -> None:
    found = components(names)
    linked = [{place} for place in range(len(names))]
    for _ in names:
        for one in range(len(names)):
            for other in range(len(names)):
                if linked[one] & linked[other] or set(names[one]) & set(names[other]):
                    linked[one] = linked[other] = linked[one] | linked[other]
    for one, own in enumerate(names):
        assert found[one] == (min(min(names[place]) for place in linked[one]) if own else "")


def test_a_quarter_of_the_groups_is_for_the_search() -> None:
    share = sum(part_of(f"group {number}", "heldout") == "search" for number in range(4000)) / 4000
    assert share == pytest.approx(SEARCH_SHARE, abs=0.02)
