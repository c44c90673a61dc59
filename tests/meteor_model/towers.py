"""Small towers with random weights, at 64 px: one or more of every registered family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from transformers import SamVisionConfig, SamVisionModel
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from meteor_model.encoders import EncoderConfig, VisionEncoder, build_encoder
from meteor_model.encoders.pix2struct import Pix2StructEncoder

_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 8}
_MLP = {**_VIT, "intermediate_size": 48}
_EVA = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 8 / 3,
    "qkv_fused": False,
    "swiglu_mlp": True,
    "scale_mlp": True,
    "ref_feat_shape": 4,
}
#: The deep segments of four blocks in three are 1..2 and 3: each has a global block.
_DETECTOR = {**_EVA, "img_size": 32, "global_blocks": [1, 3]}
_SAM = {
    **_VIT,
    "output_channels": 16,
    "image_size": 64,
    "initializer_range": 0.02,
    "mlp_dim": 48,
    "global_attn_indexes": [1, 3],
}

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
        EncoderConfig("eva02", "eva02", 64, _EVA),
        EncoderConfig(
            "eva02_fused", "eva02", 64, {**_EVA, "qkv_fused": True, "scale_attn_inner": True, "init_values": 0.5}
        ),
        EncoderConfig("eva02_det", "eva02_det", 64, {**_DETECTOR, "window_size": 4}),
        EncoderConfig("eva02_det_padded", "eva02_det", 64, {**_DETECTOR, "window_size": 3, "init_values": 0.5}),
        EncoderConfig("sam", "sam", 64, {**_SAM, "window_size": 4}),
        EncoderConfig("sam_padded", "sam", 64, {**_SAM, "window_size": 3}),
        EncoderConfig("sam_short", "sam", 64, {**_SAM, "window_size": 5, "neck": "short", "qkv_bias": False}),
        EncoderConfig("sam_plain", "sam", 64, {**_SAM, "window_size": 3, "use_rel_pos": False, "use_abs_pos": False}),
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
        return encoder.tower(flattened_patches=cast(Pix2StructEncoder, encoder).flatten_patches(images), **kwargs)
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
    if family == "eva02":
        hidden = encoder.tower.forward_features(images)
    elif family == "eva02_det":
        hidden = eva02_det_forward(encoder, images)
    elif family == "sam":
        hidden = sam_at_size_of(encoder)(images).last_hidden_state
    elif family == "timm_conv":
        stage = encoder.config.tower["stage"]
        hidden = encoder.tower.forward_intermediates(images, indices=[stage], intermediates_only=True)[0]
    else:
        hidden = library_forward(encoder, images).last_hidden_state
    return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def eva02_det_forward(encoder: VisionEncoder, images: torch.Tensor) -> torch.Tensor:
    """The detector's published forward on timm's modules, windows listed cell by cell: (M, N, D)."""
    tower, (rows, columns), window = encoder.tower, encoder.grid, encoder.config.tower["window_size"]
    grid_1Dhw = tower.pos_embed.transpose(1, 2).unflatten(2, (4, 4))
    resized_1Dhw = torch.nn.functional.interpolate(grid_1Dhw, (rows, columns), mode="bicubic", align_corners=False)
    hidden = tower.patch_embed(images).flatten(1, 2) + resized_1Dhw.flatten(2).transpose(1, 2)
    windows = [
        [(row, column) for row in range(top, top + window) for column in range(left, left + window)]
        for top in range(0, rows, window)
        for left in range(0, columns, window)
    ]
    # A cell beyond the grid is the zero token that is appended after the last one.
    cells = torch.tensor(
        [[r * columns + c if r < rows and c < columns else rows * columns for r, c in cells] for cells in windows]
    )
    for index, block in enumerate(tower.blocks):
        if index in encoder.config.tower["global_blocks"]:
            hidden = block(hidden, rope=tower.rope.get_embed(shape=(rows, columns)))
            continue
        normed = torch.nn.functional.pad(block.norm1(hidden), (0, 0, 0, 1))
        attended = block.attn(normed[:, cells].flatten(0, 1), rope=tower.rope.get_embed(shape=(window, window)))
        attended = attended.unflatten(0, (len(hidden), -1))
        branch = torch.stack([attended[:, cells == cell][:, 0] for cell in range(rows * columns)], dim=1)
        hidden = hidden + (branch if block.gamma_1 is None else block.gamma_1 * branch)
        branch = block.mlp(block.norm2(hidden))
        hidden = hidden + (branch if block.gamma_2 is None else block.gamma_2 * branch)
    return hidden


def sam_at_size_of(encoder: VisionEncoder) -> SamVisionModel:
    """A SAM built for the encoder's image size; weights that depend on the size are resized as SAM's own are."""
    settings = {key: value for key, value in encoder.config.tower.items() if key != "neck"}
    model = SamVisionModel(SamVisionConfig(**{**settings, "image_size": encoder.config.image_size})).eval()
    weights = encoder.tower.state_dict()
    for key, value in model.state_dict().items():
        if value.shape != weights[key].shape and key.endswith("pos_embed"):
            resized = torch.nn.functional.interpolate(
                weights[key].permute(0, 3, 1, 2), value.shape[1:3], mode="bicubic", align_corners=False
            )
            weights[key] = resized.permute(0, 2, 3, 1)
        elif value.shape != weights[key].shape:
            weights[key] = torch.nn.functional.interpolate(weights[key].T[None], len(value), mode="linear")[0].T
    model.load_state_dict(weights)
    if encoder.config.tower.get("neck") == "short":
        model.vision_encoder.neck.conv2 = model.vision_encoder.neck.layer_norm2 = torch.nn.Identity()
    return model
