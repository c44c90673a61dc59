"""One image under every pruner, side by side: the cells that each keeps at equal tokens, and what the model then says.

`explain_pruners` does it for one model; `look_under` asks it under one pruner, `draw_pruners` draws what was found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import MeteorCache
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.pruners.named import PRUNERS, unpruned, with_pruner
from meteor_model.visualize.panels import (
    BACKGROUND,
    FAINT,
    GAP,
    INK,
    LEADING,
    LINE,
    MARGIN,
    NOTE_TEXT,
    SWATCH,
    TEXT,
    TITLE_TEXT,
    Cells,
    cut,
    dim_dropped,
    fit,
    legend,
    picture_of,
    wrapped,
    write,
)
from meteor_model.visualize.tokens import ImageTokens

PANEL, COLUMNS = 256, 8
ANSWER_TOKENS = 16
#: Where pruners act, in the order of the sheet: the beginning of `Pruner.acts` -> a heading.
SECTIONS = {
    "trivial": "Without looking at the tokens",
    "projected": "Before the language model",
    "language": "Inside the language model: what its last layer still sees",
    "": "Inside the towers",
}


@dataclass(frozen=True)
class Kept:
    """What one encoder's grid (or the joint one) keeps: its name, rows and columns, cells and their colour."""

    name: str
    grid: tuple[int, int]
    cells: Cells
    colour: str


@dataclass(frozen=True)
class Under:
    """One image under one pruner.

    Attributes:
        pruner: its name, or another one of the configuration.
        grids: what is kept of each grid; none where the pruner cannot run.
        answer: the model's.
        side: of the image that the towers see, in pixels, where it is not the model's usual one; else 0.
        refusal: why it cannot run on this model; empty where it can.
    """

    pruner: str
    grids: tuple[Kept, ...] = ()
    answer: str = ""
    side: int = 0
    refusal: str = ""


@torch.no_grad()
def look_under(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    image_3HW: torch.Tensor,
    prompt: str,
    pruner: str,
    keep: int,
    **settings: Any,
) -> Under:
    """What a pruner keeps of an image that is asked about, and the answer. The model is left as it was.

    Args:
        model: in eval mode.
        processor: the model's own.
        image_3HW: as it travels, uint8.
        prompt: the question.
        pruner: of `meteor_model.pruners.named.PRUNERS`.
        keep: visual tokens in the last layer.
        settings: the pruner's own.
    """
    try:
        config = with_pruner(model.config, pruner, keep, **settings)
    except ValueError as error:
        return Under(pruner, refusal=str(error))
    return look_with(model, processor, image_3HW, prompt, config, pruner)


@torch.no_grad()
def look_with(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    image_3HW: torch.Tensor,
    prompt: str,
    config: MeteorConfig,
    name: str,
) -> Under:
    """What a configuration of the model keeps of an image that is asked about, and the answer, under a name.

    The model is left as it was. Arguments are those of `look_under`.
    """
    before = model.config
    try:
        model.follow(config)
        processor.tokens_per_image = config.tokens_per_image
        inputs = processor(text=[prompt], images=[[image_3HW]]).to(model.device)
        cache = model.recording_cache()
        ids_1L = model.generate(**inputs, past_key_values=cache, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    finally:
        model.follow(before)
        processor.tokens_per_image = before.tokens_per_image
    decision = cache.decision if isinstance(cache, MeteorCache) else None
    left = None if decision is None else decision.kept_visual()[0].tolist()
    assert cache.pruning_stats is not None
    tokens = ImageTokens(config, cache.pruning_stats, 0)
    panels = zip(tokens.visual_grids, tokens.visual_panels(left), strict=True)
    grids = tuple(Kept(name, panel.grid, panel.cells, panel.colour) for name, panel in panels)
    answer = processor.tokenizer.decode(ids_1L[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Under(name, grids, answer.strip(), _other_side(before, config))


def _other_side(before: MeteorConfig, after: MeteorConfig) -> int:
    """The largest side that a tower sees where it differs from before, else 0."""
    usual, now = (max(item.image_size for item in config.encoders) for config in (before, after))
    return 0 if now == usual else now


def explain_pruners(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, image: Any, prompt: str, keep: int
) -> Image.Image:
    """The sheet of one model under every pruner; those that cannot run on it say why.

    Args:
        model: in eval mode.
        processor: the model's own.
        image: whatever the processor takes as one image.
        prompt: the question.
        keep: visual tokens that an image keeps in the last layer; `none` keeps all.

    Raises:
        ValueError: for an image that cannot be read, or more tokens than an image has.
    """
    most = unpruned(model.config).tokens_per_image
    if keep > most:
        raise ValueError(f"{keep} visual tokens cannot be kept: an image has {most}")
    image_3HW = processor.load_image(image)
    found = [
        look_under(model, processor, image_3HW, prompt, name, most if name == "none" else keep) for name in PRUNERS
    ]
    note = f"{keep} of {most} visual tokens are to stay; in quotes what the model answers"
    return draw_pruners(image_3HW, f"One image under every pruner: {prompt}", note, where_they_act(found))


def draw_pruners(
    image_3HW: torch.Tensor, title: str, note: str, sections: Mapping[str, Sequence[Under]], columns: int = COLUMNS
) -> Image.Image:
    """A sheet with a panel per pruner and grid.

    Args:
        image_3HW: the image as it travelled, uint8.
        title: e.g. the question.
        note: a line below it.
        sections: heading -> pruners in the order in which they are drawn.
        columns: panels side by side.

    Raises:
        ValueError: without pruners, or for an image that is not uint8 (3, H, W).
    """
    if not any(sections.values()):
        raise ValueError("there is no pruner to draw: give at least one")
    picture = fit(picture_of(image_3HW), PANEL)
    width = columns * (PANEL + GAP) - GAP
    parts = [_section(picture, heading, items, columns) for heading, items in sections.items()]
    lines = [*wrapped(title, TITLE_TEXT, width, most=1), *wrapped(note, NOTE_TEXT, width, most=2)]
    head = MARGIN + round((TITLE_TEXT + (len(lines) - 1) * NOTE_TEXT) * LEADING) + GAP
    height = head + sum(part.height + GAP for part in parts) + SWATCH + MARGIN
    sheet = Image.new("RGB", (width + 2 * MARGIN, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    below = write(draw, (MARGIN, MARGIN), lines[:1], TITLE_TEXT, INK)
    write(draw, (MARGIN, below), lines[1:], NOTE_TEXT, FAINT)
    for part in parts:
        sheet.paste(part, (MARGIN, head))
        head += part.height + GAP
    legend(sheet, (MARGIN, head), picture, stacked=False)
    return sheet


def where_they_act(found: Sequence[Under]) -> Mapping[str, list[Under]]:
    """Pruners under headings that say where they act."""
    sections: dict[str, list[Under]] = {heading: [] for heading in SECTIONS.values()}
    for item in found:
        entry = PRUNERS[item.pruner]
        acts = "trivial" if entry.source == "trivial" else entry.acts
        sections[next(heading for start, heading in SECTIONS.items() if acts.startswith(start))].append(item)
    return {heading: items for heading, items in sections.items() if items}


def _section(picture: Image.Image, heading: str, items: Sequence[Under], columns: int) -> Image.Image:
    """A heading over rows of panels; a pruner's grids stand in one row, side by side."""
    rows, width = list[list[Under]]([[]]), columns * (PANEL + GAP) - GAP
    for item in items:
        if sum(max(1, len(other.grids)) for other in [*rows[-1], item]) > columns and rows[-1]:
            rows.append([])
        rows[-1].append(item)
    top = round(TEXT * LEADING) + 14
    line, caption = round(TEXT * LEADING), 2 * round(NOTE_TEXT * LEADING) + 8
    step = line + picture.height + caption + GAP
    part = Image.new("RGB", (width, top + len(rows) * step - GAP), BACKGROUND)
    draw = ImageDraw.Draw(part)
    write(draw, (0, 0), [heading], TEXT, FAINT)
    draw.line((0, top - 8, width, top - 8), fill=LINE, width=2)
    for row in rows:
        left = 0
        for item in row:
            left = _draw_under(part, (left, top), picture, item)
        top += step
    return part


def _draw_under(part: Image.Image, at: tuple[int, int], picture: Image.Image, item: Under) -> int:
    """A pruner's name, panels and captions; returns where the next begins."""
    (left, top), draw = at, ImageDraw.Draw(part)
    inside = top + round(TEXT * LEADING)
    write(draw, (left, top), [cut(item.pruner, TEXT, PANEL)], TEXT, INK)
    if item.refusal:
        draw.rectangle((left, inside, left + picture.width, inside + picture.height), outline=LINE, width=2)
        lines = wrapped(item.refusal, NOTE_TEXT, PANEL - 24, most=7)
        write(draw, (left + 12, inside + 10), lines, NOTE_TEXT, FAINT)
        return left + PANEL + GAP
    seen = picture
    if item.side:
        seen = fit(picture, item.side).resize(picture.size, Image.Resampling.NEAREST)
    total = sum(len(kept.cells) for kept in item.grids)
    for place, kept in enumerate(item.grids):
        part.paste(dim_dropped(seen, kept.grid, kept.cells, kept.colour), (left, inside))
        below = inside + picture.height + 6
        count = f"{total} kept" if len(item.grids) == 1 else f"{kept.name}, {len(kept.cells)}"
        below = write(draw, (left, below), [cut(count, NOTE_TEXT, PANEL)], NOTE_TEXT, FAINT)
        if place == 0 and item.answer:
            write(draw, (left, below), [cut(f"“{item.answer}”", NOTE_TEXT, PANEL)], NOTE_TEXT, INK)
        left += PANEL + GAP
    return left
