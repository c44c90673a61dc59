"""Texts in pixels, letter by letter, from fonts that matplotlib ships (its code is not loaded).

Letters stand side by side by their advance, without kerning, so that the box of each is known exactly.
"""

import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipelines.data.sources import SourceError

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Letter:
    """A character of a picture.

    Attributes:
        character: what it is.
        x: of the middle of its ink, in pixels from the left.
        y: of the middle of its ink, in pixels from the top.
        place: in its text, from 0.
        length: of its text.
    """

    character: str
    x: float
    y: float
    place: int
    length: int


@dataclass(frozen=True)
class _Glyph:
    """The coverage of a character's ink; the corner of that box from the pen; what the pen moves on by."""

    coverage: Image.Image
    dx: int
    dy: int
    advance: float


@functools.cache
def fonts_folder() -> Path:
    """The folder of matplotlib's TrueType files. Raises SourceError where it is not installed."""
    found = importlib.util.find_spec("matplotlib")
    if found is None or found.origin is None:
        raise SourceError("the package matplotlib, whose fonts are used, is not installed; `pip install matplotlib`")
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf"


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    file = fonts_folder() / f"{name}.ttf"
    if not file.is_file():
        raise SourceError(
            f"the font {file.name} is not in {file.parent}; expected the fonts of matplotlib 3.10 or newer"
        )
    return ImageFont.truetype(str(file), size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _glyph(name: str, size: int, character: str) -> _Glyph:
    font = _font(name, size)
    canvas = Image.new("L", (3 * size, 3 * size))
    ImageDraw.Draw(canvas).text((size, size), character, fill=255, font=font)
    box = canvas.getbbox()
    assert box is not None, "every character has ink"
    return _Glyph(canvas.crop(box), box[0] - size, box[1] - size, font.getlength(character))


@dataclass(frozen=True)
class Line:
    """A text that is laid out and not yet placed: its glyphs with their pen positions, and the box of their ink."""

    text: str
    glyphs: tuple[tuple[_Glyph, int], ...]
    left: int
    top: int
    width: int
    height: int

    def paste(self, image: Image.Image, x: int, y: int, colour: Colour) -> list[Letter]:
        """Write onto `image` with the ink's upper left corner at (x, y); where each letter came to lie."""
        letters: list[Letter] = []
        for place, (glyph, pen) in enumerate(self.glyphs):
            left, top = x - self.left + pen + glyph.dx, y - self.top + glyph.dy
            image.paste(colour, (left, top), glyph.coverage)
            middle = (left + glyph.coverage.width / 2, top + glyph.coverage.height / 2)
            letters.append(Letter(self.text[place], *middle, place, len(self.text)))
        return letters


def laid_out(text: str, font: str, size: int) -> Line:
    """A line of text in a font (file name without extension) of `size` pixels."""
    pen, placed = 0.0, list[tuple[_Glyph, int]]()
    for character in text:
        glyph = _glyph(font, size, character)
        placed.append((glyph, round(pen)))
        pen += glyph.advance
    left = min(pen + glyph.dx for glyph, pen in placed)
    top = min(glyph.dy for glyph, _ in placed)
    right = max(pen + glyph.dx + glyph.coverage.width for glyph, pen in placed)
    bottom = max(glyph.dy + glyph.coverage.height for glyph, _ in placed)
    return Line(text, tuple(placed), left, top, right - left, bottom - top)


def fitted(text: str, font: str, size: int, width: int, height: int, least: int) -> Line:
    """The line at the largest size from `size` down that fits; at `least` where none does."""
    while True:
        line = laid_out(text, font, size)
        if size <= least or (line.width <= width and line.height <= height):
            return line
        size = max(least, size - 1)
