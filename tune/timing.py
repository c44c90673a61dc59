"""Milliseconds of one image on this machine: what FLOPs only promise."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import DynamicCache

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.evaluation.questions import Question

REPEATS = 3


@torch.no_grad()
def ms_per_image(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, questions: Sequence[Question], batch: int
) -> float:
    """Vision, projection, fusion and prefill of one batch, the shortest of REPEATS times, over its images.

    The first run warms up. Decoding the images is no part. What else runs on the machine is part of it.
    """
    asked = [question.encoded_by(processor) for question in questions[:batch]]
    inputs = processor.batch_prompts([q.prompt for q in asked], [q.images for q in asked]).to(model.device)
    shortest, mask_BT = float("inf"), inputs["attention_mask"]
    for run in range(REPEATS + 1):
        _wait(model.device)
        begun = time.perf_counter()
        embeds_BTC, is_image_BT = model.embed_prompts(inputs["input_ids"], inputs["pixel_values"], None, mask_BT)
        model(
            inputs_embeds=embeds_BTC,
            attention_mask=mask_BT,
            image_mask=is_image_BT,
            past_key_values=model.new_cache() or DynamicCache(config=model.config.text_config),
            use_cache=True,
            logits_to_keep=1,
        )
        _wait(model.device)
        shortest = min(shortest, time.perf_counter() - begun) if run else shortest
    return 1e3 * shortest / sum(len(question.images) for question in asked)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
