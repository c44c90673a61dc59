"""The eagle recipes see images as EAGLE does: against its public code's steps, written out literally.

Source, for reading: github.com/NVlabs/EAGLE, eagle/model/multimodal_encoder/. One square image, normalised once by
CLIP's mean and standard deviation, goes to every tower; a tower of another size gets it resized bilinearly with aligned
corners; CLIP drops CLS before its first norm; Pix2Struct undoes the normalisation and has its own processor; maps are
resized the same way and joined on the channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.pix2struct.image_processing_pix2struct import Pix2StructImageProcessor

from meteor_model.architectures import architecture, as_eagle
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.encode import encode_pruned
from meteor_model.encoders import EncoderConfig, VisionEncoder
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from tests.meteor_model.builders import DENSE, config
from tests.meteor_model.towers import TOWERS, tower

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
SIDE = 96


def images(side: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, 6, 6, generator=generator)
    return (F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - MEAN) / STD


def literal_pixels(pixels: Tensor, size: int) -> Tensor:
    """Bilinear with aligned corners, each value from its four neighbours."""
    whole, side = normalised(pixels), pixels.shape[-1]
    places = torch.arange(size, dtype=torch.float64) * (side - 1) / (size - 1)
    low = places.floor().long().clamp(max=side - 2)
    share = (places - low).float()
    rows = whole[:, :, low] * (1 - share)[:, None] + whole[:, :, low + 1] * share[:, None]
    return rows[..., low] * (1 - share) + rows[..., low + 1] * share


def literal_clip(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    net: Any = encoder.tower
    hidden = net.pre_layrnorm(net.embeddings(pixels)[:, 1:])
    for layer in net.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    return cast(Tensor, hidden)


def literal_pix2struct(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    values = (normalised(pixels) * STD + MEAN) * 255.0
    processor = Pix2StructImageProcessor(patch_size={"height": 8, "width": 8}, max_patches=65, is_vqa=False)
    patches = processor(list(values), return_tensors="pt", do_convert_rgb=False)["flattened_patches"]
    return cast(Tensor, encoder.tower(flattened_patches=patches[:, :64]).last_hidden_state)


@pytest.mark.parametrize("name", ["eagle_x4_7b", "eagle_x5_7b", "meteor_x4_7b"])
def test_the_eagle_recipes_have_eagle_s_settings(name: str) -> None:
    eagle = name.startswith("eagle")
    for item in architecture(name).encoders:
        assert item.pixels == ("eagle" if eagle else "own")
        assert item.tower.get("cls_token") == ("dropped" if eagle and item.family == "clip" else None)


@pytest.mark.parametrize("name", sorted(set(TOWERS) - {"pix2struct"}))
def test_every_tower_takes_eagle_s_pixels(name: str) -> None:
    encoder = tower(name, pixels="eagle")
    torch.testing.assert_close(encoder.normalize(images(), torch.float32), literal_pixels(images(), 64))
    torch.testing.assert_close(encoder.normalize(images(64), torch.float32), normalised(images(64)))


@torch.no_grad()
def test_clip_s_blocks_run_without_cls() -> None:
    encoder = tower("clip", tower={**TOWERS["clip"].tower, "cls_token": "dropped"}, pixels="eagle")
    pixels = encoder.normalize(images(), torch.float32)
    tokens, _ = encode_pruned(encoder, pixels, [64] * 3, 2, None)
    assert tokens.prefix.shape[1] == 0
    assert torch.equal(tokens.hidden, literal_clip(encoder, pixels))
    pruned, kept = encode_pruned(encoder, pixels, (40, 24, 10), 2, None)
    assert pruned.hidden.shape == (2, 10, 32), "tokens are then scored by the attention they receive"
    assert kept[-1].shape == (2, 10)
    assert not torch.allclose(
        tokens.hidden, encode_pruned(tower("clip"), pixels, [64] * 3, 2, None)[0].hidden, atol=1e-3
    )


@torch.no_grad()
def test_the_joined_features_are_eagle_s() -> None:
    """The whole vision side on tiny towers: of CLIP 64 px, of Pix2Struct 64, of the ConvNeXt the travelling 96."""
    towers = {
        "clip": replace(TOWERS["clip"], name="clip"),
        "convnext": replace(TOWERS["timm_convnext"], name="convnext", image_size=SIDE),
        "pix2struct": TOWERS["pix2struct"],
    }
    torch.manual_seed(0)
    data = config(DENSE, fusion="channel_concat", concat_grid=8).to_dict()
    data |= {"encoders": [as_eagle(item).to_dict() for item in towers.values()], "image_size": SIDE}
    eagle = MeteorForConditionalGeneration(MeteorConfig(**data)).eval()
    clip, convnext, pix2struct = (cast(VisionEncoder, encoder) for encoder in eagle.encoders.values())
    net: Any = convnext.tower
    maps = [
        literal_clip(clip, literal_pixels(images(), 64)).transpose(1, 2).unflatten(2, (8, 8)),
        net.forward_intermediates(normalised(images()), indices=[1], intermediates_only=True)[0],
        literal_pix2struct(pix2struct, images()).transpose(1, 2).unflatten(2, (8, 8)),
    ]
    assert maps[1].shape[-1] == 12
    resized = [F.interpolate(grid, size=(8, 8), mode="bilinear", align_corners=True) for grid in maps]
    joined = torch.cat([grid.flatten(2).transpose(1, 2) for grid in resized], dim=-1)
    features = eagle.get_image_features(images()).last_hidden_state
    torch.testing.assert_close(features, eagle.projectors["joint"](joined), rtol=1e-3, atol=1e-4)


def test_settings_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="encoder 'clip': pixels must be one of own, eagle, got 'clip'"):
        EncoderConfig("clip", "clip", 64, {}, pixels="clip")
    with pytest.raises(ValueError, match="encoder 'clip': cls_token must be one of kept, dropped, got False"):
        tower("clip", tower={**TOWERS["clip"].tower, "cls_token": False})
