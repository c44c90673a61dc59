"""The questions that a scene answers, as a function of its facts. What has more than one right answer is not asked."""

import random
from collections.abc import Iterator, Sequence

from pipelines.data.sources.scenes.drawings import CATEGORIES
from pipelines.data.sources.scenes.facts import DrawnThing, Facts, Sign
from pipelines.data.sources.scenes.layout import pick
from pipelines.data.sources.scenes.parts import TEXT_SHARES
from pipelines.data.sources.scenes.prompts import NUMBERS, ORDER, Question, asked

SECOND_TURNS = 2
"""Conversations of two questions that are made of a scene."""


def questions_of(facts: Facts, rng: random.Random) -> tuple[Question, ...]:
    """All questions that a scene answers; steps on the way, too, where it is for training."""
    found = [*_general(facts, rng), *(_of_board(facts) if facts.board else _of_scene(facts, rng))]
    if facts.split == "train":
        found += _steps(facts, rng)
    return tuple(found)


def second_turns(questions: Sequence[Question], rng: random.Random) -> tuple[tuple[Question, Question], ...]:
    """Pairs of questions about two different things of one scene, none of them a step on the way."""
    open_questions = [question for question in questions if not question.learning]
    pairs = [(one, two) for one in open_questions for two in open_questions if one.subject != two.subject]
    return tuple(rng.sample(pairs, min(SECOND_TURNS, len(pairs))))


def _yes(there: bool) -> str:
    return "yes" if there else "no"


def _of_sign(facts: Facts, sign: Sign) -> dict[str, str]:
    word = "seen" if facts.split == "train" else "unseen"
    return {"font": sign.familiarity, "word": word, "text": sign.kind}


def _of_drawing(thing: DrawnThing) -> dict[str, str]:
    return {"drawing": thing.familiarity}


# ------------------------------------------------------------------------------------------------------------- general


def _general(facts: Facts, rng: random.Random) -> Iterator[Question]:
    yield asked("color", facts.background, "background")
    if facts.board:
        yield asked("count_lines", NUMBERS[len(facts.signs)], "signs")
    else:
        yield asked("count_drawings", NUMBERS[len(facts.drawings)], "drawings")
        yield asked("count_signs", NUMBERS[len(facts.signs)], "signs")
    if facts.signs:
        yield from _numbers(facts, rng)


def _numbers(facts: Facts, rng: random.Random) -> Iterator[Question]:
    """Whether any text is a number, and whether a certain line is one: "yes" and "no" equally often.

    n texts hold a number with the chance p = 1 - (1 - s)^n, s being a text's own; the likelier answer is asked so much
    less often.
    """
    share = TEXT_SHARES[facts.split][0]
    are_numbers = [sign.kind == "number" for sign in facts.signs]
    if _kept(rng, 1 - (1 - share) ** len(are_numbers), any(are_numbers)):
        yield asked("any_number", _yes(any(are_numbers)), "signs")
    if facts.board:
        line = rng.randrange(len(are_numbers))
        if _kept(rng, share, are_numbers[line]):
            tags = _of_sign(facts, facts.signs[line])
            yield asked("line_is_number", _yes(are_numbers[line]), f"sign {line}", tags, line=NUMBERS[line + 1])
    if len(are_numbers) > 1 and sum(are_numbers) == 1:
        line = are_numbers.index(True)
        sign = facts.signs[line]
        yield asked("number", sign.text, f"sign {line}", _of_sign(facts, sign))


def _kept(rng: random.Random, chance_of_yes: float, there: bool) -> bool:
    """Whether to ask, so that "yes" and "no" are asked equally often."""
    mine = chance_of_yes if there else 1 - chance_of_yes
    return rng.random() < min(1.0, (1 - mine) / mine)


# --------------------------------------------------------------------------------------------------- boards and scenes


def _of_board(facts: Facts) -> Iterator[Question]:
    for line, sign in enumerate(facts.signs):
        yield asked("line", sign.text, f"sign {line}", _of_sign(facts, sign), line=NUMBERS[line + 1])
    numbers = [line for line, sign in enumerate(facts.signs) if sign.kind == "number"]
    if len(numbers) == 1:
        yield asked(
            "line_of_number", NUMBERS[numbers[0] + 1], f"sign {numbers[0]}", _of_sign(facts, facts.signs[numbers[0]])
        )


def _of_scene(facts: Facts, rng: random.Random) -> Iterator[Question]:
    for place, thing in enumerate(facts.drawings):
        yield from _what(facts, place, thing)
    if len(facts.drawings) == 1 and facts.drawings[0].quadrant:
        yield asked("where_drawing", facts.drawings[0].quadrant, "drawing 0")
    yield from _lookups(facts, rng)
    alone = len(facts.signs) == 1
    for place, sign in enumerate(facts.signs):
        subject, which = f"sign {place}", ("upper", "lower")[place]
        yield asked("sign" if alone else f"{which}_sign", sign.text, subject, _of_sign(facts, sign))
        if alone:
            yield asked("where_sign", sign.height, subject)
        if sign.side:
            yield asked("side_of_sign", sign.side, subject, {}, **({} if alone else {"which": which}))


def _place_of(thing: DrawnThing) -> str:
    """As "at the top left", or "on the left" where it lies across the middle."""
    return f"at the {thing.quadrant}" if thing.quadrant else f"on the {thing.side}"


def _what(facts: Facts, place: int, thing: DrawnThing) -> Iterator[Question]:
    fields = {} if len(facts.drawings) == 1 else {"place": _place_of(thing)}
    yield asked("category", thing.category, f"drawing {place}", _of_drawing(thing), **fields)
    if thing.name:
        yield asked("name", thing.name, f"drawing {place}", _of_drawing(thing), **fields)


def _lookups(facts: Facts, rng: random.Random) -> Iterator[Question]:
    """What looks for something that the prompt names: is it there, where is it, what is beside it."""
    things = facts.drawings
    for place, thing in enumerate(things):
        if len(things) == 1:
            break  # its place is asked without naming it
        subject, tags = f"drawing {place}", _of_drawing(thing)
        answer = thing.quadrant or thing.side
        if [other.category for other in things].count(thing.category) == 1:
            yield asked("where_category", answer, subject, tags, category=thing.category)
            for other_place, other in enumerate(things):
                if other.half == thing.half and other.side != thing.side:
                    of = {"side": other.side, "category": thing.category}
                    yield asked("beside", other.category, f"drawing {other_place}", tags, **of)
        if thing.name:
            yield asked("where_name", answer, subject, tags, name=thing.name)
    categories = {thing.category for thing in things}
    category, there = _one_of(facts, rng, sorted(categories), "category")
    yield asked("any_category", _yes(there), "drawings", _of_drawing(things[0]), category=category)
    if named := sorted(thing.name for thing in things if thing.name):
        name, there = _one_of(facts, rng, named, "name")
        yield asked("any_name", _yes(there), "drawings", _of_drawing(things[0]), name=name)


def _one_of(facts: Facts, rng: random.Random, present: Sequence[str], what: str) -> tuple[str, bool]:
    """A category or name that is there, or as often one that is not: of a drawing that might have been there.

    Drawn as the scene's own were, so that the word alone says nothing.
    """
    if rng.random() < 0.5:
        return rng.choice(present), True
    while True:
        entry = pick(rng, facts.split, facts.drawings[0].familiarity, facts.background)
        value: str = getattr(entry, what)
        if value and value not in present:
            return value, False


# -------------------------------------------------------------------------------------------------- steps on the way


def _steps(facts: Facts, rng: random.Random) -> Iterator[Question]:
    """Easier questions for learning: the first or last letter of a text, and whether a place holds a category."""
    for place, sign in enumerate(facts.signs):
        end = rng.choice(("first", "last"))
        letter = sign.text[0 if end == "first" else -1]
        which = "only" if len(facts.signs) == 1 else ("upper", "lower", "", "")[place]
        where = {"line": NUMBERS[place + 1]} if facts.board else {"which": which}
        yield asked("letter", letter, f"sign {place}", _of_sign(facts, sign), end=end, **where)
    for place, thing in enumerate(facts.drawings):
        others = sorted({other.category for other in facts.drawings} - {thing.category})
        category = thing.category
        if rng.random() < 0.5:  # a wrong one, as often as not one of the same picture
            near = others and rng.random() < 0.5
            category = rng.choice(others if near else [name for name in CATEGORIES if name != thing.category])
        tags = _of_drawing(thing)
        there = category == thing.category
        fields = {"category": category, "place": _place_of(thing)}
        yield asked("category_here", _yes(there), f"drawing {place}", tags, **fields)


# ------------------------------------------------------------------------------------------------------- several images


def questions_of_pair(facts: tuple[Facts, Facts], rng: random.Random) -> tuple[Question, ...]:
    """The questions that two scenes, shown one after the other, answer: about one of them, and about which."""
    found: list[Question] = []
    for order, one in zip(ORDER, facts, strict=True):
        found.append(asked("image_color", one.background, f"{order} background", order=order))
        found.append(asked("image_count", NUMBERS[len(one.drawings)], f"{order} drawings", order=order))
        if len(one.drawings) == 1:
            tags = _of_drawing(one.drawings[0])
            found.append(asked("image_category", one.drawings[0].category, f"{order} drawing", tags, order=order))
        if len(one.signs) == 1:
            found.append(
                asked("image_sign", one.signs[0].text, f"{order} sign", _of_sign(one, one.signs[0]), order=order)
            )
    colors, counts = [one.background for one in facts], [len(one.drawings) for one in facts]
    if colors[0] != colors[1]:
        which = rng.randrange(2)
        found.append(asked("which_color", ORDER[which], "backgrounds", color=colors[which]))
    if counts[0] != counts[1]:
        found.append(asked("which_more", ORDER[counts.index(max(counts))], "all drawings"))
    return tuple(found)
