"""Source `scenes`: composed scenes as samples, one an image with all its questions.

The replies of such a sample are asked apart, for an earlier one may say what a later one asks. A share of the scenes is
there a second time as a conversation of two turns about two different things, and some samples show two images.
"""

import io
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image
from pydantic import NonNegativeInt

from meteor_model.chat import IMAGE_PLACEHOLDER
from pipelines.data.schema import APART, build_members
from pipelines.data.sources import Packed, SourceError
from pipelines.data.sources.openmoji_drawings import LICENSE
from pipelines.data.sources.scenes import LOOKUPS, SPLITS, Question, Split, compose, compose_pair
from pipelines.data.sources.scenes.drawings import TABLE
from pipelines.data.sources.scenes.parts import seeded
from pipelines.io.fingerprint import sha256
from pipelines.io.validation import Share, settings_class

GENERATOR_VERSION = 1  # raise it when the same settings give other samples
FONTS_LICENSE = "fonts: DejaVu, STIX and Computer Modern, as matplotlib ships them"
QUALITY = 90  # of JPEG, colours at full resolution


@settings_class(error=SourceError)
class ScenesSettings:
    """Scenes of drawings, signs and boards, with questions that their making answers exactly."""

    train: NonNegativeInt = 16_000
    """Scenes for training."""
    validation: NonNegativeInt = 500
    """Scenes for every choice of a recipe."""
    search: NonNegativeInt = 600
    """Scenes for the choice among prunings."""
    final: NonNegativeInt = 2_100
    """Scenes for what is reported: 2,100 of them answer 2,000 questions of each group, without those that look for
    something named in the prompt."""
    second_turn_share: Share = 0.25
    """So many of the scenes are asked a second time, in a conversation of two questions about two things."""
    pair_share: Share = 0.1
    """For each scene so many samples of two images."""
    seed: int = 0
    """Decides everything but what belongs to which split."""


class Scenes:
    """The source; see ScenesSettings."""

    splits: tuple[str, ...] = SPLITS

    def __init__(self, settings: ScenesSettings) -> None:
        self.settings = settings

    def spec(self) -> dict[str, Any]:
        """Name, generator version, hash of the table of drawings, licences, and every setting."""
        return {
            "name": "scenes",
            "version": GENERATOR_VERSION,
            "drawings_sha256": sha256(TABLE.read_bytes()),
            "license": f"{LICENSE}; {FONTS_LICENSE}",
            "settings": asdict(self.settings),
        }

    def report(self) -> dict[str, int]:
        """Nothing: every scene becomes a sample."""
        return {}

    def not_read(self) -> dict[str, int]:
        """Nothing: the material is composed here."""
        return {}

    def samples(self, split: str) -> Iterator[Packed]:
        """Every scene, its second turn where it has one, and pairs. Raises SourceError for an unknown split."""
        found: Split | None = next((name for name in SPLITS if name == split), None)
        if found is None:
            raise SourceError(f"scenes have no split {split!r}; they have {', '.join(SPLITS)}")
        settings = self.settings
        count: int = getattr(settings, found)
        for index in range(count):
            rng = seeded("sample", found, settings.seed, index)
            yield from _of_scene(found, settings.seed, index, rng, rng.random() < settings.second_turn_share)
            if rng.random() < settings.pair_share:
                yield _of_pair(found, settings.seed, index, rng)


def tags_of(question: Question) -> list[str]:
    """What a score is broken down by: group, kind, and what of it training has seen."""
    looked_up = ["lookup"] if question.kind in LOOKUPS else []
    familiar = [f"{question.group}: {what} {value}" for what, value in sorted(question.tags.items())]
    return [question.group, f"{question.group}: {question.kind}", *familiar, *looked_up]


def _of_scene(split: Split, seed: int, index: int, rng: random.Random, twice: bool) -> Iterator[Packed]:
    scene = compose(split, seed, index)
    image = ("jpg", encoded(scene.pixels))
    key = f"{split}_{index:06d}"
    questions = rng.sample(scene.questions, len(scene.questions))
    record = {"id": key, "conversations": _turns([(one, tags_of(one)) for one in questions], 1), "asked": APART}
    yield key, build_members(record, [image])
    if twice and scene.second_turns:
        first, second = scene.second_turns[0]
        turns = _turns([(first, ["first turn"]), (second, ["second turn", f"second turn: {second.group}"])], 1)
        yield f"{key}_turns", build_members({"id": f"{key}_turns", "conversations": turns}, [image])


def _of_pair(split: Split, seed: int, index: int, rng: random.Random) -> Packed:
    pair = compose_pair(split, seed, index)
    key = f"{split}_{index:06d}_pair"
    questions = rng.sample(pair.questions, len(pair.questions))
    asked = [(one, ["two images", f"two images: {one.group}"]) for one in questions]
    record = {"id": key, "conversations": _turns(asked, 2), "asked": APART}
    return key, build_members(record, [("jpg", encoded(pixels)) for pixels in pair.pixels])


def _turns(asked: Sequence[tuple[Question, list[str]]], num_images: int) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for position, (question, tags) in enumerate(asked):
        opening = f"{IMAGE_PLACEHOLDER}\n" * num_images if position == 0 else ""
        turns.append({"from": "human", "value": opening + question.prompt})
        turns.append({"from": "gpt", "value": question.answer, "tags": tags})
    return turns


def encoded(pixels: np.ndarray) -> bytes:
    """A picture (H, W, 3) uint8 as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
