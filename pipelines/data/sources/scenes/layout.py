"""Where things lie in a scene of 192 pixels, and how it is painted.

A scene has horizontal bands, each for drawings (two cells) or for a sign; a board has bands of equal height, a line of
text in each.
"""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from pipelines.data.sources.drawing import PALETTE
from pipelines.data.sources.scenes.drawings import Entry, image_of, pool
from pipelines.data.sources.scenes.facts import DrawnThing, Facts, Sign
from pipelines.data.sources.scenes.lettering import Colour, Letter, fitted
from pipelines.data.sources.scenes.parts import FONTS, TEXT_KINDS, TEXT_SHARES, Familiarity, Split, draw_text

SIDE = 192
BOARD_SHARE = 0.4
SIGN_SHARES = (0.2, 0.45, 0.35)  # of scenes with no, one and two signs
DRAWING_SHARES = (0.3, 0.3, 0.2, 0.2)  # of one to four drawings, where there is room for four
NAMED_SHARE = 0.4  # of drawings that are drawn among those with a name
FONT_SIZES = (24, 38)
LEAST_SIZE = 14  # of a text that would not fit otherwise
MIN_CONTRAST = 100.0  # of luminance (of 255) between text and ground
NEAR_MIDDLE = 20  # pixels from the middle within which a sign is on neither side
NAMED_INKS: tuple[Colour, ...] = ((0, 0, 0), (255, 255, 255), (30, 30, 90), (120, 0, 0), (250, 240, 120))

Use = Literal["drawings", "sign"]


@dataclass(frozen=True)
class Band:
    """Rows `top` to `bottom` of a picture, what they are for, and how their place is called."""

    use: Use
    top: int
    bottom: int
    called: str


def _bands(*bands: tuple[Use, int, int, str]) -> tuple[Band, ...]:
    return tuple(Band(*band) for band in bands)


LAYOUTS: tuple[tuple[tuple[Band, ...], ...], ...] = (
    (_bands(("drawings", 0, 96, "top"), ("drawings", 96, 192, "bottom")),),
    (
        _bands(("sign", 0, 42, "top"), ("drawings", 42, 117, "top"), ("drawings", 117, 192, "bottom")),
        _bands(("drawings", 0, 75, "top"), ("sign", 75, 117, "middle"), ("drawings", 117, 192, "bottom")),
        _bands(("drawings", 0, 75, "top"), ("drawings", 75, 150, "bottom"), ("sign", 150, 192, "bottom")),
    ),
    (
        _bands(("sign", 0, 44, "top"), ("sign", 44, 88, "top"), ("drawings", 96, 192, "bottom")),
        _bands(("drawings", 0, 96, "top"), ("sign", 102, 147, "bottom"), ("sign", 147, 192, "bottom")),
        _bands(("sign", 0, 46, "top"), ("drawings", 46, 146, ""), ("sign", 146, 192, "bottom")),
    ),
)
"""By number of signs; a band of drawings that lies across the middle is called ""."""


@dataclass
class Canvas:
    """A picture while it is painted, and the letters on it so far."""

    image: Image.Image
    ground: Colour
    letters: list[Letter] = field(default_factory=list)


def painted(rng: random.Random, split: Split, board: bool) -> tuple[np.ndarray, tuple[Letter, ...], Facts]:
    """A picture (SIDE, SIDE, 3) uint8, its letters, and all that it shows."""
    background = rng.choice(list(PALETTE))
    red, green, blue = (min(255, max(0, value + rng.randint(-10, 10))) for value in PALETTE[background])
    canvas = Canvas(Image.new("RGB", (SIDE, SIDE), (red, green, blue)), (red, green, blue))
    shown, written = _familiarity(rng, split, "drawings"), _familiarity(rng, split, "fonts")
    drawings: tuple[DrawnThing, ...] = ()
    if board:
        count = rng.randint(2, 4)
        edges = [round(SIDE * place / count) for place in range(count + 1)]
        bands = [Band("sign", top, bottom, "") for top, bottom in pairwise(edges)]
    else:
        bands = list(rng.choice(LAYOUTS[rng.choices(range(len(SIGN_SHARES)), SIGN_SHARES)[0]]))
        drawings = _place_drawings(
            rng, canvas, [band for band in bands if band.use == "drawings"], split, shown, background
        )
    plate_share = 0.3 if board else 0.6
    signs = tuple(
        _write(rng, canvas, band, split, written, rng.random() < plate_share) for band in bands if band.use == "sign"
    )
    return _noisy(rng, canvas.image), tuple(canvas.letters), Facts(split, board, background, drawings, signs)


def _familiarity(rng: random.Random, split: Split, of: Literal["drawings", "fonts"]) -> Familiarity:
    """Of all drawings, or of all fonts, of one scene: what training has not seen is half of those that test."""
    unseen = rng.random() < 0.5
    there = split != "train" and (of == "drawings" or (split, "unseen") in FONTS)
    return "unseen" if unseen and there else "seen"


# ------------------------------------------------------------------------------------------------------------ drawings


def pick(rng: random.Random, split: Split, familiarity: Familiarity, background: str) -> Entry:
    """A drawing that stands out from the background: one of those with a name, or one of any category alike."""
    mine = pool(split, familiarity)
    while True:
        if mine.named and rng.random() < NAMED_SHARE:
            entry = rng.choice(mine.named)
        else:
            entry = rng.choice(mine.by_category[rng.choice(list(mine.by_category))])
        if stands_out(entry.code_point, background):
            return entry


@functools.cache
def stands_out(code_point: str, background: str) -> bool:
    """Whether at least 3 of 10 of a drawing's pixels differ clearly from a background."""
    rgba = np.asarray(image_of(code_point)).reshape(-1, 4)
    rgb = rgba[rgba[:, 3] > 128, :3].astype(np.int16)
    if not len(rgb):
        return False
    return bool((np.abs(rgb - np.array(PALETTE[background])).max(axis=1) > 60).mean() >= 0.3)


def _place_drawings(
    rng: random.Random,
    canvas: Canvas,
    bands: Sequence[Band],
    split: Split,
    familiarity: Familiarity,
    background: str,
) -> tuple[DrawnThing, ...]:
    cells = [(band, side) for band in bands for side in ("left", "right")]
    count = min(len(cells), rng.choices(range(1, 5), DRAWING_SHARES)[0])
    found: list[DrawnThing] = []
    for place in sorted(rng.sample(range(len(cells)), count)):
        band, side = cells[place]
        while True:  # no drawing twice
            entry = pick(rng, split, familiarity, background)
            if entry.code_point not in {thing.code_point for thing in found}:
                break
        box = _stamp(rng, canvas.image, image_of(entry.code_point), band, side)
        name = entry.name if familiarity == "seen" else ""
        found.append(DrawnThing(entry.code_point, entry.category, name, familiarity, band.called, side, box))
    return tuple(found)


def _stamp(
    rng: random.Random, image: Image.Image, drawing: Image.Image, band: Band, side: str
) -> tuple[int, int, int, int]:
    """Paint a drawing somewhere in its cell. Returns: the box that it takes."""
    left, right = (4, SIDE // 2 - 2) if side == "left" else (SIDE // 2 + 2, SIDE - 4)
    extent = rng.uniform(0.78, 0.98) * min(band.bottom - band.top - 4, right - left)
    factor = extent / max(drawing.size)
    width, height = max(1, round(drawing.width * factor)), max(1, round(drawing.height * factor))
    small = drawing.resize((width, height), Image.Resampling.BILINEAR)
    x, y = rng.randint(left, right - width), rng.randint(band.top + 1, band.bottom - 1 - height)
    image.paste(small, (x, y), small)
    return x, y, x + width, y + height


# --------------------------------------------------------------------------------------------------------------- signs


def luminance(colour: Colour) -> float:
    """Rec. 601 luma, 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _any_colour(rng: random.Random) -> Colour:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def _ink(rng: random.Random, ground: Colour) -> Colour:
    while True:
        ink = _any_colour(rng) if rng.random() < 0.4 else rng.choice(NAMED_INKS)
        if abs(luminance(ink) - luminance(ground)) >= MIN_CONTRAST:
            return ink


def _write(rng: random.Random, canvas: Canvas, band: Band, split: Split, familiarity: Familiarity, plate: bool) -> Sign:
    kind = rng.choices(TEXT_KINDS, TEXT_SHARES[split])[0]
    text, font = draw_text(rng, split, kind), rng.choice(FONTS[split, familiarity])
    line = fitted(text, font, rng.randint(*FONT_SIZES), SIDE - 8, band.bottom - band.top - 6, LEAST_SIZE)
    x = rng.randint(4, max(4, SIDE - 4 - line.width))
    y = rng.randint(band.top + 3, max(band.top + 3, band.bottom - 3 - line.height))
    ground = canvas.ground
    if plate:
        ground = _any_colour(rng)
        outline = _ink(rng, ground) if rng.random() < 0.5 else None
        box = (x - rng.randint(3, 6), y - 3, x + line.width + rng.randint(3, 6), y + line.height + 3)
        ImageDraw.Draw(canvas.image).rectangle(box, fill=ground, outline=outline)
    canvas.letters += line.paste(canvas.image, x, y, _ink(rng, ground))
    off = x + line.width / 2 - SIDE / 2
    side = "" if abs(off) < NEAR_MIDDLE else "left" if off < 0 else "right"
    return Sign(text, kind, font, familiarity, band.called, side)


# --------------------------------------------------------------------------------------------------------------- noise

_NOISE_SIDE = 2 * SIDE


@functools.cache
def _noise() -> np.ndarray:
    """Standard normal noise, from a generator whose numbers numpy keeps for ever."""
    return np.random.RandomState(0).standard_normal((_NOISE_SIDE, _NOISE_SIDE, 3)).astype(np.float32)


def _noisy(rng: random.Random, image: Image.Image) -> np.ndarray:
    """The pixels; half of all pictures have noise of 1 to 8 (of 255), a window of the same large field."""
    pixels = np.asarray(image)
    if rng.random() < 0.5:
        return pixels.copy()
    top, left = rng.randint(0, _NOISE_SIDE - SIDE), rng.randint(0, _NOISE_SIDE - SIDE)
    noise = _noise()[top : top + SIDE, left : left + SIDE] * np.float32(rng.uniform(1, 8))
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
