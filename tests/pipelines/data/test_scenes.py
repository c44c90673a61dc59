"""Scenes: exact answers against a literal oracle and the pixels, parts that share nothing, balance, counts, samples."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data.build import make_shards
from pipelines.data.schema import parse_sample
from pipelines.data.shards import Manifest, read_shard
from pipelines.data.sources import SourceError
from pipelines.data.sources.drawing import PALETTE
from pipelines.data.sources.openmoji_drawings import family_of
from pipelines.data.sources.scenes import (
    GROUPS,
    KINDS,
    LEARNING,
    LOOKUPS,
    SIDE,
    SPLITS,
    VOCABULARY_SIZE,
    Facts,
    Scene,
    compose,
    compose_pair,
    texts,
)
from pipelines.data.sources.scenes.drawings import entries, pool
from pipelines.data.sources.scenes.lettering import laid_out
from pipelines.data.sources.scenes.parts import FONTS, split_of_text, words
from pipelines.data.sources.scenes.source import Scenes, ScenesSettings
from pipelines.evaluation.questions import Questions
from pipelines.evaluation.scores import ScoringError
from pipelines.evaluation.suite import Suite
from pipelines.io.fingerprint import sha256_of_json
from tests.meteor_model.builders import processor

HELD = ("validation", "search", "final")
SMALL = ScenesSettings(train=8, validation=3, search=4, final=8, second_turn_share=0.5, pair_share=0.5)


@pytest.fixture(scope="module")
def final() -> list[Scene]:
    """The final part as the source has it by default."""
    return [compose("final", 0, index) for index in range(ScenesSettings().final)]


# ------------------------------------------------------------------------------------------------- a literal oracle

COUNTED = ("zero", "one", "two", "three", "four")


def read_off(facts: Facts, prompt: str) -> set[str]:  # noqa: C901, PLR0912 - a case for every wording
    """Every right answer to a prompt about one scene, from the words of the prompt."""
    things, signs = facts.drawings, facts.signs

    def at(place: str) -> list[int]:
        if place.startswith("at the "):
            return [i for i, t in enumerate(things) if f"{t.half} {t.side}" == place.removeprefix("at the ")]
        return [i for i, t in enumerate(things) if t.side == place.removeprefix("on the ")]

    def where(index: int) -> str:
        return f"{things[index].half} {things[index].side}".strip()

    by_position = {"only": 0, "upper": 0, "lower": 1} | {word: i - 1 for i, word in enumerate(COUNTED)}
    if prompt == "what color is the background?":
        return {facts.background}
    if match := re.fullmatch("how many (drawings|signs|lines) are there[?]", prompt):
        return {COUNTED[len(things if match[1] == "drawings" else signs)]}
    if prompt == "is there a number?":
        return {"yes" if any(sign.text.isdigit() for sign in signs) else "no"}
    if match := re.fullmatch("is line (.*) a number[?]", prompt):
        return {"yes" if signs[by_position[match[1]]].text.isdigit() else "no"}
    if match := re.fullmatch("is there any (\\w+) ((?:at|on) the .*)[?]", prompt):
        return {"yes" if match[1] in {things[i].category for i in at(match[2])} else "no"}
    if match := re.fullmatch("is there any (.*)[?]", prompt):
        return {"yes" if match[1] in {word for t in things for word in (t.category, t.name)} else "no"}
    if prompt in ("what kind of thing is drawn?", "what is drawn?"):
        assert len(things) == 1
        return {things[0].category if "kind" in prompt else things[0].name}
    if match := re.fullmatch("what kind of thing is (left|right) of the (.*)[?]", prompt):
        mates = [t for t in things for o in things if o.category == match[2] and o.half == t.half and o.side != t.side]
        return {t.category for t in mates if t.side == match[1]}
    if match := re.fullmatch("what is the (first|last) letter of (?:the|line) (\\w+)(?: sign)?[?]", prompt):
        return {signs[by_position[match[2]]].text[0 if match[1] == "first" else -1]}
    if match := re.fullmatch("what (kind of thing )?is (.*)[?]", prompt):
        return {things[i].category if match[1] else things[i].name for i in at(match[2])}
    if prompt == "where is the drawing?":
        return {where(0)} if len(things) == 1 else set()
    if prompt == "where is the sign?":
        return {sign.height for sign in signs}
    if match := re.fullmatch("where is the (.*)[?]", prompt):
        return {where(i) for i, t in enumerate(things) if match[1] in (t.category, t.name)}
    if prompt == "which line is the number on?":
        return {COUNTED[i + 1] for i, sign in enumerate(signs) if sign.text.isdigit()}
    if match := re.fullmatch("which side is the (?:(upper|lower) )?sign on[?]", prompt):
        assert match[1] or len(signs) == 1
        return {signs[by_position[match[1] or "only"]].side}
    if prompt == "read the number.":
        return {sign.text for sign in signs if sign.text.isdigit()}
    if match := re.fullmatch("read line (.*)[.]", prompt):
        return {signs[by_position[match[1]]].text}
    if prompt == "what does the sign say?":
        return {sign.text for sign in signs}
    if match := re.fullmatch("what does the (upper|lower) sign say[?]", prompt):
        assert len(signs) == 2
        return {signs[by_position[match[1]]].text}
    raise AssertionError(prompt)


def read_off_pair(facts: tuple[Facts, Facts], prompt: str) -> set[str]:
    order = dict(zip(("first", "second"), facts, strict=True))
    if match := re.fullmatch("which image has a (.*) background[?]", prompt):
        return {which for which, one in order.items() if one.background == match[1]}
    if prompt == "which image has more drawings?":
        return {which for which, one in order.items() if len(one.drawings) == max(len(f.drawings) for f in facts)}
    one = order[next(word for word in prompt.split() if word in order)]
    alone = re.sub(" (of|in) the (first|second) image", "", prompt)
    return read_off(one, {"how many drawings are?": "how many drawings are there?"}.get(alone, alone))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_the_only_right_one(split: str) -> None:
    kinds: set[str] = set()
    known = set(texts())
    for index in range(80):
        scene, pair = compose(split, 3, index), compose_pair(split, 3, index)  # type: ignore[arg-type]
        assert [read_off(scene.facts, q.prompt) for q in scene.questions] == [{q.answer} for q in scene.questions]
        assert [read_off_pair(pair.facts, q.prompt) for q in pair.questions] == [{q.answer} for q in pair.questions]
        for question in (*scene.questions, *pair.questions):
            kinds.add(question.kind)
            assert question.group == KINDS[question.kind][0]
            assert f"\n{question.prompt}" in known
            assert question.group == "ocr" or f" {question.answer}" in known
            assert question.learning == (question.kind in LEARNING)
            assert split == "train" or not question.learning
        for first, second in scene.second_turns:
            assert first.subject != second.subject
            assert first in scene.questions
            assert second in scene.questions
    assert kinds == set(KINDS) - (set() if split == "train" else set(LEARNING))


# ---------------------------------------------------------------------------------------------------------- the pixels


def _nearest(pixels: np.ndarray) -> str:
    """The palette's colour that is nearest to most of (..., 3)."""
    colors = np.array(list(PALETTE.values()), dtype=np.int64)
    distances = ((pixels.reshape(-1, 1, 3).astype(np.int64) - colors) ** 2).sum(axis=2)
    return list(PALETTE)[int(np.bincount(distances.argmin(axis=1)).argmax())]


def test_the_pixels_show_what_the_facts_say() -> None:
    """The background at the rim; in scenes without signs each quarter has ink if, and only if, a drawing lies there."""
    quarters = {"top left": (0, 0), "top right": (0, 96), "bottom left": (96, 0), "bottom right": (96, 96)}
    without_signs = 0
    for index in range(60):
        scene = compose("train", 4, index)
        assert scene.pixels.shape == (SIDE, SIDE, 3)
        assert scene.pixels.dtype == np.uint8
        rim = np.concatenate([scene.pixels[:, 0], scene.pixels[:, -1]])
        assert _nearest(rim) == scene.facts.background
        if not scene.facts.signs:
            without_signs += 1
            ground = np.median(rim, axis=0)
            inked = {
                name
                for name, (top, left) in quarters.items()
                if (np.abs(scene.pixels[top : top + 96, left : left + 96] - ground).max(axis=2) > 50).sum() > 40
            }
            assert inked == {thing.quadrant for thing in scene.facts.drawings}
    assert without_signs > 5


def test_every_letter_is_where_it_is_said_to_be() -> None:
    for index in range(30):
        scene = compose("final", 5, index)
        spelled = "".join(letter.character for letter in scene.letters)
        assert spelled == "".join(sign.text for sign in scene.facts.signs)
        begin = 0
        for sign in scene.facts.signs:
            letters = scene.letters[begin : begin + len(sign.text)]
            begin += len(sign.text)
            assert [letter.place for letter in letters] == list(range(len(sign.text)))
            assert {letter.length for letter in letters} == {len(sign.text)}
            assert all(one.x < two.x for one, two in itertools.pairwise(letters))
        for letter in scene.letters:
            x, y = round(letter.x), round(letter.y)
            around = scene.pixels[max(y - 16, 0) : y + 17, max(x - 9, 0) : x + 10].astype(np.float64)
            assert np.ptp(around @ [0.299, 0.587, 0.114]) > 60, (index, letter)


@pytest.mark.parametrize("font", ["DejaVuSansMono", "cmtt10"])
def test_letters_are_the_runs_of_inked_columns(font: str) -> None:
    """In a font of equal widths letters do not touch: the middle of each is found from the pixels alone."""
    line = laid_out("L1TFUL", font, 36)
    image = Image.new("RGB", (SIDE, 60))
    letters = line.paste(image, 9, 11, (255, 255, 255))
    ink = np.asarray(image)[:, :, 0] > 0
    columns = np.flatnonzero(np.diff(np.concatenate([[False], ink.any(axis=0), [False]]).astype(int)))
    runs = columns.reshape(-1, 2)
    assert [letter.x for letter in letters] == [(left + right) / 2 for left, right in runs]
    rows = [np.flatnonzero(ink[:, left:right].any(axis=1)) for left, right in runs]
    assert [letter.y for letter in letters] == [(of[0] + of[-1] + 1) / 2 for of in rows]
    assert (runs[0][0], min(of[0] for of in rows)) == (9, 11)
    assert (line.width, line.height) == (runs[-1][1] - 9, max(of[-1] for of in rows) + 1 - 11)


def test_a_scene_depends_on_its_arguments_alone() -> None:
    first = compose("search", 7, 3)
    compose("train", 1, 1)
    again, other, seeded = compose("search", 7, 3), compose("search", 7, 4), compose("search", 8, 3)
    assert np.array_equal(first.pixels, again.pixels)
    assert (first.facts, first.letters, first.questions) == (again.facts, again.letters, again.questions)
    assert first.second_turns == again.second_turns
    assert not np.array_equal(first.pixels, other.pixels)
    assert not np.array_equal(first.pixels, seeded.pixels)
    with pytest.raises(ValueError, match="no split 'test'; they have train, validation, search, final"):
        compose("test", 0, 0)  # type: ignore[arg-type]


def test_what_is_composed_is_pinned() -> None:
    """Another digest is another suite: raise GENERATOR_VERSION of the source with it."""
    scenes = [compose(split, 0, index) for split in SPLITS for index in range(8)]
    asked = [[(q.prompt, q.answer) for q in scene.questions] for scene in scenes]
    facts = [asdict(scene.facts) for scene in scenes]
    for drawing in (drawing for own in facts for drawing in own["drawings"]):
        del drawing["box"]  # nothing is asked of it
    assert sha256_of_json([facts, asked])[:12] == "a2e26c1577ca"


# ----------------------------------------------------------------------------------------------------------- the parts


def test_parts_share_no_code_point_no_text_and_no_font(final: list[Scene]) -> None:
    facts = {split: [compose(split, 0, i).facts for i in range(120)] for split in ("train", "validation", "search")}
    facts["final"] = [scene.facts for scene in final]
    code_points = {s: {d.code_point for f in found for d in f.drawings} for s, found in facts.items()}
    families = {s: set(map(family_of, found)) for s, found in code_points.items()}
    written = {s: {sign.text for f in found for sign in f.signs} for s, found in facts.items()}
    fonts = {s: {sign.font for f in found for sign in f.signs} for s, found in facts.items()}
    for one, other in itertools.combinations(HELD, 2):
        assert not families[one] & families[other]
        assert not fonts[one] & fonts[other]
    for one, other in itertools.combinations(SPLITS, 2):
        assert not written[one] & written[other]
    trained = {family_of(entry.code_point) for entry in entries() if entry.split == "train"}
    for split in HELD:
        for found in facts[split]:
            for thing in found.drawings:
                assert (thing.familiarity == "seen") == (family_of(thing.code_point) in trained)
                assert thing.familiarity == "seen" or not thing.name
            for sign in found.signs:
                assert (sign.familiarity == "seen") == (sign.font in FONTS["train", "seen"])
    assert {s.familiarity for f in facts["validation"] for s in f.signs} == {"seen"}
    for split in ("search", "final"):
        shares = Counter(sign.familiarity for f in facts[split] for sign in f.signs)
        assert 0.4 < shares["seen"] / shares.total() < 0.6


def test_pools_are_whole_and_disjoint() -> None:
    drawn: dict[str, set[str]] = defaultdict(set)
    for split in HELD:
        for familiarity in ("seen", "unseen"):
            mine = pool(split, familiarity)
            drawn[split] |= {family_of(entry.code_point) for of in mine.by_category.values() for entry in of}
            assert bool(mine.named) == (familiarity == "seen")
    for one, other in itertools.combinations(HELD, 2):
        assert not drawn[one] & drawn[other]
    assert set().union(*drawn.values()) == {family_of(entry.code_point) for entry in entries()}
    assert all(split_of_text(word) == split for split in SPLITS for word in words(split))
    assert sum(len(words(split)) for split in SPLITS) == 2225
    with pytest.raises(ValueError, match="no unseen drawings"):
        pool("train", "unseen")


# -------------------------------------------------------------------------------------------------- balance and number


def test_yes_is_as_often_right_as_no_and_the_words_do_not_tell(final: list[Scene]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    by_prompt: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in final:
        for question in scene.questions:
            if question.answer in ("yes", "no"):
                answers[question.kind][question.answer] += 1
                by_prompt[question.prompt][question.answer] += 1
    assert set(answers) == {"any_number", "line_is_number", "any_category", "any_name"}
    for kind, counts in answers.items():
        assert abs(counts["yes"] / counts.total() - 0.5) < 0.06, (kind, counts)
    frequent = [counts for counts in by_prompt.values() if counts.total() >= 60]
    assert len(frequent) > 12
    told = sum(max(counts.values()) for counts in frequent) / sum(counts.total() for counts in frequent)
    assert told < 0.58, "guessing by the words of the prompt alone"


def test_the_final_part_has_two_thousand_questions_of_each_group(final: list[Scene]) -> None:
    counts = Counter(q.group for scene in final for q in scene.questions if q.kind not in LOOKUPS)
    assert set(counts) == set(GROUPS)
    assert min(counts.values()) >= 2_000, counts
    familiar: Counter[tuple[str, str, str]] = Counter(
        (q.group, what, v) for scene in final for q in scene.questions for what, v in q.tags.items()
    )
    for group, what in (("knowledge", "drawing"), ("ocr", "font")):
        assert min(familiar[group, what, "seen"], familiar[group, what, "unseen"]) >= 800


def test_no_text_for_the_tokenizer_has_what_is_read() -> None:
    found = "".join(texts())
    assert found == found.lower()
    assert not any(character.isdigit() for character in found)
    assert len({piece for text in texts() for piece in text.split()}) < VOCABULARY_SIZE - 256


# ------------------------------------------------------------------------------------------------------------- samples


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(Scenes(SMALL), str(tmp_path_factory.mktemp("scenes"))).manifest


def test_samples_hold_every_question(made: Manifest) -> None:
    assert made.splits == tuple(sorted(SPLITS))
    assert made.report == {}
    kinds: Counter[str] = Counter()
    for split in SPLITS:
        members = {k: m for info in made.split(split) for k, m in read_shard(made.url, info)}
        for index in range(getattr(SMALL, split)):
            key = f"{split}_{index:06d}"
            sample, scene = parse_sample(key, members.pop(key)), compose(split, 0, index)
            assert sample.apart
            replies = [turn for turn in sample.turns if turn.role == "assistant"]
            assert sorted(turn.text for turn in replies) == sorted(q.answer for q in scene.questions)
            assert all(set(turn.tags) & set(GROUPS) for turn in replies)
        for key, rest in members.items():
            sample = parse_sample(key, rest)
            kinds[key.rpartition("_")[2]] += 1
            assert len(sample.images) == (2 if key.endswith("_pair") else 1)
            assert sample.apart == key.endswith("_pair")
    assert kinds["pair"] > 2
    assert kinds["turns"] > 2
    with pytest.raises(SourceError, match="no split 'heldout'"):
        next(Scenes(SMALL).samples("heldout"))


def test_the_spec_pins_the_suite(made: Manifest, tmp_path: Path) -> None:
    again = make_shards(Scenes(SMALL), str(tmp_path)).manifest
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in made.shards]
    spec = json.loads(json.dumps(made.spec))["source"]
    assert (spec["name"], spec["settings"]["seed"], len(spec["drawings_sha256"])) == ("scenes", 0, 64)


def _read(made: Manifest, part: str) -> Questions:
    suite = Suite.of(made, "heldout", 10_000, part=part)  # type: ignore[arg-type]
    assert suite.split == part
    return suite.read(processor(), 100_000)


def test_a_part_of_the_suite_is_a_split_and_its_questions_are_asked_apart(made: Manifest) -> None:
    parts = {part: _read(made, part) for part in ("search", "final")}
    assert all(not any(found.left_out.values()) for found in parts.values())
    keys = {part: {question.sample for question in found.asked} for part, found in parts.items()}
    assert not keys["search"] & keys["final"]
    for found in parts.values():
        for question in found.asked:
            two = "turns" in question.sample and question.key.endswith("#1")
            assert len(question.turns) == (3 if two else 1)
            assert len(question.images) == (2 if question.sample.endswith("_pair") else 1)
            assert question.tags
    groups = {question.group for question in parts["final"].asked}
    assert len(groups) == SMALL.final + sum(key.endswith("_pair") for key in keys["final"])
    with pytest.raises(ScoringError, match="part 'final' of split 'search'"):
        Suite.of(made, "search", 5, part="final").read(processor(), 100_000)
