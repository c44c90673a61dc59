"""Questions as the language model is given them: prompts with their visual tokens in place, by stages 1 and 2.

Legend: B questions, T prompt tokens, C LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.evaluation.questions import Question


class Embedded(NamedTuple):
    """A batch of left-padded prompts.

    Attributes:
        mask_BT: attention mask.
        embeds_BTC: embeddings, visual tokens in place.
        is_image_BT: bool, where these are.
        position_ids: (B, T), by what stages 1 and 2 kept where images keep the places of the dense model.
    """

    mask_BT: Tensor
    embeds_BTC: Tensor
    is_image_BT: Tensor
    position_ids: Tensor | None


Embed = Callable[[MeteorForConditionalGeneration, MeteorProcessor, Sequence[Question]], Embedded]
"""How a batch becomes one: `embed_questions`, or with maps that are kept (`pipelines.evaluation.tower_store`)."""


@torch.no_grad()
def embed_questions(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, questions: Sequence[Question]
) -> Embedded:
    """Decode the images and run towers and fusion."""
    inputs = processor.batch_prompts([q.prompt for q in questions], [q.images for q in questions]).to(model.device)
    mask_BT = inputs["attention_mask"]
    embeds_BTC, is_image_BT, stats = model.read_prompts(inputs["input_ids"], inputs["pixel_values"], None, mask_BT)
    return Embedded(mask_BT, embeds_BTC, is_image_BT, model.positions_of_prompts(is_image_BT, mask_BT, stats))
