"""Named architectures: the towers and the LLM of a model, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from meteor_model.checks import nearest
from meteor_model.configuration_meteor import MeteorConfig, PruningConfig
from meteor_model.encoders import EncoderConfig

LLM_PART = "llm"


@dataclass(frozen=True)
class Architecture:
    """What a model is made of.

    Attributes:
        encoders: the towers, in fusion order.
        text_config: arguments of the LLM's configuration class, with its `model_type`; where pretrained weights come
            with a vocabulary, `vocab_size` is its published size, which the loaded weights have the last word on.
        image_size: side of the square image that travels.
        fusion: how encoders are joined, see `MeteorConfig`.
        concat_grid: common grid of fusion="channel_concat".
        weights: where pretrained parts come from, by encoder name or "llm": a hub id, a local folder or a safetensors
            file (meteor_model/weights/). Parts that are not named start from random weights.
    """

    encoders: tuple[EncoderConfig, ...]
    text_config: dict[str, Any]
    image_size: int
    fusion: str = "post_projection"
    concat_grid: int = 32
    weights: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = {item.name for item in self.encoders} | {LLM_PART}
        if unknown := sorted(set(self.weights) - parts):
            raise ValueError(
                f"weights name the parts {unknown}, which are not in the model; its parts: {sorted(parts)}"
            )


def tiny() -> Architecture:
    """Random weights, about two million parameters: CLIP, Pix2Struct and ConvNeXt towers at 64 px, a 4-layer Llama."""
    clip = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    pix2struct = {"hidden_size": 64, "d_ff": 160, "d_kv": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    convnext = {"hidden_sizes": [32, 64], "depths": [1, 1], "num_stages": 2, "patch_size": 4}
    return Architecture(
        encoders=(
            EncoderConfig("clip", "clip", 64, {**clip, "image_size": 64, "patch_size": 8}),
            EncoderConfig(
                "pix2struct",
                "pix2struct",
                64,
                {**pix2struct, "patch_embed_hidden_size": 192, "seq_len": 64, "initializer_range": 0.02},
            ),
            EncoderConfig("convnext", "convnext", 64, {**convnext, "layer_scale_init_value": 1.0}),
        ),
        text_config={
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": False,
        },
        image_size=64,
    )


#: CLIP ViT-L/14 at 336 px: 24 x 24 tokens, width 1024.
CLIP_L_336 = EncoderConfig(
    "clip",
    "clip",
    336,
    {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
)
#: CLIP's ConvNeXt-XXL at 1024 px: 32 x 32 tokens, width 3072.
CONVNEXT_XXL_1024 = EncoderConfig("convnext", "timm_conv", 1024, {"model_name": "convnext_xxlarge"})
#: EVA-02-L as a detector's backbone at 1024 px: 64 x 64 tokens, width 1024, every third block global.
EVA02_L_DET_1024 = EncoderConfig(
    "eva02",
    "eva02_det",
    1024,
    {
        "img_size": 224,
        "patch_size": 16,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "mlp_ratio": 4 * 2 / 3,
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "ref_feat_shape": (16, 16),
        "window_size": 16,
        "global_blocks": list(range(2, 24, 3)),
    },
)
#: Pix2Struct-L's encoder on a fixed grid of 45 x 45 patches, width 1536.
PIX2STRUCT_L = EncoderConfig(
    "pix2struct",
    "pix2struct",
    720,
    {
        "hidden_size": 1536,
        "d_ff": 3968,
        "d_kv": 64,
        "num_hidden_layers": 18,
        "num_attention_heads": 24,
        "patch_embed_hidden_size": 768,
        "seq_len": 4096,
    },
)
#: SAM-L at 1024 px with EAGLE's short neck: 64 x 64 tokens, width 256, folded to 32 x 32 of width 1024.
SAM_L_1024 = EncoderConfig(
    "sam",
    "sam",
    1024,
    {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "mlp_dim": 4096,
        "global_attn_indexes": [5, 11, 17, 23],
        "neck": "short",
    },
    fold=2,
)
VICUNA_7B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
HUB_WEIGHTS = {
    "clip": "openai/clip-vit-large-patch14-336",
    "convnext": "timm/convnext_xxlarge.clip_laion2b_soup",
    "eva02": "Yuxin-CV/EVA-02:eva02/det/eva02_L_coco_det_sys_o365.pth",
    "pix2struct": "google/pix2struct-large",
    "sam": "facebook/sam-vit-large",
    LLM_PART: "lmsys/vicuna-7b-v1.5",
}


def as_eagle(item: EncoderConfig) -> EncoderConfig:
    """The tower as EAGLE runs it: its pixels are EAGLE's, and CLIP's blocks run without the CLS token."""
    tower = {**item.tower, "cls_token": "dropped"} if item.family == "clip" else item.tower
    return replace(item, tower=tower, pixels="eagle")


def _published(encoders: tuple[EncoderConfig, ...], fusion: str) -> Architecture:
    """Towers of EAGLE around Vicuna-7B."""
    parts = [*(item.name for item in encoders), LLM_PART]
    return Architecture(
        encoders=encoders,
        text_config=VICUNA_7B,
        image_size=1024,
        fusion=fusion,
        concat_grid=32,
        weights={part: HUB_WEIGHTS[part] for part in parts},
    )


def eagle_x4_7b() -> Architecture:
    """EAGLE-X4, the dense baseline: four towers joined on the channels, Vicuna-7B (github.com/NVlabs/EAGLE).

    From the square image on: how an image becomes one is this project's (meteor_model/images.py).
    """
    towers = (CLIP_L_336, CONVNEXT_XXL_1024, EVA02_L_DET_1024, PIX2STRUCT_L)
    return _published(tuple(map(as_eagle, towers)), "channel_concat")


def eagle_x5_7b() -> Architecture:
    """EAGLE-X5: EAGLE-X4 and SAM-L."""
    towers = (CLIP_L_336, CONVNEXT_XXL_1024, SAM_L_1024, EVA02_L_DET_1024, PIX2STRUCT_L)
    return _published(tuple(map(as_eagle, towers)), "channel_concat")


def meteor_x4_7b() -> Architecture:
    """The towers of EAGLE-X4 with one projector each, so that all three stages apply; pixels and CLS as trained."""
    return _published((CLIP_L_336, CONVNEXT_XXL_1024, EVA02_L_DET_1024, PIX2STRUCT_L), "post_projection")


def meteor_x4_1b() -> Architecture:
    """The layout of `meteor_x4_7b` at about a seventh of its parameters, with random weights: for rehearsals.

    The same four tower families, narrower and at 512 px (256, 256, 1,024 and 576 tokens), around a Llama of 0.7 B.
    """
    towers = (
        replace(
            CLIP_L_336,
            image_size=224,
            tower={
                **CLIP_L_336.tower,
                "hidden_size": 768,
                "intermediate_size": 3072,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "image_size": 224,
            },
        ),
        replace(CONVNEXT_XXL_1024, image_size=512, tower={"model_name": "convnext_base"}),
        replace(
            EVA02_L_DET_1024,
            image_size=512,
            tower={
                **EVA02_L_DET_1024.tower,
                "embed_dim": 768,
                "depth": 12,
                "num_heads": 12,
                "global_blocks": list(range(2, 12, 3)),
            },
        ),
        replace(
            PIX2STRUCT_L,
            image_size=384,
            tower={
                **PIX2STRUCT_L.tower,
                "hidden_size": 768,
                "d_ff": 2048,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
            },
        ),
    )
    llama = {
        **VICUNA_7B,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 25,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    }
    return Architecture(encoders=towers, text_config=llama, image_size=512)


def small() -> Architecture:
    """Real pretrained parts that packages hold or that are trained on the spot (pipelines/parts), 160 M parameters.

    DINOv2 ViT-S/14 (its first ten blocks), EfficientNet-Lite0, a text-reading ViT, and SmolLM2-135M-Instruct: 256, 100
    and 441 tokens. Other sources of the same shapes, hub ids for instance, are a setting.
    """
    dinov2 = {
        "hidden_size": 384,
        "num_hidden_layers": 10,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
    }
    reader = {"hidden_size": 192, "d_ff": 512, "d_kv": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
    return Architecture(
        encoders=(
            EncoderConfig("dinov2", "dinov2", 224, dinov2),
            EncoderConfig("efficientnet", "timm_conv", 320, {"model_name": "tf_efficientnet_lite0"}),
            EncoderConfig(
                "reader",
                "pix2struct",
                336,
                {**reader, "patch_embed_hidden_size": 768, "seq_len": 33, "initializer_range": 0.02},
            ),
        ),
        text_config={
            "model_type": "llama",
            "vocab_size": 49_152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100_000.0,
            "tie_word_embeddings": True,
        },
        image_size=336,
        weights={
            "dinov2": "parts:dinov2-small",
            "efficientnet": "parts:efficientnet-lite0",
            "reader": "parts:reader-small",
            LLM_PART: "parts:smollm2-135m-instruct",
        },
    )


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "eagle_x4_7b": eagle_x4_7b,
    "eagle_x5_7b": eagle_x5_7b,
    "meteor_x4_1b": meteor_x4_1b,
    "meteor_x4_7b": meteor_x4_7b,
    "small": small,
    "tiny": tiny,
}


def architecture(name: str) -> Architecture:
    """An architecture by name. Raises ValueError that names the nearest one."""
    if name not in ARCHITECTURES:
        raise ValueError(
            f"unknown architecture {name!r}; known: {', '.join(sorted(ARCHITECTURES))}{nearest(name, ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]()


def build_config(
    name: str, pruning: PruningConfig, vocab_size: int, special_ids: dict[str, Any], image_token_id: int
) -> MeteorConfig:
    """MeteorConfig of a named architecture for a tokenizer.

    Args:
        name: key of `ARCHITECTURES`.
        pruning: the three stages.
        vocab_size: rows of the embedding.
        special_ids: `pad_token_id`, `bos_token_id`, `eos_token_id`.
        image_token_id: id of the image placeholder.
    """
    parts = architecture(name)
    return MeteorConfig(
        encoders=parts.encoders,
        text_config={**parts.text_config, "vocab_size": vocab_size, **special_ids},
        pruning=pruning,
        image_size=parts.image_size,
        image_token_id=image_token_id,
        fusion=parts.fusion,
        concat_grid=parts.concat_grid,
        **special_ids,
    )
