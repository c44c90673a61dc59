"""Named architectures: the towers and the LLM of a model, before any weight is loaded."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from meteor_model.configuration_meteor import MeteorConfig, PruningConfig
from meteor_model.encoders import EncoderConfig

LLM_PART = "llm"


@dataclass(frozen=True)
class Architecture:
    """What a model is made of.

    Attributes:
        encoders: the towers, in fusion order.
        text_config: arguments of the LLM's configuration class, with its `model_type`.
        image_size: side of the square image that travels.
        fusion: how encoders are joined, see `MeteorConfig`.
        concat_grid: common grid of fusion="channel_concat".
        weights: where pretrained parts come from, by encoder name or "llm": a hub id, a local folder or a safetensors
            file (meteor_model/weights.py). Parts that are not named start from random weights.
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


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {"tiny": tiny}


def architecture(name: str) -> Architecture:
    """An architecture by name. Raises ValueError that names the nearest one."""
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown architecture {name!r}; known: {', '.join(sorted(ARCHITECTURES))}{hint}")
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
