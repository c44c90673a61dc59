"""One image under every pruner: which cells stay. `python -m benchmarks.pruners_picture --image FILE --parts DIR`.

Two pretrained towers (DINOv2 ViT-S/14 and EfficientNet-Lite0, as `make parts` leaves them) with 256 and 100 tokens, of
which every pruner keeps 89 (AutoPrune in the mean of the layers). Projectors and language model have random weights:
what asks them (the last rows) shows which cells such a rule may choose, and not that it chooses well.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from meteor_model.architectures import architecture
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import MeteorCache
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.pruners.named import PRUNERS, with_pruner
from meteor_model.visualize.sheets import BACKGROUND, COLOURS, FAINT, INK, dim_dropped, fit
from meteor_model.weights import load_parts

TOWERS = {"dinov2": "dinov2-small", "efficientnet": "efficientnet-lite0"}
KEEP, TEXT = 89, 24
PANEL, GAP, COLUMNS, CAPTION = 168, 10, 4, 24
TARGET = Path(__file__).parents[1] / "docs" / "images" / "pruners.png"


def model_of(parts: Path) -> MeteorForConditionalGeneration:
    """The two towers with their weights before a small random language model, whose layers are too few to matter."""
    small = architecture("small")
    text = {
        **small.text_config,
        "num_hidden_layers": 8,
        "vocab_size": 512,
        "hidden_size": 288,
        "num_attention_heads": 9,
    }
    config = MeteorConfig(
        encoders=[item for item in small.encoders if item.name in TOWERS],
        text_config=text,
        image_size=small.image_size,
        image_token_id=3,
    )
    torch.manual_seed(0)
    model = MeteorForConditionalGeneration(config).eval()
    load_parts(model, {name: str(parts / folder) for name, folder in TOWERS.items()})
    return model


@torch.no_grad()
def cells_of(
    model: MeteorForConditionalGeneration, dense: MeteorConfig, name: str, pixels_13SS: torch.Tensor
) -> list[tuple[tuple[int, int], list[int]]]:
    """For each tower, its grid under this pruner, and the cells whose tokens are left at the end."""
    model.follow(with_pruner(dense, name, dense.tokens_per_image if name == "none" else KEEP))
    config = model.config
    ids = torch.tensor([[config.image_token_id] * config.tokens_per_image + [*range(4, 4 + TEXT)]])
    kv = model.recording_cache()
    model.generate(
        ids, pixel_values=pixels_13SS, past_key_values=kv, max_new_tokens=1, pad_token_id=0, eos_token_id=None
    )
    stats, decision = kv.pruning_stats, kv.decision if isinstance(kv, MeteorCache) else None
    pool = [(tower, cell) for tower, kept in stats.encode.items() for cell in kept[-1][0].tolist()]
    entered = [pool[index] for index in stats.fuse[0].tolist()]
    left = entered if decision is None else [entered[index] for index in decision.kept_visual()[0].tolist()]
    return [(grid, [cell for owner, cell in left if owner == tower]) for tower, grid in config.encoder_grids.items()]


def sheet(image: Image.Image, rows: Sequence[tuple[str, list[tuple[tuple[int, int], list[int]]]]]) -> Image.Image:
    """A pair of panels for each pruner, DINOv2's cells and EfficientNet's."""
    picture, title, note = fit(image, PANEL), ImageFont.load_default(19), ImageFont.load_default(15)
    wide, high = 2 * PANEL + GAP // 2, picture.height + 2 * CAPTION + GAP
    lines = -(-len(rows) // COLUMNS)
    whole = Image.new("RGB", (COLUMNS * (wide + 2 * GAP) + GAP, lines * (high + GAP) + GAP), BACKGROUND)
    draw = ImageDraw.Draw(whole)
    for index, (name, towers) in enumerate(rows):
        left, top = GAP + index % COLUMNS * (wide + 2 * GAP), GAP + index // COLUMNS * (high + GAP)
        draw.text((left, top), name, fill=INK, font=title)
        for tower, ((grid, cells), colour) in enumerate(zip(towers, COLOURS, strict=False)):
            place = (left + tower * (PANEL + GAP // 2), top + CAPTION)
            whole.paste(dim_dropped(picture, grid, cells, colour), place)
            text = f"{len(cells)} of {grid[0] * grid[1]}"
            draw.text((place[0], place[1] + picture.height + 3), text, fill=FAINT, font=note)
    return whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--parts", type=Path, required=True, help="the folder that `make parts` fills")
    parser.add_argument("--output", type=Path, default=TARGET)
    options = parser.parse_args(arguments)
    model = model_of(options.parts)
    dense = model.config
    processor = MeteorImageProcessor(dense.image_size)
    pixels_13SS = processor([Image.open(options.image).convert("RGB")], return_tensors="pt")["pixel_values"]
    names = sorted(PRUNERS, key=lambda name: "language model" in PRUNERS[name].acts)
    rows = [(name, cells_of(model, dense, name, pixels_13SS)) for name in names]
    image = Image.fromarray(pixels_13SS[0].permute(1, 2, 0).contiguous().numpy())
    sheet(image, rows).quantize(128, dither=Image.Dither.NONE).save(options.output, optimize=True)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
