"""The plain vision transformer (transformers' ViT): CLS token, learned positions, a final norm on every token."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from transformers import ViTConfig, ViTModel
from typing_extensions import override

from meteor_model.encoders.base import ScoreProjections
from meteor_model.encoders.transformers_vit import TransformersVit


class VitEncoder(TransformersVit):
    """`transformers.ViTModel` without its pooler."""

    config_class, model = ViTConfig, staticmethod(partial(ViTModel, add_pooling_layer=False))
    num_prefix_tokens = 1

    @property
    @override
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.layers

    @override
    def finish(self, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        return self.tower.layernorm(hidden_MTD)

    @override
    def score_projections(self, index: int) -> ScoreProjections:
        block = self.tower.layers[index]
        attention = block.attention
        return ScoreProjections(
            block.layernorm_before, attention.q_proj, attention.k_proj, attention.num_attention_heads, attention.scaling
        )
