"""A model on the meta device: shapes alone, no weights."""

from __future__ import annotations

import copy

import torch

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration

META = torch.device("meta")


def meta_model(config: MeteorConfig) -> MeteorForConditionalGeneration:
    """The model on the meta device, in eval mode.

    Its LLM attends eagerly: the choice of a fused kernel reads masks, which hold no data here. The products are the
    same.
    """
    config = copy.deepcopy(config)
    config.text_config._attn_implementation = "eager"
    with META:
        return MeteorForConditionalGeneration(config).eval()
