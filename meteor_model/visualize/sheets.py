"""Pictures of what the three stages keep: the image with the cells of kept tokens in full colour, all others dimmed.

`draw_kept` gives a sheet per stage for one image, `draw_overview` one sheet with all of them:

    encode  a row per encoder, a column per boundary
    fuse    a column per encoder: the cells whose token entered the LLM
    decode  a row per prompt, a column per encoder: the cells whose token stayed after the early LLM layer

Sizes are in pixels for a display of double density: shown at half its width, a sheet's text has the usual size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.outputs import PruningStats
from meteor_model.vision_meteor import JOINT
from meteor_model.visualize.panels import (
    BACKGROUND,
    COLOURS,
    FAINT,
    GAP,
    INK,
    LEADING,
    LETTERS,
    LINE,
    MARGIN,
    NOTE_TEXT,
    SWATCH,
    TEXT,
    TITLE_TEXT,
    Cells,
    Row,
    cut,
    dim_dropped,
    fit,
    font_of,
    legend,
    picture_of,
    wrapped,
    write,
)
from meteor_model.visualize.tokens import ImageTokens, share_of

SHEET_PANEL, OVERVIEW_PANEL, SIDEBAR = 300, 224, 448


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
    image = picture_of(image_3HW)
    tokens = ImageTokens(config, stats, sample)
    columns, rows = tokens.encode_table()
    sheets = {"encode": _sheet(image, "Stage 1, encoding: cells kept after each boundary", columns, rows)}
    title = f"Stage 2, fusion: {len(tokens.fused)} of {tokens.pool_size} tokens enter the LLM"
    grids = list(tokens.visual_grids)
    sheets["fuse"] = _sheet(image, title, [(name, "") for name in grids], [Row("", None, tokens.visual_panels())])
    if decode_kept:
        rows = [Row(prompt, None, tokens.visual_panels(kept)) for prompt, kept in decode_kept.items()]
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
    image = picture_of(image_3HW)
    tokens = ImageTokens(config, stats, sample)
    columns, encode_rows = tokens.encode_table()
    steps = tokens.steps()
    visual = [("after fusion", share_of(len(tokens.fused), tokens.pool_size), tokens.visual_panels())]
    for letter, kept in zip(LETTERS, (decode_kept or {}).values(), strict=False):
        note = share_of(len(kept), len(tokens.fused))
        visual.append((f"{letter}, after layer {tokens.layer}", note, tokens.visual_panels(kept)))
        steps.append((f"{letter}, after LLM layer {tokens.layer}", len(kept)))
    columns += [(title, note) for title, note, _ in visual]
    if config.fusion == "channel_concat":  # visual tokens are cells of the common grid: a row of their own
        rows = [Row(row.label, row.colour, [*row.panels, *([None] * len(visual))]) for row in encode_rows]
        empty = [None] * len(encode_rows[0].panels)
        label = f"{JOINT}, {config.concat_grid} x {config.concat_grid}"
        rows.append(Row(label, tokens.colours[JOINT], [*empty, *(panels[0] for _, _, panels in visual)]))
    else:
        rows = [
            Row(row.label, row.colour, [*row.panels, *(panels[index] for _, _, panels in visual)])
            for index, row in enumerate(encode_rows)
        ]
    table = _table(image, columns, rows, OVERVIEW_PANEL)
    sidebar = _sidebar(image, list(decode_kept or {}), steps)
    size = (3 * MARGIN + SIDEBAR + table.width, max(table.height, sidebar.height) + 2 * MARGIN)
    sheet = Image.new("RGB", size, BACKGROUND)
    sheet.paste(sidebar, (MARGIN, MARGIN))
    sheet.paste(table, (2 * MARGIN + SIDEBAR, MARGIN))
    return sheet


def _table(image: Image.Image, columns: Sequence[tuple[str, str]], rows: Sequence[Row], side: int) -> Image.Image:
    """Panels of one image in rows, with column titles above and captions below."""
    picture = fit(image, side)
    step = side + GAP
    width = len(columns) * step - GAP
    notes = any(note for _, note in columns)
    head = round((TEXT + (NOTE_TEXT if notes else 0)) * LEADING) + 16
    labels = [wrapped(row.label, TEXT, width - (36 if row.colour else 0)) if row.label else [] for row in rows]
    caption = round(NOTE_TEXT * LEADING) + 8
    heights = [round(len(lines) * TEXT * LEADING) + (8 if lines else 0) + picture.height + caption for lines in labels]
    table = Image.new("RGB", (width, head + sum(heights) + GAP * (len(rows) - 1)), BACKGROUND)
    draw = ImageDraw.Draw(table)
    for index, (title, note) in enumerate(columns):
        below = write(draw, (index * step, 0), [cut(title, TEXT, side)], TEXT, INK)
        write(draw, (index * step, below), [cut(note, NOTE_TEXT, side)], NOTE_TEXT, FAINT)
    top = head
    for row, lines, height in zip(rows, labels, heights, strict=True):
        indent = 0
        if row.colour and lines:
            indent = 36
            draw.rectangle((0, top + 4, 22, top + 26), fill=row.colour)
        below = write(draw, (indent, top), lines, TEXT, INK) + (8 if lines else 0)
        for index, panel in enumerate(row.panels):
            if panel is None:
                continue
            table.paste(dim_dropped(picture, panel.grid, panel.cells, panel.colour), (index * step, below))
            at = (index * step, below + picture.height + 6)
            write(draw, at, [panel.caption], NOTE_TEXT, INK if len(panel.cells) else FAINT)
        top += height + GAP
    return table


def _sheet(image: Image.Image, title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Row]) -> Image.Image:
    """A title, a table, a legend."""
    table = _table(image, columns, rows, SHEET_PANEL)
    width = max(table.width, 2 * SHEET_PANEL + GAP)
    lines = wrapped(title, TITLE_TEXT, width)
    head = MARGIN + round(len(lines) * TITLE_TEXT * LEADING) + GAP
    sheet = Image.new("RGB", (width + 2 * MARGIN, head + table.height + GAP + SWATCH + MARGIN), BACKGROUND)
    write(ImageDraw.Draw(sheet), (MARGIN, MARGIN), lines, TITLE_TEXT, INK)
    sheet.paste(table, (MARGIN, head))
    legend(sheet, (MARGIN, head + table.height + GAP), image, stacked=False)
    return sheet


def _sidebar(image: Image.Image, prompts: Sequence[str], steps: Sequence[tuple[str, int]]) -> Image.Image:
    """The image, the prompts by letter, the tokens left after each step as bars, the legend."""
    picture = fit(image, SIDEBAR)
    texts = [wrapped(prompt, TEXT, SIDEBAR - 40) for prompt in prompts]
    text_height = sum(round(len(lines) * TEXT * LEADING) + 8 for lines in texts)
    bar = round(NOTE_TEXT * LEADING) + 18
    height = picture.height + text_height + len(steps) * bar + 2 * SWATCH + 10 + 4 * GAP
    sidebar = Image.new("RGB", (SIDEBAR, height), BACKGROUND)
    draw = ImageDraw.Draw(sidebar)
    sidebar.paste(picture, (0, 0))
    top = picture.height + GAP
    for letter, lines in zip(LETTERS, texts, strict=False):
        draw.text((0, top), letter, fill=COLOURS[0], font=font_of(TEXT))
        top = write(draw, (40, top), lines, TEXT, INK) + 8
    top += GAP
    for name, count in steps:
        draw.text((0, top), name, fill=FAINT, font=font_of(NOTE_TEXT))
        draw.text((SIDEBAR, top), str(count), fill=INK, font=font_of(NOTE_TEXT), anchor="ra")
        line = top + bar - 12
        draw.rectangle((0, line, SIDEBAR - 1, line + 4), fill=LINE)
        if count:
            draw.rectangle((0, line, max(2, round(SIDEBAR * count / steps[0][1])) - 1, line + 4), fill=COLOURS[0])
        top += bar
    legend(sidebar, (0, top + GAP), image, stacked=True)
    return sidebar
