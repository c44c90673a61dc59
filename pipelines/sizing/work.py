"""Floating-point operations of every phase, from those that `meteor_model.flops` counts on the modules themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.flops import META, count_flops, counted, meta_model
from pipelines.config.settings import Part
from pipelines.sizing.model_size import ModelSize


@dataclass(frozen=True)
class Work:
    """FLOPs of one sample: an image and a text.

    Attributes:
        forward: by part, stage 3 off, the head on the text, or on every token: as the model trains.
        answer: of a question with all three stages: encoded once, then read twice, for the likelihood of the expected
            answer and for the first token of the model's own (`pipelines.evaluation.evaluate`).
        step: of one more token.
        unpruned: of the towers on every token, as ranks are measured, and the projectors.
        text_tokens: of the sample.
    """

    forward: Mapping[Part, float]
    answer: float
    step: float
    unpruned: float
    text_tokens: int

    @property
    def evaluated(self) -> float:
        """Forward alone."""
        return sum(self.forward.values())

    def trained(self, size: ModelSize, checkpointing: bool) -> float:
        """Forward, backward to inputs, gradients of trained weights, and what is recomputed.

        A backward pass costs a forward pass for the gradients of the inputs and another for those of the weights
        (Kaplan et al., 2020, section 2.1: 2 N forward, 4 N backward).
        """
        total = 0.0
        for part, flops in self.forward.items():
            backward = size.gathers[part] > 1
            weights = part in size.trained and not (part == "llm" and size.adapters)
            total += (1 + backward * (1 + checkpointing) + weights) * flops
        return total


def count_work(config: MeteorConfig, text_tokens: int, *, whole_head: bool = True) -> Work:
    """FLOPs of one image and `text_tokens`; without `whole_head` training runs the head on these alone."""
    pruning, llm = config.pruning, config.text_config
    report = count_flops(config, text_tokens)
    tokens = text_tokens + config.tokens_per_image
    named = tokens if whole_head else text_tokens
    forward: dict[Part, float] = {
        "towers": report.encoding,
        "projector": report.projection + report.fusion,
        "llm": _llm_flops(config, tokens) + 2 * named * llm.hidden_size * llm.vocab_size,
    }
    dense = config.with_pruning(replace(pruning, encode=replace(pruning.encode, enabled=False)), None)
    side = config.image_size
    pixels = torch.empty(1, 3, side, side, dtype=torch.uint8, device=META)
    with torch.no_grad():
        _, unpruned = counted(meta_model(dense).encode_images, pixels)
    answer = report.encoding + report.projection + report.fusion + 2 * (report.llm + report.lm_head)
    return Work(forward, answer, report.step, unpruned, text_tokens)


def _llm_flops(config: MeteorConfig, tokens: int) -> int:
    """The LLM without its head on one sequence, as it trains."""
    llm = meta_model(config).language_model
    embeds_1TC = torch.empty(1, tokens, config.text_config.hidden_size, device=META)
    mask_1T = torch.ones(1, tokens, dtype=torch.long, device=META)
    with torch.no_grad():
        return counted(llm, inputs_embeds=embeds_1TC, attention_mask=mask_1T, use_cache=False)[1]
