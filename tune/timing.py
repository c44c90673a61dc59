"""Milliseconds of one image on this machine: what FLOPs only promise.

A setting is timed side by side with the model's own settings, in turns, and the median of the turns' ratios counts:
what else the machine does in a turn slows both. The ratio times the milliseconds of the model's own settings, which are
measured once a sweep, is the setting's place in one table for all of its trials.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.evaluation.questions import Question
from pipelines.io import storage

TURNS = 7


def ms_per_image(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    reference: tuple[MeteorForConditionalGeneration, MeteorConfig],
    questions: Sequence[Question],
    table: str,
) -> float:
    """Vision, projection, fusion and prefill of one batch over its images; decoding the images is no part.

    Args:
        model: under the setting.
        processor: the model's.
        reference: the model itself, or the one whose towers it has; and the configuration that it is compared with.
        questions: of one batch.
        table: address of the sweep's `latency.json`, which is written where it is not there yet.

    Raises:
        StorageError: where the table cannot be read or written.
    """
    other, own = reference
    config = model.config
    ratios, references = list[float](), list[float]()
    for turn in range(TURNS + 1):
        before = _seconds(other, own, processor, questions)
        mine = _seconds(model, config, processor, questions)
        if turn:  # the first one warms up
            ratios.append(mine / before)
            references.append(before)
    images = sum(len(question.images) for question in questions)
    return statistics.median(ratios) * _reference_ms(table, 1e3 * statistics.median(references) / images)


def _reference_ms(table: str, measured: float) -> float:
    """Milliseconds of the model's own settings as the sweep has them: the first that were measured."""
    try:
        found: float = storage.read_json(table)["reference_ms"]
    except storage.ObjectMissingError:
        storage.write_json(table, {"reference_ms": measured, "turns": TURNS})
        return measured
    return found


@torch.no_grad()
def _seconds(
    model: MeteorForConditionalGeneration,
    config: MeteorConfig,
    processor: MeteorProcessor,
    questions: Sequence[Question],
) -> float:
    """One pass under a configuration, which model and processor are left with."""
    model.follow(config)
    processor.tokens_per_image = config.tokens_per_image
    asked = [question.encoded_by(processor) for question in questions]
    inputs = processor.batch_prompts([q.prompt for q in asked], [q.images for q in asked]).to(model.device)
    _wait(model.device)
    begun = time.perf_counter()
    embeds_BTC, is_image_BT = model.embed_prompts(
        inputs["input_ids"], inputs["pixel_values"], attention_mask=inputs["attention_mask"]
    )
    model(
        inputs_embeds=embeds_BTC,
        attention_mask=inputs["attention_mask"],
        image_mask=is_image_BT,
        past_key_values=model.recording_cache(),
        use_cache=True,
        logits_to_keep=1,
    )
    _wait(model.device)
    return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
