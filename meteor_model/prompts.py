"""What a call of the processor is given: prompts, and the images of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch

from meteor_model.chat import IMAGE_PLACEHOLDER, Special, Turns, content_parts
from meteor_model.image_processing_meteor import ImageInput, flatten_images


class Prompt(str):
    """The text of a rendered conversation that still knows the conversation.

    `apply_chat_template(..., tokenize=False)` makes it, and a call of the processor turns it into the ids that the
    conversation has in training. A plain string is a user's question.
    """

    turns: Turns
    options: dict[str, bool]

    @classmethod
    def of(cls, text: str, turns: Turns, options: dict[str, bool]) -> Prompt:
        """The text with its conversation and how it ends (`encode`'s options)."""
        prompt = cls(text)
        prompt.turns, prompt.options = turns, options
        return prompt


def prompts_of(text: Any) -> list[str]:
    """The prompts of a call. Raises ValueError for what is no text."""
    prompts = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else [text]
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(
                f"prompt {index} must be a string, got {type(prompt).__name__}: a call is (text, images); messages go "
                "through apply_chat_template"
            )
    return prompts


def conversation_of(prompt: str) -> tuple[Turns | str, dict[str, bool]]:
    """A prompt's turns, or the question that it is; and how it ends."""
    if isinstance(prompt, Prompt):
        return prompt.turns, prompt.options
    return prompt, {"add_generation_prompt": True}


def deal(images: Any, prompts: Sequence[Turns | str], single: bool) -> list[list[ImageInput]]:
    """The images of each prompt.

    Raises:
        ValueError: where neither the entries nor the placeholders say which image goes where.
    """
    if images is None:
        return [[] for _ in prompts]
    entries = list(images) if _is_sequence(images) else [images]
    if single:
        return [flatten_images(entries)]
    counts = [_placeholders(prompt) for prompt in prompts]
    is_flat = not any(entry is None or _is_sequence(entry) for entry in entries)
    if is_flat and sum(counts) == len(entries):
        flat = iter(entries)
        return [[next(flat) for _ in range(count)] for count in counts]
    if len(entries) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts with {counts} {IMAGE_PLACEHOLDER} came with images for {len(entries)}: give one "
            "entry a prompt, or a flat list of as many as there are placeholders"
        )
    return [flatten_images(entry) for entry in entries]


def _placeholders(prompt: Turns | str) -> int:
    """Images that a prompt places itself."""
    if isinstance(prompt, str):
        return prompt.count(IMAGE_PLACEHOLDER)
    return sum(content_parts(content).count(Special.IMAGE) for _, content in prompt)


def _is_sequence(images: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it holds several images: a list, or a stack in one tensor or array."""
    return isinstance(images, list | tuple) or (isinstance(images, torch.Tensor | np.ndarray) and images.ndim == 4)
