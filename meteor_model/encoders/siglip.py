"""SigLIP's vision transformer (transformers): no CLS token, learned positions, a final norm on every token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from meteor_model.encoders.base import EncoderConfig, ScoreProjections, VisionEncoder, square_grid


class SiglipEncoder(VisionEncoder):
    """`transformers.SiglipVisionModel` without its pooling head, block by block."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.tower = SiglipVisionModel(SiglipVisionConfig(**{"vision_use_head": False, **config.tower}))

    @classmethod
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        return square_grid(config, SiglipVisionConfig(**config.tower).patch_size)

    @classmethod
    def num_blocks(cls, config: EncoderConfig) -> int:
        return SiglipVisionConfig(**config.tower).num_hidden_layers

    @property
    def embed_dim(self) -> int:
        return self.tower.config.hidden_size

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.encoder.layers

    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        native = self.tower.config.image_size
        return self.tower.embeddings(pixels_MCRR, interpolate_pos_encoding=self.config.image_size != native)

    def finish(self, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        return self.tower.post_layernorm(hidden_MTD)

    def score_projections(self, index: int) -> ScoreProjections:
        block = self.tower.encoder.layers[index]
        attention = block.self_attn
        return ScoreProjections(
            block.layer_norm1, attention.q_proj, attention.k_proj, attention.num_heads, attention.scale
        )
