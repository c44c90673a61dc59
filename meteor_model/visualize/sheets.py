"""Pictures of what the three stages keep: the image with the cells of kept tokens in full colour, all others dimmed.

`draw_kept` gives a sheet per stage for one image, `draw_overview` one sheet with all of them:

    encode  a row per encoder, a column per boundary
    fuse    a column per encoder: the cells whose token entered the LLM
    decode  a row per prompt, a column per encoder: the cells whose token stayed after the early LLM layer

Sizes are in pixels for a display of double density: shown at half its width, a sheet's text has the usual size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.outputs import PruningStats
from meteor_model.vision_meteor import JOINT

#: One colour per encoder, in their order; the charts use the same.
COLOURS = ("#2a6fbb", "#d1603d", "#3c8d5a", "#8a5aa8", "#b8860b")
BACKGROUND, INK, FAINT, LINE = "#ffffff", "#1f242b", "#69727d", "#d5dae0"

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the prompts

SHEET_PANEL, OVERVIEW_PANEL, SIDEBAR, SWATCH = 300, 224, 448, 34
MARGIN, GAP = 40, 18
TITLE_TEXT, TEXT, NOTE_TEXT = 34, 26, 22
LEADING = 1.28  # distance of two lines of text over their size
#: Dimmed cells: grey, and most of the way to a middle tone, so that they differ from white pages and from dark photos.
VEIL, VEIL_SHARE = (176, 185, 196), 0.78
#: Cells narrower than this get no grid lines, and no outline: the lines would hide the picture.
GRID_FROM, OUTLINE_FROM = 12, 6

Cells = Sequence[int]


@dataclass(frozen=True)
class _Panel:
    """One image with its kept cells; a caption under it."""

    grid: tuple[int, int]
    cells: Cells
    colour: str
    caption: str


@dataclass(frozen=True)
class _Row:
    """Panels under the table's columns (None leaves a place empty) and what is written above them."""

    label: str
    colour: str | None
    panels: Sequence[_Panel | None]


def draw_kept(
    image_3HW: torch.Tensor,
    config: MeteorConfig,
    stats: PruningStats,
    sample: int = 0,
    decode_kept: Mapping[str, Cells] | None = None,
) -> dict[str, Image.Image]:
    """One sheet per stage for image `sample` of a batch.

    Args:
        image_3HW: that image as it travelled, uint8.
        config: the model's configuration.
        stats: what `encode_images` returned with the tokens.
        sample: index of the image in `stats`.
        decode_kept: for each prompt, the indices (into the K tokens of the image) that stage 3 kept.

    Returns:
        stage -> sheet, in the order of the stages; "decode" only with `decode_kept`.

    Raises:
        ValueError: for an image that is not uint8 (3, H, W), a sample that `stats` does not have, or an index of
            `decode_kept` beyond the tokens of the image.
    """
    image = _picture(image_3HW)
    tokens = _Tokens(config, stats, sample)
    columns, rows = tokens.encode_table()
    sheets = {"encode": _sheet(image, "Stage 1, encoding: cells kept after each boundary", columns, rows)}
    title = f"Stage 2, fusion: {len(tokens.fused)} of {tokens.pool_size} tokens enter the LLM"
    grids = list(tokens.visual_grids)
    sheets["fuse"] = _sheet(image, title, [(name, "") for name in grids], [_Row("", None, tokens.visual_panels())])
    if decode_kept:
        rows = [_Row(prompt, None, tokens.visual_panels(kept)) for prompt, kept in decode_kept.items()]
        counts = " and ".join(str(len(kept)) for kept in decode_kept.values())
        title = f"Stage 3, decoding: {counts} of {len(tokens.fused)} tokens stay after LLM layer {tokens.layer}"
        sheets["decode"] = _sheet(image, title, [(name, "") for name in grids], rows)
    return sheets


def draw_overview(
    image_3HW: torch.Tensor,
    config: MeteorConfig,
    stats: PruningStats,
    sample: int = 0,
    decode_kept: Mapping[str, Cells] | None = None,
) -> Image.Image:
    """All stages on one sheet: the image and the prompts on the left, then a row per encoder and a column per step.

    Arguments and errors as in `draw_kept`.
    """
    image = _picture(image_3HW)
    tokens = _Tokens(config, stats, sample)
    columns, encode_rows = tokens.encode_table()
    steps = tokens.steps()
    visual = [("after fusion", _of(len(tokens.fused), tokens.pool_size), tokens.visual_panels())]
    for letter, kept in zip(LETTERS, (decode_kept or {}).values(), strict=False):
        note = _of(len(kept), len(tokens.fused))
        visual.append((f"{letter}, after layer {tokens.layer}", note, tokens.visual_panels(kept)))
        steps.append((f"{letter}, after LLM layer {tokens.layer}", len(kept)))
    columns += [(title, note) for title, note, _ in visual]
    if config.fusion == "channel_concat":  # visual tokens are cells of the common grid: a row of their own
        rows = [_Row(row.label, row.colour, [*row.panels, *([None] * len(visual))]) for row in encode_rows]
        empty = [None] * len(encode_rows[0].panels)
        label = f"{JOINT}, {config.concat_grid} x {config.concat_grid}"
        rows.append(_Row(label, tokens.colours[JOINT], [*empty, *(panels[0] for _, _, panels in visual)]))
    else:
        rows = [
            _Row(row.label, row.colour, [*row.panels, *(panels[index] for _, _, panels in visual)])
            for index, row in enumerate(encode_rows)
        ]
    table = _table(image, columns, rows, OVERVIEW_PANEL)
    sidebar = _sidebar(image, list(decode_kept or {}), steps)
    size = (3 * MARGIN + SIDEBAR + table.width, max(table.height, sidebar.height) + 2 * MARGIN)
    sheet = Image.new("RGB", size, BACKGROUND)
    sheet.paste(sidebar, (MARGIN, MARGIN))
    sheet.paste(table, (2 * MARGIN + SIDEBAR, MARGIN))
    return sheet


# -------------------------------------------------------------------------------------------------- what is to be drawn


class _Tokens:
    """The kept tokens of one image as cells of grids."""

    def __init__(self, config: MeteorConfig, stats: PruningStats, sample: int) -> None:
        if not 0 <= sample < len(stats.fuse):
            raise ValueError(f"sample {sample} is not one of the {len(stats.fuse)} images of these statistics")
        self.config = config
        self.layer = config.pruning.decode.layer
        self.encode = {name: [cells[sample].tolist() for cells in kept] for name, kept in stats.encode.items()}
        self.grids = config.encoder_grids
        self.colours = dict(zip([*self.grids, JOINT], cycle(COLOURS), strict=False))
        #: Grids that the LLM's visual tokens are cells of.
        self.visual_grids = self.grids
        pool = [(name, cell) for name, kept in self.encode.items() for cell in kept[-1]]
        if config.fusion == "channel_concat":
            side = config.concat_grid
            self.visual_grids = {JOINT: (side, side)}
            pool = [(JOINT, cell) for cell in range(side * side)]
        self.pool_size = len(pool)
        self.fused = [pool[index] for index in stats.fuse[sample].tolist()]

    def encode_table(self) -> tuple[list[tuple[str, str]], list[_Row]]:
        """Columns (title, note) and a row per encoder: the full grid, then every boundary."""
        encode = self.config.pruning.encode
        boundaries = max(map(len, self.encode.values())) if encode.enabled else 0
        columns = [("full grid", f"{sum(rows * columns for rows, columns in self.grids.values())} tokens")]
        for boundary in range(1, boundaries + 1):
            criterion = "least like the mean" if boundary < encode.first_deep_segment else "most attended"
            columns.append((f"boundary {boundary}", criterion))
        table = []
        for name, kept in self.encode.items():
            rows, width = self.grids[name]
            everything, colour = range(rows * width), self.colours[name]
            panels = [_Panel((rows, width), everything, colour, f"{rows * width}")]
            dense = boundaries - len(kept)  # a convolutional tower is pruned at its output only
            for boundary in range(boundaries):
                cells: Cells = everything if boundary < dense else kept[boundary - dense]
                caption = "runs dense" if boundary < dense else _of(len(cells), rows * width)
                if dense and dense <= boundary and boundary + 1 >= encode.first_deep_segment:
                    caption += ", by mean"  # it has no attention to score by
                panels.append(_Panel((rows, width), cells, colour, caption))
            table.append(_Row(f"{name}, {rows} x {width}", colour, panels))
        return columns, table

    def steps(self) -> list[tuple[str, int]]:
        """Tokens of all encoders together after each step up to fusion."""
        steps = [("full grids", sum(rows * columns for rows, columns in self.grids.values()))]
        if self.config.pruning.encode.enabled:
            steps.append(("after encoding", self.pool_size))
        return [*steps, ("after fusion, into the LLM", len(self.fused))]

    def visual_panels(self, kept: Cells | None = None) -> list[_Panel]:
        """A panel per grid of the tokens that entered the LLM, or of those among them at the indices `kept`."""
        beyond = [index for index in kept or () if not 0 <= index < len(self.fused)]
        if beyond:
            raise ValueError(f"stage 3 cannot keep token {beyond[0]}: the image has {len(self.fused)} visual tokens")
        chosen = self.fused if kept is None else [self.fused[index] for index in kept]
        panels = []
        for name, grid in self.visual_grids.items():
            cells = [cell for owner, cell in chosen if owner == name]
            entered = sum(owner == name for owner, _ in self.fused)
            pool = len(self.encode[name][-1]) if name in self.encode else self.pool_size
            panels.append(_Panel(grid, cells, self.colours[name], _of(len(cells), pool if kept is None else entered)))
        return panels


def _of(count: int, total: int) -> str:
    return f"{count} of {total}"


def _picture(image_3HW: torch.Tensor) -> Image.Image:
    if image_3HW.ndim != 3 or image_3HW.shape[0] != 3 or image_3HW.dtype != torch.uint8:
        raise ValueError(f"the image must be uint8 (3, H, W), got {image_3HW.dtype} {tuple(image_3HW.shape)}")
    return Image.fromarray(image_3HW.permute(1, 2, 0).contiguous().cpu().numpy())


# ------------------------------------------------------------------------------------------------------------ the panel


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


# ------------------------------------------------------------------------------------------------------------ the sheet


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrapped(text: str, size: int, width: float, most: int = 3) -> list[str]:
    """The text in lines of at most `width` pixels; what does not fit into `most` lines ends in dots."""
    font, lines, words = _font(size), [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_cut(line, size, width) for line in lines]


def _cut(line: str, size: int, width: float) -> str:
    font = _font(size)
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "...") > width:
        line = line[:-1]
    return line.rstrip() + "..."


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], size: int, colour: str) -> int:
    """Lines of text below each other; returns where the next would start."""
    left, top = at
    for line in lines:
        draw.text((left, top), line, fill=colour, font=_font(size))
        top += round(size * LEADING)
    return top


def _table(image: Image.Image, columns: Sequence[tuple[str, str]], rows: Sequence[_Row], side: int) -> Image.Image:
    """Panels of one image in rows, with column titles above and captions below."""
    picture = fit(image, side)
    step = side + GAP
    width = len(columns) * step - GAP
    notes = any(note for _, note in columns)
    head = round((TEXT + (NOTE_TEXT if notes else 0)) * LEADING) + 16
    labels = [_wrapped(row.label, TEXT, width - (36 if row.colour else 0)) if row.label else [] for row in rows]
    caption = round(NOTE_TEXT * LEADING) + 8
    heights = [round(len(lines) * TEXT * LEADING) + (8 if lines else 0) + picture.height + caption for lines in labels]
    table = Image.new("RGB", (width, head + sum(heights) + GAP * (len(rows) - 1)), BACKGROUND)
    draw = ImageDraw.Draw(table)
    for index, (title, note) in enumerate(columns):
        below = _write(draw, (index * step, 0), [_cut(title, TEXT, side)], TEXT, INK)
        _write(draw, (index * step, below), [_cut(note, NOTE_TEXT, side)], NOTE_TEXT, FAINT)
    top = head
    for row, lines, height in zip(rows, labels, heights, strict=True):
        indent = 0
        if row.colour and lines:
            indent = 36
            draw.rectangle((0, top + 4, 22, top + 26), fill=row.colour)
        below = _write(draw, (indent, top), lines, TEXT, INK) + (8 if lines else 0)
        for index, panel in enumerate(row.panels):
            if panel is None:
                continue
            table.paste(dim_dropped(picture, panel.grid, panel.cells, panel.colour), (index * step, below))
            at = (index * step, below + picture.height + 6)
            _write(draw, at, [panel.caption], NOTE_TEXT, INK if len(panel.cells) else FAINT)
        top += height + GAP
    return table


def _legend(sheet: Image.Image, at: tuple[int, int], image: Image.Image, stacked: bool) -> None:
    """What full colour and dimmed cells mean, side by side or below each other."""
    left, top = at
    draw, swatch = ImageDraw.Draw(sheet), fit(image, SWATCH)
    for cells, text in (((0,), "full colour: token kept"), ((), "dimmed: token dropped")):
        sheet.paste(dim_dropped(swatch, (1, 1), cells, COLOURS[0]), (left, top))
        draw.text((left + SWATCH + 12, top + (SWATCH - NOTE_TEXT) // 2 - 2), text, fill=FAINT, font=_font(NOTE_TEXT))
        if stacked:
            top += SWATCH + 10
        else:
            left += SWATCH + 12 + round(_font(NOTE_TEXT).getlength(text)) + 36


def _sheet(image: Image.Image, title: str, columns: Sequence[tuple[str, str]], rows: Sequence[_Row]) -> Image.Image:
    """A title, a table, a legend."""
    table = _table(image, columns, rows, SHEET_PANEL)
    width = max(table.width, 2 * SHEET_PANEL + GAP)
    lines = _wrapped(title, TITLE_TEXT, width)
    head = MARGIN + round(len(lines) * TITLE_TEXT * LEADING) + GAP
    sheet = Image.new("RGB", (width + 2 * MARGIN, head + table.height + GAP + SWATCH + MARGIN), BACKGROUND)
    _write(ImageDraw.Draw(sheet), (MARGIN, MARGIN), lines, TITLE_TEXT, INK)
    sheet.paste(table, (MARGIN, head))
    _legend(sheet, (MARGIN, head + table.height + GAP), image, stacked=False)
    return sheet


def _sidebar(image: Image.Image, prompts: Sequence[str], steps: Sequence[tuple[str, int]]) -> Image.Image:
    """The image, the prompts by letter, the tokens left after each step as bars, the legend."""
    picture = fit(image, SIDEBAR)
    texts = [_wrapped(prompt, TEXT, SIDEBAR - 40) for prompt in prompts]
    text_height = sum(round(len(lines) * TEXT * LEADING) + 8 for lines in texts)
    bar = round(NOTE_TEXT * LEADING) + 18
    height = picture.height + text_height + len(steps) * bar + 2 * SWATCH + 10 + 4 * GAP
    sidebar = Image.new("RGB", (SIDEBAR, height), BACKGROUND)
    draw = ImageDraw.Draw(sidebar)
    sidebar.paste(picture, (0, 0))
    top = picture.height + GAP
    for letter, lines in zip(LETTERS, texts, strict=False):
        draw.text((0, top), letter, fill=COLOURS[0], font=_font(TEXT))
        top = _write(draw, (40, top), lines, TEXT, INK) + 8
    top += GAP
    for name, count in steps:
        draw.text((0, top), name, fill=FAINT, font=_font(NOTE_TEXT))
        draw.text((SIDEBAR, top), str(count), fill=INK, font=_font(NOTE_TEXT), anchor="ra")
        line = top + bar - 12
        draw.rectangle((0, line, SIDEBAR - 1, line + 4), fill=LINE)
        if count:
            draw.rectangle((0, line, max(2, round(SIDEBAR * count / steps[0][1])) - 1, line + 4), fill=COLOURS[0])
        top += bar
    _legend(sidebar, (0, top + GAP), image, stacked=True)
    return sidebar
