"""Floating-point operations of every phase, from those that `meteor_model.flops` counts on the modules themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.flops import META, PassFlops, TrainingFlops, count_flops, count_training, counted, meta_model
from pipelines.checkpoint.lora import add_adapters
from pipelines.checkpoint.zero3 import checkpoint_activations, parameter_groups
from pipelines.config.settings import TrainingSettings


@dataclass(frozen=True)
class Work:
    """FLOPs of one sample: an image and a text.

    Attributes:
        trained: in a training step, stage 3 off; its forward pass alone is that of a held-out loss.
        answer: of a question with all three stages: encoded once, then read twice, for the likelihood of the expected
            answer and for the first token of the model's own (`pipelines.evaluation.evaluate`).
        step: of one more token.
        unpruned: of the towers on every token, as ranks are measured, and the projectors.
        text_tokens: of the sample.
    """

    trained: PassFlops
    answer: float
    step: float
    unpruned: float
    text_tokens: int


def count_work(config: MeteorConfig, training: TrainingSettings, text_tokens: int) -> Work:
    """FLOPs of one image and `text_tokens`, all of which are supervised."""
    pruning = config.pruning
    report = count_flops(config, text_tokens)
    whole = config.with_pruning(replace(pruning, decode=replace(pruning.decode, enabled=False)), None)
    trained = training_flops(whole, training).of(1, [text_tokens + config.tokens_per_image], text_tokens)
    dense = config.with_pruning(replace(pruning, encode=replace(pruning.encode, enabled=False)), None)
    side = config.image_size
    pixels = torch.empty(1, 3, side, side, dtype=torch.uint8, device=META)
    with torch.no_grad():
        _, unpruned = counted(meta_model(dense).encode_images, pixels)
    answer = report.encoding + report.projection + report.fusion + 2 * (report.llm + report.lm_head)
    return Work(trained, answer, report.step, unpruned, text_tokens)


def training_flops(config: MeteorConfig, training: TrainingSettings) -> TrainingFlops:
    """FLOPs of a training: what learns, adapters and what is recomputed are set as every worker sets them.

    Raises:
        SettingsError: for a part or an adapter's target that the model does not have.
        ValueError: where stage 3 prunes in training.
    """
    model = meta_model(config)
    if training.lora.rank is not None:
        with META:
            add_adapters(model, training.lora, training.seed)
    parameter_groups(model, training.optimizer, training.lora.rank is not None)
    if training.gradient_checkpointing:
        checkpoint_activations(model)
    return count_training(model, whole_head=training.loss_chunk is None)
