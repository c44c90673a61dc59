"""CLIP's vision transformer (transformers): CLS token, learned positions, a norm before the first block.

`tower` holds the arguments of `CLIPVisionConfig` and one more: `cls_token`, "kept" (the default) or "dropped": EAGLE
runs CLIP's blocks on the patches alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from typing_extensions import override

from meteor_model.encoders.base import EncoderConfig
from meteor_model.encoders.pixels import OPENAI_MEAN, OPENAI_STD
from meteor_model.encoders.transformers_vit import TransformersVit

CLS_TOKENS = ("kept", "dropped")


class ClipEncoder(TransformersVit):
    """`transformers.CLIPVisionModel`. The library's norm after the last block is for its pooled output only.

    Where CLS is dropped, tokens are scored by the attention they receive.
    """

    config_class, model = CLIPVisionConfig, CLIPVisionModel
    mean, std = OPENAI_MEAN, OPENAI_STD
    idle = ("post_layernorm",)

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.num_prefix_tokens = 1 if self._cls_token(config) == "kept" else 0

    @staticmethod
    def _cls_token(config: EncoderConfig) -> Any:
        return config.tower.get("cls_token", "kept")

    @classmethod
    @override
    def library_config(cls, config: EncoderConfig) -> Any:
        if cls._cls_token(config) not in CLS_TOKENS:
            raise ValueError(
                f"encoder {config.name!r}: cls_token must be one of {', '.join(CLS_TOKENS)}, got "
                f"{cls._cls_token(config)!r}"
            )
        tower = {key: value for key, value in config.tower.items() if key != "cls_token"}
        return super().library_config(replace(config, tower=tower))

    @override
    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        hidden_MTD = super().embed(pixels_MCRR)
        return self.tower.pre_layrnorm(hidden_MTD[:, 1 - self.num_prefix_tokens :])
