"""The sheet of all pruners: what it draws is what the model keeps, and the model is left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.pruners.named import PRUNERS, with_pruner
from meteor_model.visualize import compare, draw_pruners, explain_pruners, look_under
from tests.meteor_model.builders import DENSE, decided, model, pixels, processor

PROMPT = "What colour is it?"
TOKENS = {"clip": 64, "pix2struct": 64, "convnext": 64}


@pytest.fixture(scope="module")
def built() -> MeteorForConditionalGeneration:
    return model(DENSE)


def kept_of_pool(found: compare.Under) -> list[int]:
    """Places among all tokens of the encoders, in their order."""
    starts = dict(zip(TOKENS, (0, 64, 128), strict=True))
    return [starts[kept.name] + cell for kept in found.grids for cell in kept.cells]


@pytest.mark.parametrize("name", ["divprune", "fastv", "vscan"])
@torch.no_grad()
def test_it_finds_what_the_model_keeps_and_leaves_it_as_it_was(
    built: MeteorForConditionalGeneration, name: str
) -> None:
    asked, before = processor(DENSE), built.config
    found = look_under(built, asked, pixels(1)[0], PROMPT, name, 24)
    assert built.config is before
    assert asked.tokens_per_image == 192
    pruned = model(DENSE)
    pruned.follow(with_pruner(before, name, 24))
    asked.tokens_per_image = pruned.config.tokens_per_image
    cache: Any = pruned.recording_cache()
    pruned.generate(**asked(text=[PROMPT], images=[[pixels(1)[0]]]), past_key_values=cache, max_new_tokens=1)
    pool = cache.pruning_stats.fuse[0].tolist()
    if name != "divprune":
        pool = [pool[index] for index in decided(cache).kept_visual()[0].tolist()]
    assert kept_of_pool(found) == pool
    assert len(pool) == 24


def test_a_smaller_image_is_drawn_smaller_and_a_refusal_says_why(built: MeteorForConditionalGeneration) -> None:
    ask = processor(DENSE)
    smaller = look_under(built, ask, pixels(1)[0], PROMPT, "smaller_image", 48)
    assert (smaller.side, [kept.grid for kept in smaller.grids]) == (32, [(4, 4)] * 3)
    refused = look_under(built, ask, pixels(1)[0], PROMPT, "smaller_image", 47)
    assert not refused.grids
    assert "no smaller image gives 47 visual tokens" in refused.refusal


def test_every_pruner_has_its_panels_under_one_heading(
    built: MeteorForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, drawn = list[str](), list[tuple[int, int]]()
    draw_text, dim = ImageDraw.ImageDraw.text, compare.dim_dropped

    def record_text(self: Any, xy: Any, text: str, *args: Any, **kwargs: Any) -> None:
        texts.append(text)
        draw_text(self, xy, text, *args, **kwargs)

    def record_panel(picture: Image.Image, grid: tuple[int, int], *rest: Any) -> Image.Image:
        drawn.append(grid)
        return dim(picture, grid, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record_text)
    monkeypatch.setattr(compare, "dim_dropped", record_panel)
    sheet = explain_pruners(built, processor(DENSE), pixels(1)[0], PROMPT, 48)
    assert [text for text in texts if text in PRUNERS] == sorted(PRUNERS, key=[*texts].index)
    assert [text for text in texts if text in compare.SECTIONS.values()] == list(compare.SECTIONS.values())
    assert len(drawn) == 3 * len(PRUNERS), "three encoders each; none is refused"
    assert sheet.width == compare.COLUMNS * (compare.PANEL + compare.GAP) - compare.GAP + 2 * compare.MARGIN


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no pruner to draw"):
        draw_pruners(pixels(1)[0], "", "", {"Nowhere": []})
