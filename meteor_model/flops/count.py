"""FLOPs of a model: one image and one prompt to the first token."""

from __future__ import annotations

import torch

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.flops.counter import counted
from meteor_model.flops.language import count_layers, count_stage3, schedule_of
from meteor_model.flops.on_meta import META, meta_model
from meteor_model.flops.report import FlopReport
from meteor_model.flops.vision import count_vision

TEXT_TOKENS = 40


def count_flops(config: MeteorConfig, text_tokens: int = TEXT_TOKENS) -> FlopReport:
    """FLOPs of one image and a prompt of `text_tokens`, by stage and part.

    Args:
        config: any model.
        text_tokens: text tokens of the prompt.

    Stage 3 is counted at its `target_mean` and `later_keep`, with its scores. Where the answer asks
    (`query="answer"`), nothing is dropped up to the first token, and a step is one after the choice; what choosing anew
    runs again within an answer is in neither number.

    Raises:
        ValueError: where stage 3 is on without a target_mean.
    """
    schedule = schedule_of(config)
    model = meta_model(config)
    with torch.no_grad():
        encoders, joint_projector, fusion = count_vision(model)
        layers = count_layers(model, text_tokens, schedule)
        decode_selection = count_stage3(model, text_tokens, schedule)
        _, lm_head = counted(model.lm_head, torch.empty(1, 1, config.text_config.hidden_size, device=META))
    return FlopReport(encoders, joint_projector, fusion, text_tokens, layers, decode_selection, lm_head)
