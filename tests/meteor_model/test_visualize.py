"""The pictures, pixel by pixel where that can be said: what is kept shows the image, what is dropped does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.modeling_meteor import MeteorForConditionalGeneration, PruningStats
from meteor_model.visualize import (
    COLOURS,
    draw_head_vav,
    draw_kept,
    draw_overview,
    draw_ranks,
    explain,
    explain_kept,
    panels,
    rank_report,
    sheets,
)
from tests.meteor_model.builders import DENSE, PRUNED, config, decided, model, pixels, processor

PROMPTS = ("What colour is it?", "Where?")
GRIDS = [(24, 24), (64, 64), (7, 7), (45, 31), (1, 1)]


@pytest.fixture(scope="module")
def built() -> MeteorForConditionalGeneration:
    return model(PRUNED)


@pytest.fixture(scope="module")
def stats(built: MeteorForConditionalGeneration) -> PruningStats:
    with torch.no_grad():
        return built.encode_images(pixels(2))[1]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every line of text that is drawn from here on."""
    lines: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def record(self: Any, xy: Any, text: str, *args: Any, **kwargs: Any) -> None:
        lines.append(text)
        draw_text(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return lines


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, int], list[int]]]:
    """(grid, cells) of every panel that is drawn from here on; the legend's swatches are left out."""
    seen: list[tuple[tuple[int, int], list[int]]] = []
    dim = sheets.dim_dropped

    def record(picture: Image.Image, grid: tuple[int, int], cells: Any, colour: str) -> Image.Image:
        if grid != (1, 1):
            seen.append((grid, list(cells)))
        return dim(picture, grid, cells, colour)

    monkeypatch.setattr(sheets, "dim_dropped", record)
    return seen


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [(300, 300), (224, 150)])
def test_kept_cells_are_the_image_and_dropped_ones_are_dimmed(grid: tuple[int, int], size: tuple[int, int]) -> None:
    picture = noise(*size)
    kept = set(range(0, grid[0] * grid[1], 3))
    panel = np.asarray(panels.dim_dropped(picture, grid, sorted(kept), COLOURS[0])).astype(int)
    own = np.asarray(picture).astype(int)
    accent = np.asarray(Image.new("RGB", (1, 1), COLOURS[0]))[0, 0]
    for row in range(size[1]):
        for column in range(0, size[0], 7):
            cell = row * grid[0] // size[1] * grid[1] + column * grid[1] // size[0]
            pixel = panel[row, column]
            if cell in kept:
                on_a_line = np.abs(pixel - (0.7 * own[row, column] + 0.3 * 255)).max() <= 1
                assert (pixel == own[row, column]).all() or on_a_line
            else:
                dimmed = pixel.max() - pixel.min() <= 20 and pixel.min() >= 130
                assert dimmed or (pixel == accent).all()


def test_inside_a_kept_cell_every_pixel_is_the_image_s() -> None:
    picture = noise(280, 280)
    panel = np.asarray(panels.dim_dropped(picture, (7, 7), [8], COLOURS[0]))
    own = np.asarray(picture)
    assert (panel[41:80, 41:80] == own[41:80, 41:80]).all()
    assert (panel[38:40, 45:75] == panel[38, 45]).all(), "outlined on the outside"
    assert not (panel[100:, 100:] == own[100:, 100:]).all(axis=-1).mean() > 0.01


@pytest.mark.parametrize("grid", GRIDS)
def test_cells_of_pixels_partition_the_picture(grid: tuple[int, int]) -> None:
    owner = panels.cell_of_pixels((200, 130), grid)
    assert owner.shape == (130, 200)
    assert sorted(set(owner.flatten().tolist())) == list(range(grid[0] * grid[1]))


def test_sheets_have_a_panel_per_encoder_and_step(
    built: MeteorForConditionalGeneration, stats: PruningStats, drawn: list[Any], written: list[str]
) -> None:
    decode_kept = {PROMPTS[0]: [0, 3, 23], PROMPTS[1]: [5]}
    drawn_sheets = draw_kept(pixels(2)[1], built.config, stats, sample=1, decode_kept=decode_kept)
    assert list(drawn_sheets) == ["encode", "fuse", "decode"]
    encoders, steps = 3, 4
    assert len(drawn) == encoders * steps + encoders + len(PROMPTS) * encoders
    encode = [cells for _, cells in drawn[: encoders * steps]]
    clip, convnext = stats.encode["clip"], stats.encode["convnext"]
    assert encode[:4] == [list(range(64)), *(cells[1].tolist() for cells in clip)]
    assert encode[8:] == [list(range(64))] * 3 + [convnext[0][1].tolist()], "a convolutional tower runs dense"
    fused = [cells for _, cells in drawn[12:15]]
    pool = [(name, cell) for name, kept in stats.encode.items() for cell in kept[-1][1].tolist()]
    entered = [pool[index] for index in stats.fuse[1].tolist()]
    for name, cells in zip(stats.encode, fused, strict=True):
        assert cells == [cell for owner, cell in entered if owner == name]
    assert sum(len(cells) for _, cells in drawn[15:18]) == 3
    assert sum(len(cells) for _, cells in drawn[18:21]) == 1
    assert drawn_sheets["encode"].width > steps * sheets.SHEET_PANEL
    assert drawn_sheets["encode"].height > encoders * sheets.SHEET_PANEL
    numbers = [f"{kept.shape[1]} of 64" for kept in clip]
    assert all(number in written for number in numbers)
    assert "Stage 2, fusion: 24 of 60 tokens enter the LLM" in " ".join(written)
    assert "Stage 3, decoding: 3 and 1 of 24 tokens stay after LLM layer 2" in " ".join(written)


def test_the_overview_s_numbers_are_those_of_the_statistics(
    built: MeteorForConditionalGeneration, stats: PruningStats, drawn: list[Any], written: list[str]
) -> None:
    decode_kept = {PROMPTS[0]: [0, 3, 23], PROMPTS[1]: []}
    overview = draw_overview(pixels(2)[0], built.config, stats, decode_kept=decode_kept)
    assert len(drawn) == 3 * 7
    counts = [int(text) for text in written if text.isdigit()]
    assert counts[-5:] == [192, 60, 24, 3, 0]
    captions = [re.fullmatch(r"(\d+) of (\d+)(, by mean)?", text) for text in written]
    kept_of = [(int(found[1]), int(found[2])) for found in captions if found]
    assert (24, 60) in kept_of
    assert (3, 24) in kept_of
    assert (0, 24) in kept_of
    assert {"A", "B", *PROMPTS} <= set(written)
    assert overview.width > 7 * sheets.OVERVIEW_PANEL + sheets.SIDEBAR


def test_a_long_prompt_is_wrapped_and_cut(built: MeteorForConditionalGeneration, stats: PruningStats) -> None:
    long = {"why " * 200: [0], "w" * 500: [1]}
    plain = {"a": [0], "b": [1]}
    sizes = [draw_overview(pixels(2)[0], built.config, stats, decode_kept=kept).width for kept in (long, plain)]
    assert sizes[0] == sizes[1]
    assert panels.wrapped("why " * 200, 20, 200, most=2)[1].endswith("...")


def test_joined_channels_have_a_grid_of_their_own(drawn: list[Any]) -> None:
    dense = config(DENSE, fusion="channel_concat", concat_grid=4)
    torch.manual_seed(0)
    joint = MeteorForConditionalGeneration(dense).eval()
    with torch.no_grad():
        _, stats = joint.encode_images(pixels(1))
    draw_overview(pixels(1)[0], dense, stats)
    assert [grid for grid, _ in drawn] == [(8, 8)] * 3 + [(4, 4)]
    assert drawn[-1][1] == list(range(16))


# -------------------------------------------------------------------------------------------------------------- charts


def ranks_of(images: int) -> dict[str, dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return {
        name: {"clip": generator.normal(50, 5, (images, 3)), "convnext": generator.normal(20, 2, (images, 1))}
        for name in ("energy", "effective")
    }


def test_a_report_holds_mean_and_sample_deviation() -> None:
    measured = ranks_of(5)
    report = rank_report(measured)
    assert report["images"] == 5
    item = report["ranks"]["energy"]["clip"][1]
    values = measured["energy"]["clip"][:, 1].tolist()
    mean = sum(values) / 5
    assert item["mean"] == pytest.approx(mean)
    assert item["std"] == pytest.approx((sum((value - mean) ** 2 for value in values) / 4) ** 0.5)
    assert rank_report(ranks_of(1))["ranks"]["energy"]["clip"][0]["std"] == 0


def coloured(picture: Image.Image, colour: str) -> int:
    """Pixels of exactly this colour."""
    wanted = np.asarray(Image.new("RGB", (1, 1), colour))[0, 0]
    return int((np.asarray(picture) == wanted).all(axis=-1).sum())


@pytest.mark.parametrize("images", [1, 6])
def test_the_chart_of_ranks_has_the_encoders_colours(images: int) -> None:
    report = rank_report(ranks_of(images))
    chart = draw_ranks(report)
    assert chart.size == (1480, 820)
    assert coloured(chart, COLOURS[0]) > 500
    assert coloured(chart, COLOURS[1]) > 50
    assert coloured(chart, COLOURS[2]) == 0
    expected = {"clip": [40.0, 45.0, 50.0], "convnext": [22.0]}
    assert coloured(draw_ranks(report, expected, "effective"), COLOURS[0]) > coloured(chart, COLOURS[0])


def test_the_chart_of_heads_marks_the_chosen_ones() -> None:
    vav = np.linspace(0, 0.9, 24).reshape(3, 8)
    one_layer = draw_head_vav({"What?": vav[1]}, {"What?": [6, 7]})
    none = draw_head_vav({"What?": vav[1]})
    assert coloured(one_layer, COLOURS[1]) > 10_000
    assert coloured(none, COLOURS[1]) == 0
    both = draw_head_vav({"What?": vav, "Where?": vav}, {"What?": [7], "Where?": [6]}, layer=2)
    assert both.width > 1.5 * one_layer.width
    assert both.height > one_layer.height
    assert coloured(both, COLOURS[1]) > 10_000


VAV = np.full((3, 8), 0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_head_vav({}), "at least one prompt"),
        (lambda: draw_head_vav({"a": VAV, "b": VAV[0]}, layer=1), "the same for all prompts"),
        (lambda: draw_head_vav({"a": VAV}), "layer None is not one of the 3 layers"),
        (lambda: draw_head_vav({"a": VAV}, layer=4), "layer 4 is not one of the 3 layers"),
        (lambda: draw_head_vav({"a": VAV}, {"a": [8]}, 1), "head 8 of prompt 'a' is not one of the 8 heads"),
        (lambda: draw_head_vav({"a": VAV}, {"b": [1]}, 1), r"chosen for prompts \['b'\]"),
        (lambda: draw_head_vav({"a": VAV * np.nan}, layer=1), "share between 0 and 1"),
        (lambda: draw_head_vav({"a": VAV * 3}, layer=1), "share between 0 and 1"),
        (lambda: draw_ranks({"images": 0, "ranks": {}}), "no ranks to draw"),
    ],
)
def test_numbers_that_cannot_be_drawn_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------------------- explain


def test_one_call_draws_everything(
    built: MeteorForConditionalGeneration, drawn: list[Any], written: list[str], tmp_path: Path
) -> None:
    image = tmp_path / "noise.png"
    noise(90, 50).save(image)
    pictures = explain(built, processor(), image, PROMPTS, rank_images=[noise(40, 40)])
    assert list(pictures) == ["overview", "encode", "fuse", "decode", "ranks", "vav"]
    assert all(min(picture.size) > 400 and len(picture.getcolors(1 << 24) or ()) > 50 for picture in pictures.values())
    # What is drawn is what `generate` keeps for the same prompt.
    inputs = processor()(text=[PROMPTS[1]], images=[[image]])
    cache = built.new_cache()
    built.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    last_of_overview = [cells for _, cells in drawn[6:21:7]]
    assert sum(map(len, last_of_overview)) == int(decided(cache).kept_counts_B[0])
    assert f"{int(decided(cache).kept_counts_B[0])} of 24" in written


def test_charts_are_given_what_the_model_does(
    built: MeteorForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, tuple[Any, ...]] = {}
    for name in ("draw_ranks", "draw_head_vav"):
        monkeypatch.setattr(
            f"meteor_model.visualize.from_model.{name}", lambda *args, name=name: given.update({name: args})
        )
    images = [noise(64, 64), noise(40, 64)]
    explain(built, processor(), images[0], PROMPTS, only=["ranks", "vav"], rank_images=images[1:])
    loaded = torch.stack([processor().load_image(image) for image in images])
    report, expected, estimator = given["draw_ranks"]
    assert report == rank_report(built.measure_ranks(loaded, tuple(report["ranks"])))
    assert (report["images"], expected, estimator) == (2, built.config.ranks, "effective")
    vav, chosen, layer = given["draw_head_vav"]
    for prompt in PROMPTS:
        cache = built.new_cache()
        with torch.no_grad():
            built(**processor()(text=[prompt], images=[[images[0]]]), past_key_values=cache, use_cache=True)
        assert chosen[prompt] == decided(cache).heads_Bk[0].tolist()
        assert vav[prompt][layer - 1, chosen[prompt]].sum() == pytest.approx(decided(cache).mass_B[0].item(), rel=1e-5)
        assert vav[prompt].shape == (4, 4)


def test_each_part_is_drawn_alone(built: MeteorForConditionalGeneration) -> None:
    assert list(explain(built, processor(), noise(64, 64), (), only=["ranks"])) == ["ranks"]
    assert list(explain(built, processor(), noise(64, 64), PROMPTS[:1], only=["vav"])) == ["vav"]
    assert list(explain_kept(built, processor(), noise(64, 64), ())) == ["overview", "encode", "fuse"]


OFF = replace(PRUNED, decode=DecodePruning(enabled=False))
UNSOLVED = replace(PRUNED, decode=DecodePruning(target_mean=12.0))


@pytest.mark.parametrize(
    ("pruning", "image", "prompts", "only", "message"),
    [
        (PRUNED, noise(64, 64), (), ["kept"], "give at least one"),
        (PRUNED, noise(64, 64), ("  ",), ["kept"], "prompt 1 is empty"),
        (PRUNED, noise(64, 64), ("a", "a"), ["vav"], "prompt 2 is the same as an earlier one: 'a'"),
        (PRUNED, "nowhere.png", ("a",), ["kept"], "image nowhere.png cannot be read: No such file"),
        (PRUNED, __file__, ("a",), ["ranks"], "test_visualize.py cannot be used"),
        (PRUNED, noise(64, 64), ("a",), ["heads"], "cannot draw heads: choose from kept, ranks, vav"),
        (PRUNED, noise(64, 64), ("a",), [], "cannot draw nothing"),
        (OFF, noise(64, 64), ("a",), ["kept"], "stage 3 of this model is off"),
        (OFF, noise(64, 64), ("a",), ["vav"], "stage 3 of this model is off"),
        (UNSOLVED, noise(64, 64), ("a",), ["kept"], "pruning.decode.lam is not set"),
    ],
)
def test_bad_input_is_named(pruning: Any, image: Any, prompts: Any, only: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(model(pruning), processor(pruning), image, prompts, only)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": 2}, "sample 2 is not one of the 2 images"),
        ({"decode_kept": {"a": [24]}}, "token 24: the image has 24 visual tokens"),
        ({"image_3HW": torch.zeros(3, 8, 8)}, r"uint8 \(3, H, W\), got torch.float32 \(3, 8, 8\)"),
    ],
)
def test_what_does_not_belong_together_is_named(
    built: MeteorForConditionalGeneration, stats: PruningStats, change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"image_3HW": pixels(1)[0], "config": built.config, "stats": stats}
    with pytest.raises(ValueError, match=message):
        draw_kept(**{**arguments, **change})
