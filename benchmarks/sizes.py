"""The models that the speed benchmarks run, all with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.harness import Setup
from meteor_model.architectures import Architecture, architecture
from meteor_model.encoders import EncoderConfig


def cpu_setup() -> Setup:
    """Two ViT-B towers of 1,024 tokens, a ConvNeXt-T of 576, a Llama of 0.17 B: 0.4 B in all.

    The towers and widths are real ones; the LLM is as wide as a 0.5 B model and as deep as two cores can bear. EAGLE's
    1,024 visual tokens, METEOR's 576 and 242.
    """
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    pix2struct = {"hidden_size": 768, "d_ff": 2048, "d_kv": 64, "num_hidden_layers": 12, "num_attention_heads": 12}
    return Setup(
        encoders=(
            EncoderConfig("clip", "clip", 512, {**clip, "image_size": 512, "patch_size": 16}),
            EncoderConfig(
                "pix2struct", "pix2struct", 512, {**pix2struct, "patch_embed_hidden_size": 768, "seq_len": 4096}
            ),
            EncoderConfig("convnext", "convnext", 768, {"hidden_sizes": [96, 192, 384, 768], "depths": [3, 3, 9, 3]}),
        ),
        text_config={
            "model_type": "llama",
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 12,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "vocab_size": 8000,
        },
        image_size=768,
        concat_grid=32,
        shares=(0.5, 0.3),
        leave=608,
        fused=576,
        kept=242,
    )


def tiny_setup() -> Setup:
    """The architecture `tiny`: for tests of the benchmarks' own code."""
    return from_architecture(
        architecture("tiny"), 8, 300, shares=(0.5, 0.3), leave=36, fused=24, kept=12, text_tokens=10, new_tokens=3
    )


def gpu_setup() -> Setup:
    """EAGLE-X4's towers at their real size and Vicuna-7B's layers; the published counts."""
    return from_architecture(
        architecture("meteor_x4_7b"), 32, 32001, shares=(0.39, 0.195), leave=1193, fused=576, kept=242
    )


def pool_setup() -> Setup:
    """Four towers of 256 tokens each, so 1,024 visual tokens in one pool, and a Llama 512 wide and 8 layers deep.

    All of them run at any image size, so that a smaller image can be had; `doubled` has 4,096 visual tokens.
    """
    tower = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
    vit = {**tower, "intermediate_size": 1536, "image_size": 256, "patch_size": 16}
    return Setup(
        encoders=(
            EncoderConfig("clip", "clip", 256, vit),
            EncoderConfig("siglip", "siglip", 256, vit),
            EncoderConfig("pix2struct", "pix2struct", 256, {**tower, "d_ff": 1024, "d_kv": 64, "seq_len": 4096}),
            EncoderConfig("convnext", "convnext", 512, {"hidden_sizes": [48, 96, 192, 384], "depths": [2, 2, 6, 2]}),
        ),
        text_config={
            "model_type": "llama",
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "vocab_size": 8000,
        },
        image_size=512,
        concat_grid=16,
        shares=(0.8, 0.4),
        leave=512,
        fused=384,
        kept=256,
    )


def from_architecture(parts: Architecture, concat_grid: int, vocabulary: int, **counts: Any) -> Setup:
    """A named architecture; both ways to join its encoders."""
    return Setup(
        encoders=tuple(replace(item, fold=1) for item in parts.encoders),
        text_config={**parts.text_config, "vocab_size": vocabulary},
        image_size=parts.image_size,
        concat_grid=concat_grid,
        **counts,
    )


def doubled(setup: Setup) -> Setup:
    """The same model on images of twice the side: four times the tokens everywhere."""

    def double(item: EncoderConfig) -> EncoderConfig:
        tower = dict(item.tower)
        if "image_size" in tower:
            tower["image_size"] *= 2
        return replace(item, image_size=item.image_size * 2, tower=tower)

    return replace(
        setup,
        encoders=tuple(double(item) for item in setup.encoders),
        image_size=setup.image_size * 2,
        concat_grid=setup.concat_grid * 2,
        leave=setup.leave * 4,
        fused=setup.fused * 4,
        kept=setup.kept * 4,
    )
