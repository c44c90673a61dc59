"""The questions of scenes as values: kinds, groups, wordings, and all texts that a tokenizer is trained on.

Prompts are lower case; what is read off a picture is capitals and digits.
"""

import itertools
import string
from dataclasses import dataclass, field
from typing import Literal

from pipelines.data.sources.drawing import PALETTE
from pipelines.data.sources.scenes.drawings import CATEGORIES, names

Group = Literal["knowledge", "general", "ocr", "grounding"]
GROUPS: tuple[Group, ...] = ("knowledge", "general", "ocr", "grounding")

NUMBERS = ("zero", "one", "two", "three", "four")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
SIDES = ("left", "right")
HEIGHTS = ("top", "middle", "bottom")
ORDER = ("first", "second")

KINDS: dict[str, tuple[Group, tuple[str, ...]]] = {
    "category": ("knowledge", ("what kind of thing is drawn?", "what kind of thing is {place}?")),
    "name": ("knowledge", ("what is drawn?", "what is {place}?")),
    "color": ("general", ("what color is the background?",)),
    "count_drawings": ("general", ("how many drawings are there?",)),
    "count_signs": ("general", ("how many signs are there?",)),
    "count_lines": ("general", ("how many lines are there?",)),
    "any_number": ("general", ("is there a number?",)),
    "line_is_number": ("general", ("is line {line} a number?",)),
    "any_category": ("general", ("is there any {category}?",)),
    "any_name": ("general", ("is there any {name}?",)),
    "sign": ("ocr", ("what does the sign say?",)),
    "upper_sign": ("ocr", ("what does the upper sign say?",)),
    "lower_sign": ("ocr", ("what does the lower sign say?",)),
    "line": ("ocr", ("read line {line}.",)),
    "number": ("ocr", ("read the number.",)),
    "where_drawing": ("grounding", ("where is the drawing?",)),
    "where_sign": ("grounding", ("where is the sign?",)),
    "side_of_sign": ("grounding", ("which side is the sign on?", "which side is the {which} sign on?")),
    "line_of_number": ("grounding", ("which line is the number on?",)),
    "where_category": ("grounding", ("where is the {category}?",)),
    "where_name": ("grounding", ("where is the {name}?",)),
    "beside": ("grounding", ("what kind of thing is {side} of the {category}?",)),
    "letter": ("ocr", ("what is the {end} letter of line {line}?", "what is the {end} letter of the {which} sign?")),
    "category_here": ("grounding", ("is there any {category} {place}?",)),
    "image_color": ("general", ("what color is the background of the {order} image?",)),
    "image_count": ("general", ("how many drawings are in the {order} image?",)),
    "image_category": ("knowledge", ("what kind of thing is drawn in the {order} image?",)),
    "image_sign": ("ocr", ("what does the sign in the {order} image say?",)),
    "which_color": ("grounding", ("which image has a {color} background?",)),
    "which_more": ("grounding", ("which image has more drawings?",)),
}
"""What is asked: the group whose score it enters, and its wordings, one for each set of fields."""
LOOKUPS = ("any_category", "any_name", "where_category", "where_name", "beside")
"""Kinds that look for something named in the prompt. A model of 10 million parameters stayed at chance there; scores
are stated with and without them."""
LEARNING = ("letter", "category_here")
"""Kinds that are steps on the way, asked in training alone."""

_WORDINGS = {
    (kind, frozenset(name for _, name, _, _ in string.Formatter().parse(wording) if name)): wording
    for kind, (_, wordings) in KINDS.items()
    for wording in wordings
}


@dataclass(frozen=True)
class Question:
    """A question with its only right answer.

    Attributes:
        kind: one of KINDS.
        group: of the kind.
        prompt: without the image's placeholder.
        answer: lower case, or what is written in the picture.
        subject: what the answer is about, as "drawing 0", "sign 1", "background".
        tags: of what the answer depends on. `drawing` and `font`: whether training has "seen" it, or it is "unseen";
            `word`, the same of the text; `text`: "number", "letters" or "word".
        learning: a step on the way, asked in training alone.
    """

    kind: str
    group: Group
    prompt: str
    answer: str
    subject: str
    tags: dict[str, str] = field(default_factory=dict)
    learning: bool = False


def asked(kind: str, answer: str, subject: str, tags: dict[str, str] | None = None, **fields: str) -> Question:
    """A question of a kind, in the wording that has these fields."""
    prompt = _WORDINGS[kind, frozenset(fields)].format(**fields)
    return Question(kind, KINDS[kind][0], prompt, answer, subject, tags or {}, kind in LEARNING)


def _values() -> dict[str, tuple[str, ...]]:
    """What each field of a wording may be."""
    return {
        "place": (*(f"at the {quadrant}" for quadrant in QUADRANTS), *(f"on the {side}" for side in SIDES)),
        "line": NUMBERS[1:],
        "category": CATEGORIES,
        "name": names(),
        "side": SIDES,
        "which": ("upper", "lower", "only"),
        "end": ("first", "last"),
        "order": ORDER,
        "color": tuple(PALETTE),
    }


def prompts() -> tuple[str, ...]:
    """Every prompt that a scene or a pair of scenes can have."""
    values = _values()
    return tuple(
        wording.format(**dict(zip(fields, chosen, strict=True)))
        for (_, fields), wording in _WORDINGS.items()
        for chosen in itertools.product(*(values[name] for name in fields))
    )


def answers() -> tuple[str, ...]:
    """Every answer but those that are read off a picture."""
    return (*CATEGORIES, *names(), *PALETTE, *NUMBERS, *QUADRANTS, *SIDES, *HEIGHTS, *ORDER, "yes", "no")


VOCABULARY_SIZE = 1024
"""Of a byte-level BPE trained on `texts`: each name and each answer is a token or a few. Nothing in `texts` is written
in capitals or digits, so that what is read stays a token a character."""


def texts() -> tuple[str, ...]:
    """All texts that a tokenizer is trained on: prompts as they follow an image, answers as they follow a prompt."""
    return (*(f"\n{prompt}" for prompt in prompts()), *(f" {answer}" for answer in answers()))
