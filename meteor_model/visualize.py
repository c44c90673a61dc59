"""Pictures of what the three stages keep: the image, with every dropped cell dimmed, encoder by encoder.

`draw_kept` gives one picture per stage for one image:

    encode  a row per encoder, a column per boundary
    fuse    a column per encoder: the cells whose token entered the LLM
    decode  a row per prompt, a column per encoder: the cells whose token stayed after the early LLM layer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.encoders import encoder_class
from meteor_model.modeling_meteor import PruningStats

PANEL = 224
GAP = 12
TITLE = 20
BACKGROUND, INK, FAINT = (255, 255, 255), (30, 30, 30), (120, 120, 120)
DIM, EDGE = (242, 243, 245), (42, 111, 187)


def draw_kept(
    image_3SS: torch.Tensor,
    config: MeteorConfig,
    stats: PruningStats,
    sample: int = 0,
    decode_kept: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Image.Image]:
    """One picture per stage for image `sample` of a batch.

    Args:
        image_3SS: that image, uint8.
        config: the model's configuration.
        stats: what `get_image_features` returned with the tokens.
        sample: index of the image in `stats`.
        decode_kept: for each prompt, the indices (into the K tokens of the image) that stage 3 kept.

    Returns:
        stage -> picture, in the order of the stages.
    """
    picture = Image.fromarray(image_3SS.permute(1, 2, 0).cpu().numpy()).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
    grids = {item.name: encoder_class(item.family).grid_size(item) for item in config.encoders}
    rows = []
    for name, kept in stats.encode.items():
        total = stats.encoder_tokens[name]
        panels = [
            _panel(picture, grids[name], cells[sample].tolist(), f"boundary {b}: {cells.shape[1]} of {total}")
            for b, cells in enumerate(kept, start=1 + max(map(len, stats.encode.values())) - len(kept))
        ]
        rows.append((name, [_panel(picture, grids[name], list(range(total)), f"all {total}"), *panels]))
    pictures = {"encode": _sheet("Stage 1, encoding: cells kept after each boundary", rows)}

    pool = _pool_cells(stats, sample)
    fused = [pool[index] for index in stats.fuse[sample].tolist()]
    pictures["fuse"] = _sheet(
        f"Stage 2, fusion: {len(fused)} of {len(pool)} tokens enter the LLM", [("", _by_encoder(picture, grids, fused))]
    )
    if decode_kept:
        rows = [
            (prompt, _by_encoder(picture, grids, [fused[index] for index in kept]))
            for prompt, kept in decode_kept.items()
        ]
        counts = ", ".join(str(len(kept)) for kept in decode_kept.values())
        title = f"Stage 3, decoding: {counts} of {len(fused)} tokens stay after layer {config.pruning.decode.layer}"
        pictures["decode"] = _sheet(title, rows)
    return pictures


def _pool_cells(stats: PruningStats, sample: int) -> list[tuple[str, int]]:
    """(encoder, cell) of every token of the fusion pool, in its order."""
    return [(name, cell) for name, kept in stats.encode.items() for cell in kept[-1][sample].tolist()]


def _by_encoder(
    picture: Image.Image, grids: Mapping[str, tuple[int, int]], kept: Sequence[tuple[str, int]]
) -> list[Image.Image]:
    panels = []
    for name, grid in grids.items():
        cells = [cell for owner, cell in kept if owner == name]
        panels.append(_panel(picture, grid, cells, f"{name}: {len(cells)}"))
    return panels


def _panel(picture: Image.Image, grid: tuple[int, int], cells: Sequence[int], title: str) -> Image.Image:
    """The image with all cells but `cells` dimmed, under a title."""
    rows, columns = grid
    kept = set(cells)
    veil = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, DIM), 0.82)
    panel = Image.new("RGB", (PANEL, PANEL + TITLE), BACKGROUND)
    panel.paste(veil, (0, TITLE))
    draw = ImageDraw.Draw(panel)
    for cell in kept:
        row, column = divmod(cell, columns)
        box = (
            round(column * PANEL / columns),
            round(row * PANEL / rows),
            round((column + 1) * PANEL / columns),
            round((row + 1) * PANEL / rows),
        )
        panel.paste(picture.crop(box), (box[0], box[1] + TITLE))
        # Outlined: over a light background a kept cell looks like a dimmed one.
        draw.rectangle((box[0], box[1] + TITLE, box[2] - 1, box[3] - 1 + TITLE), outline=EDGE)
    draw.text((2, 2), title, fill=INK, font=ImageFont.load_default(13))
    return panel


def _sheet(title: str, rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Panels in rows, a label above each row, a title above all."""
    columns = max(len(panels) for _, panels in rows)
    label = TITLE + 4 if any(name for name, _ in rows) else 0
    height = PANEL + TITLE + GAP + label
    sheet = Image.new("RGB", (columns * (PANEL + GAP) + GAP, 34 + len(rows) * height + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 9), title, fill=INK, font=ImageFont.load_default(16))
    for index, (name, panels) in enumerate(rows):
        top = 34 + GAP // 2 + index * height
        if name:
            draw.text((GAP, top), name, fill=FAINT, font=ImageFont.load_default(14))
        for column, panel in enumerate(panels):
            sheet.paste(panel, (GAP + column * (PANEL + GAP), top + label))
    return sheet
