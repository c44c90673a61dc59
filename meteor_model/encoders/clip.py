"""CLIP's vision transformer (transformers): CLS token, learned positions, pre-norm blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from meteor_model.encoders.base import (
    OPENAI_MEAN,
    OPENAI_STD,
    EncoderConfig,
    ScoreProjections,
    VisionEncoder,
    square_grid,
)


class ClipEncoder(VisionEncoder):
    """`transformers.CLIPVisionModel`, block by block."""

    num_prefix_tokens = 1
    mean, std = OPENAI_MEAN, OPENAI_STD

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.tower = CLIPVisionModel(CLIPVisionConfig(**config.tower))

    @classmethod
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        return square_grid(config, CLIPVisionConfig(**config.tower).patch_size)

    @classmethod
    def num_blocks(cls, config: EncoderConfig) -> int:
        return CLIPVisionConfig(**config.tower).num_hidden_layers

    @property
    def embed_dim(self) -> int:
        return self.tower.config.hidden_size

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.encoder.layers

    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        native = self.tower.config.image_size
        hidden = self.tower.embeddings(pixels_MCRR, interpolate_pos_encoding=self.config.image_size != native)
        return self.tower.pre_layrnorm(hidden)

    def score_projections(self, index: int) -> ScoreProjections:
        block = self.tower.encoder.layers[index]
        attention = block.self_attn
        return ScoreProjections(
            block.layer_norm1, attention.q_proj, attention.k_proj, attention.num_heads, attention.scale
        )
