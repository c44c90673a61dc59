"""One image with some of its cells dimmed, and the text around it: what all sheets are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

#: One colour per encoder, in their order; the charts use the same.
COLOURS = ("#2a6fbb", "#d1603d", "#3c8d5a", "#8a5aa8", "#b8860b")
BACKGROUND, INK, FAINT, LINE = "#ffffff", "#1f242b", "#69727d", "#d5dae0"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the prompts
SWATCH = 34
MARGIN, GAP = 40, 18
TITLE_TEXT, TEXT, NOTE_TEXT = 34, 26, 22
LEADING = 1.28  # distance of two lines of text over their size
#: Dimmed cells: grey, and most of the way to a middle tone, so that they differ from white pages and from dark photos.
VEIL, VEIL_SHARE = (176, 185, 196), 0.78
#: Cells narrower than this get no grid lines, and no outline: the lines would hide the picture.
GRID_FROM, OUTLINE_FROM = 12, 6

Cells = Sequence[int]


@dataclass(frozen=True)
class Panel:
    """One image with its kept cells; a caption under it."""

    grid: tuple[int, int]
    cells: Cells
    colour: str
    caption: str


@dataclass(frozen=True)
class Row:
    """Panels under the table's columns (None leaves a place empty) and what is written above them."""

    label: str
    colour: str | None
    panels: Sequence[Panel | None]


def picture_of(image_3HW: torch.Tensor) -> Image.Image:
    """An image as it travelled, uint8 (3, H, W), as a picture. ValueError for another."""
    if image_3HW.ndim != 3 or image_3HW.shape[0] != 3 or image_3HW.dtype != torch.uint8:
        raise ValueError(f"the image must be uint8 (3, H, W), got {image_3HW.dtype} {tuple(image_3HW.shape)}")
    return Image.fromarray(image_3HW.permute(1, 2, 0).contiguous().cpu().numpy())


def fit(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side at `side` pixels."""
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def cell_of_pixels(size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """(height, width) int array: the cell, in raster order, that each pixel of a picture of `size` belongs to."""
    (width, height), (rows, columns) = size, grid
    return (np.arange(height) * rows // height)[:, None] * columns + (np.arange(width) * columns // width)[None]


def dim_dropped(picture: Image.Image, grid: tuple[int, int], cells: Cells, colour: str) -> Image.Image:
    """The picture with every cell but `cells` dimmed; the kept regions are outlined on their outside in `colour`."""
    owner_hw = cell_of_pixels(picture.size, grid)
    kept_n = np.zeros(grid[0] * grid[1], dtype=bool)
    kept_n[list(cells)] = True
    kept_hw = kept_n[owner_hw]
    own_hw3 = np.asarray(picture.convert("RGB"))
    grey_hw3 = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    veiled_hw3 = (1 - VEIL_SHARE) * grey_hw3 + VEIL_SHARE * np.array(VEIL, dtype=np.float32)
    drawn_hw3 = np.where(kept_hw[..., None], own_hw3, veiled_hw3.round().astype(np.uint8))
    cell = min(picture.width / grid[1], picture.height / grid[0])
    if cell >= GRID_FROM:
        lines_hw = np.zeros_like(kept_hw)
        lines_hw[1:] |= owner_hw[1:] != owner_hw[:-1]
        lines_hw[:, 1:] |= owner_hw[:, 1:] != owner_hw[:, :-1]
        drawn_hw3[lines_hw] = (0.7 * drawn_hw3[lines_hw] + 0.3 * 255).astype(np.uint8)
    if cell >= OUTLINE_FROM:
        outline_hw = _grown(kept_hw, 2 if cell >= GRID_FROM else 1) & ~kept_hw
        drawn_hw3[outline_hw] = ImageColor.getrgb(colour)
    return Image.fromarray(drawn_hw3)


def _grown(mask_hw: np.ndarray, steps: int) -> np.ndarray:
    """The mask and every pixel within `steps` of it, along rows and columns."""
    for _ in range(steps):
        padded = np.pad(mask_hw, 1)
        mask_hw = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask_hw


def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The one font of all sheets."""
    return ImageFont.load_default(size)


def wrapped(text: str, size: int, width: float, most: int = 3) -> list[str]:
    """The text in lines of at most `width` pixels; what does not fit into `most` lines ends in dots."""
    font, lines, words = font_of(size), [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [cut(line, size, width) for line in lines]


def cut(line: str, size: int, width: float) -> str:
    """The line, or its beginning and dots where it is wider than `width` pixels."""
    font = font_of(size)
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], size: int, colour: str) -> int:
    """Lines of text below each other; returns where the next would start."""
    left, top = at
    for line in lines:
        draw.text((left, top), line, fill=colour, font=font_of(size))
        top += round(size * LEADING)
    return top


def legend(sheet: Image.Image, at: tuple[int, int], image: Image.Image, stacked: bool) -> None:
    """What full colour and dimmed cells mean, side by side or below each other."""
    left, top = at
    draw, swatch = ImageDraw.Draw(sheet), fit(image, SWATCH)
    for cells, text in (((0,), "full colour: token kept"), ((), "dimmed: token dropped")):
        sheet.paste(dim_dropped(swatch, (1, 1), cells, COLOURS[0]), (left, top))
        draw.text((left + SWATCH + 12, top + (SWATCH - NOTE_TEXT) // 2 - 2), text, fill=FAINT, font=font_of(NOTE_TEXT))
        if stacked:
            top += SWATCH + 10
        else:
            left += SWATCH + 12 + round(font_of(NOTE_TEXT).getlength(text)) + 36
