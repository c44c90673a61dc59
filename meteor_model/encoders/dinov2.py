"""DINOv2 (transformers), with and without register tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from typing_extensions import override

from meteor_model.encoders.base import EncoderConfig, ScoreProjections
from meteor_model.encoders.pixels import IMAGENET_MEAN, IMAGENET_STD
from meteor_model.encoders.transformers_vit import TransformersVit


class Dinov2Encoder(TransformersVit):
    """`transformers.Dinov2Model`."""

    config_class, model = Dinov2Config, Dinov2Model
    num_prefix_tokens = 1
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    idle = ("embeddings.mask_token",)

    @property
    @override
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.encoder.layer

    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        """The library interpolates positions wherever the size is not the tower's own."""
        return self.tower.embeddings(pixels_MCRR)

    @override
    def run_block(self, index: int, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.blocks[index](hidden_MTD)
        return output

    @override
    def finish(self, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        return self.tower.layernorm(hidden_MTD)

    @override
    def score_projections(self, index: int) -> ScoreProjections:
        block, settings = self.tower.encoder.layer[index], self.tower.config
        layers = dict(block.attention.named_modules())  # transformers 5.17 nests and names them otherwise
        prefix, query, key = ("", "q_proj", "k_proj") if "q_proj" in layers else ("attention.", "query", "key")
        heads = settings.num_attention_heads
        scaling = (settings.hidden_size // heads) ** -0.5
        return ScoreProjections(block.norm1, layers[prefix + query], layers[prefix + key], heads, scaling)


class Dinov2RegistersEncoder(Dinov2Encoder):
    """`transformers.Dinov2WithRegistersModel`: CLS, then the registers, then the patches."""

    config_class, model = Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.num_prefix_tokens = 1 + self.tower.config.num_register_tokens
