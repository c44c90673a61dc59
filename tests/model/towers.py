"""Small towers with random weights, at 64 px: one or more of every registered family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from meteor_model.encoders import EncoderConfig, VisionEncoder, build_encoder

_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8}
_MLP = {**_VIT, "intermediate_size": 48}

#: name -> tower; the names say which variant of the family it is.
TOWERS: dict[str, EncoderConfig] = {
    config.name: config
    for config in (
        EncoderConfig("clip", "clip", 64, {**_MLP, "image_size": 64}),
        EncoderConfig("siglip", "siglip", 64, {**_MLP, "image_size": 64}),
        EncoderConfig("siglip2", "siglip2", 64, {**_MLP, "num_patches": 64}),
        EncoderConfig("dinov2", "dinov2", 64, {**_VIT, "image_size": 64, "mlp_ratio": 2}),
        EncoderConfig("dinov2_swiglu", "dinov2", 64, {**_VIT, "image_size": 64, "use_swiglu_ffn": True}),
        EncoderConfig(
            "dinov2_registers",
            "dinov2_registers",
            64,
            {**_VIT, "image_size": 64, "mlp_ratio": 2, "num_register_tokens": 3},
        ),
        EncoderConfig("vit", "vit", 64, {**_MLP, "image_size": 64}),
        EncoderConfig(
            "pix2struct",
            "pix2struct",
            64,
            {
                "hidden_size": 32,
                "d_ff": 48,
                "d_kv": 8,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "patch_embed_hidden_size": 192,
                "seq_len": 64,
                "initializer_range": 0.02,
            },
        ),
        EncoderConfig(
            "convnext", "convnext", 64, {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2, "patch_size": 4}
        ),
        EncoderConfig(
            "timm_convnext",
            "timm_conv",
            64,
            {
                "model_name": "convnext_atto",
                "stage": 1,
                "depths": [1, 2, 1, 1],
                "dims": [16, 32, 8, 8],
                "ls_init_value": 1.0,
            },
        ),
        EncoderConfig("timm_efficientnet", "timm_conv", 64, {"model_name": "efficientnet_lite0", "stage": 2}),
        EncoderConfig(
            "timm_resnet",
            "timm_conv",
            64,
            {"model_name": "resnet18", "stage": 2, "layers": [1, 1, 1, 1], "channels": [8, 16, 8, 8]},
        ),
    )
}


def tower(name: str, **changes: Any) -> VisionEncoder:
    """A tower of the table in eval mode; `changes` are fields of its EncoderConfig."""
    torch.manual_seed(0)
    return build_encoder(replace(TOWERS[name], **changes)).eval()


def full_grid(encoder: VisionEncoder, images: int) -> torch.Tensor:
    """Positions (images, N) of every cell."""
    rows, columns = encoder.grid_size(encoder.config)
    return torch.arange(rows * columns).expand(images, -1)


def library_forward(encoder: VisionEncoder, images: torch.Tensor, **kwargs: Any) -> Any:
    """The output of the library's own forward, of which `last_hidden_state` is (M, P + N, D)."""
    family = encoder.config.family
    if family == "pix2struct":
        return encoder.tower(flattened_patches=encoder.flatten_patches(images), **kwargs)
    if family == "siglip2":
        shapes = torch.tensor([encoder.grid_size(encoder.config)] * len(images))
        patches = torch.stack([convert_image_to_patches(image, 8) for image in images])
        return encoder.tower(patches, torch.ones(patches.shape[:2]), shapes, **kwargs)
    if family in ("clip", "siglip", "vit"):
        kwargs["interpolate_pos_encoding"] = encoder.config.image_size != encoder.tower.config.image_size
    return encoder.tower(images, **kwargs)


def library_tokens(encoder: VisionEncoder, images: torch.Tensor) -> torch.Tensor:
    """(M, P + N, D): what the library's own forward makes of the images, maps in raster order."""
    family = encoder.config.family
    if family == "timm_conv":
        stage = encoder.config.tower["stage"]
        hidden = encoder.tower.forward_intermediates(images, indices=[stage], intermediates_only=True)[0]
    else:
        hidden = library_forward(encoder, images).last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
