"""Drawn text whose content is known cell by cell: what the small text-reading tower is trained on.

A page is a square picture with lines of text in the fonts that ship with matplotlib, on plain, shaded or noisy ground
with some shapes. Its label says, for every patch, which characters have ink there.

Legend: S side of the picture in pixels, N patches (raster order), K characters of the alphabet.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

ALPHABET = "".join(chr(code) for code in range(33, 127))
"""Printable ASCII without the space: 94 characters, case-sensitive."""
FONTS = tuple(f"DejaVu{face}.ttf" for face in ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "Serif", "Serif-Bold"))
FONT_SIZES = (10, 40)
"""Smallest and largest font size in pixels; sizes between are drawn evenly in their logarithm."""
HELD_OUT_SHARE = 10
"""One word in so many (by checksum) is never drawn on a training page."""
INK_PIXELS, INK_SHARE = 12.0, 0.2
"""A character counts as present in a patch with this much of its ink there: so many fully covered pixels, or this share
of all its ink, whichever is less."""
MIN_CONTRAST = 60.0
"""Smallest difference of luminance (of 255) between text and ground."""


@cache
def words(held_out: bool) -> tuple[str, ...]:
    """Real words: those of the names of Unicode's symbols and drawings. The two sets share no word."""
    found: set[str] = set()
    for code in (*range(0x2000, 0x2C00), *range(0x1F300, 0x1FB00)):
        name = unicodedata.name(chr(code), "").lower()
        found |= {word for word in name.replace("-", " ").split() if word.isalpha() and len(word) > 1}
    return tuple(sorted(word for word in found if (zlib.crc32(word.encode()) % HELD_OUT_SHARE == 0) == held_out))


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


@lru_cache(maxsize=100_000)
def _glyph(name: str, size: int, character: str) -> tuple[np.ndarray, int, int, int]:
    """Coverage in [0, 1] of one character's box, the box's offset (x, y) from the pen, and the pen's advance."""
    font = _font(name, size)
    canvas = Image.new("L", (3 * size, 3 * size))
    ImageDraw.Draw(canvas).text((size, size), character, fill=255, font=font)
    left, top, right, bottom = canvas.getbbox() or (size, size, size + 1, size + 1)
    coverage = np.asarray(canvas.crop((left, top, right, bottom)), np.float32) / 255
    return coverage, left - size, top - size, round(font.getlength(character))


def _text(rng: np.random.Generator, vocabulary: Sequence[str], length: int) -> str:
    """At least `length` characters: real words in three ways of capitals, random strings, and numbers."""
    pieces: list[str] = []
    while sum(map(len, pieces)) + len(pieces) < length:
        kind = rng.random()
        if kind < 0.5:
            word = vocabulary[int(rng.integers(len(vocabulary)))]
            pieces.append((word, word.capitalize(), word.upper())[rng.integers(3)])
        elif kind < 0.9:
            pieces.append("".join(ALPHABET[i] for i in rng.integers(len(ALPHABET), size=rng.integers(2, 9))))
        else:
            pieces.append(f"{rng.integers(10_000) / 10 ** rng.integers(3):g}")
    return " ".join(pieces)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ground and text colour, far enough apart in luminance; half the pages are black and white or nearly so."""
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    while True:
        ground, text = rng.integers(0, 256, (2, 3)).astype(np.float32)
        if rng.random() < 0.5:
            ground, text = np.full(3, rng.integers(200, 256), np.float32), np.full(3, rng.integers(0, 80), np.float32)
            if rng.random() < 0.25:
                ground, text = text, ground
        if abs(float((ground - text) @ weights)) >= MIN_CONTRAST:
            return ground, text


def _ground(rng: np.random.Generator, side: int, colour: np.ndarray) -> np.ndarray:
    """(S, S, 3) in [0, 255]: the ground colour, sometimes shaded, sometimes with shapes of close colours."""
    picture = Image.new("RGB", (side, side), tuple(int(value) for value in colour))
    if rng.random() < 0.4:
        draw = ImageDraw.Draw(picture)
        for _ in range(rng.integers(1, 5)):
            (x0, y0), (width, height) = rng.integers(-20, side, 2).tolist(), rng.integers(8, side // 2, 2).tolist()
            near = np.clip(colour + rng.integers(-30, 31, 3), 0, 255)
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape((x0, y0, x0 + width, y0 + height), fill=tuple(int(value) for value in near))
    pixels = np.asarray(picture, np.float32).copy()
    if rng.random() < 0.3:
        pixels += np.linspace(-20, 20, side, dtype=np.float32)[:, None, None] * rng.choice([-1.0, 1.0])
    return pixels


def draw_page(
    rng: np.random.Generator, side: int, patch: int, vocabulary: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """One page.

    Args:
        rng: every choice comes from here.
        side: S, a multiple of `patch`.
        patch: side of a patch in pixels.
        vocabulary: real words to draw from.

    Returns:
        (S, S, 3) uint8 picture; (N, K) bool, which characters have ink in which patch.
    """
    ground, colour = _colours(rng)
    pixels = _ground(rng, side, ground)
    cells = side // patch
    labels = np.zeros((cells * cells, len(ALPHABET)), bool)
    low, high = np.log(FONT_SIZES)
    y = int(rng.integers(-4, 16))
    while y < side - 8:
        name, size = FONTS[rng.integers(len(FONTS))], round(float(np.exp(rng.uniform(low, high))))
        x = int(rng.integers(-size, side // 6))
        length = int(rng.uniform(0.5, 1.5) * side / (0.6 * size)) + 1
        for character in _text(rng, vocabulary, length):
            coverage, dx, dy, advance = _glyph(name, size, character)
            if character != " ":
                _ink(pixels, labels, coverage, x + dx, y + dy, colour, ALPHABET.index(character), patch)
            x += advance
            if x >= side:
                break
        y += round(size * rng.uniform(1.05, 1.6))
    if rng.random() < 0.5:
        pixels += rng.normal(0, rng.uniform(1, 10), pixels.shape).astype(np.float32)
    return np.clip(pixels, 0, 255).astype(np.uint8), labels


def _ink(
    pixels: np.ndarray,
    labels: np.ndarray,
    coverage: np.ndarray,
    x: int,
    y: int,
    colour: np.ndarray,
    index: int,
    patch: int,
) -> None:
    """Blend one character in at (x, y) and note the patches that hold enough of its ink; both arrays change."""
    side = len(pixels)
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + coverage.shape[1], side), min(y + coverage.shape[0], side)
    if x0 >= x1 or y0 >= y1:
        return
    seen = coverage[y0 - y : y1 - y, x0 - x : x1 - x]
    region = pixels[y0:y1, x0:x1]
    region += seen[..., None] * (colour - region)
    needed = min(INK_PIXELS, INK_SHARE * float(coverage.sum()))
    for row in range(y0 // patch, (y1 - 1) // patch + 1):
        rows = slice(max(row * patch - y0, 0), (row + 1) * patch - y0)
        for column in range(x0 // patch, (x1 - 1) // patch + 1):
            inside = seen[rows, max(column * patch - x0, 0) : (column + 1) * patch - x0]
            if float(inside.sum()) >= needed:
                labels[row * (side // patch) + column, index] = True


def draw_batch(
    rng: np.random.Generator, count: int, side: int, patch: int, held_out: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`count` pages: (M, 3, S, S) uint8 and (M, N, K) bool; with words that training never draws where `held_out`."""
    pages = [draw_page(rng, side, patch, words(held_out)) for _ in range(count)]
    pictures_MSS3 = np.stack([picture for picture, _ in pages])
    return pictures_MSS3.transpose(0, 3, 1, 2).copy(), np.stack([labels for _, labels in pages])
