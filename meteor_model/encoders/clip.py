"""CLIP's vision transformer (transformers): CLS token, learned positions, a norm before the first block."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from typing_extensions import override

from meteor_model.encoders.base import OPENAI_MEAN, OPENAI_STD
from meteor_model.encoders.transformers_vit import TransformersVit


class ClipEncoder(TransformersVit):
    """`transformers.CLIPVisionModel`. The library's norm after the last block is for its pooled output only."""

    config_class, model = CLIPVisionConfig, CLIPVisionModel
    num_prefix_tokens = 1
    mean, std = OPENAI_MEAN, OPENAI_STD
    idle = ("post_layernorm",)

    @override
    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        return self.tower.pre_layrnorm(super().embed(pixels_MCRR))
