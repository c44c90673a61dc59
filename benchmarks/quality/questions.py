"""Which questions of an image are learned in a step, which are asked in the end, and how they come to the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from meteor_model.packing import collate_packed, share_beginning
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.turn_encoder import Encoded
from pipelines.data.sources.scenes import Question

OCR = "ocr"
LEFT_OUT = ("any_category", "any_name")
"""Kinds that the dense model answers by chance (yes or no, 53 and 55 % on the validation split): nothing that a pruner
does shows on them, so they are not asked in the end. Decided on the validation split."""


def images_of_step(step: int, images: int, total: int, seed: int) -> list[int]:
    """The images of a step: every epoch is a shuffled pass, a function of the seed alone.

    Args:
        step: from 0.
        images: of a step.
        total: that there are.
        seed: of the order.
    """
    chosen = []
    for place in range(step * images, (step + 1) * images):
        epoch, index = divmod(place, total)
        chosen.append(int(_order(seed, epoch, total)[index]))
    return chosen


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(total)


def learned_of(questions: Sequence[Question], most: int, rng: np.random.Generator) -> list[Question]:
    """The questions of an image that a step learns: all of reading, then others at random, at most `most`."""
    reading = [question for question in questions if question.group == OCR and not question.learning]
    others = [question for question in questions if question.group != OCR or question.learning]
    picked = [others[index] for index in rng.permutation(len(others))[: max(0, most - len(reading))]]
    return reading[:most] + picked


@dataclass(frozen=True)
class Asked:
    """A question of the final part.

    Attributes:
        image: its number.
        question: of it.
    """

    image: int
    question: Question


def final_questions(questions: Sequence[Sequence[Question]], per_group: int, seed: int = 0) -> list[Asked]:
    """The same number of questions of every group, and within a group of every kind as far as there are enough.

    Kinds of LEFT_OUT are not asked.

    Args:
        questions: of every image.
        per_group: most of a group; where a group has fewer, all groups get as few.
        seed: of the draw.
    """
    by_kind: dict[str, dict[str, list[Asked]]] = {}
    for image, own in enumerate(questions):
        for question in own:
            if not question.learning and question.kind not in LEFT_OUT:
                by_kind.setdefault(question.group, {}).setdefault(question.kind, []).append(Asked(image, question))
    rng = np.random.default_rng(seed)
    count = min(per_group, *(sum(map(len, kinds.values())) for kinds in by_kind.values()))
    return [item for group in sorted(by_kind) for item in _evenly(by_kind[group], count, rng)]


def _evenly(kinds: dict[str, list[Asked]], count: int, rng: np.random.Generator) -> list[Asked]:
    """`count` items, as equally many of each kind as there are; kinds with few give all they have."""
    left, taken = count, []
    for place, kind in enumerate(sorted(kinds, key=lambda kind: (len(kinds[kind]), kind))):
        share = min(len(kinds[kind]), left // (len(kinds) - place))
        taken += [kinds[kind][index] for index in rng.permutation(len(kinds[kind]))[:share]]
        left -= share
    return sorted(taken, key=lambda item: item.image)


class Encoder:
    """Questions as the project's processor encodes them; those of an image in one packed row.

    Args:
        processor: of the model.
    """

    def __init__(self, processor: MeteorProcessor) -> None:
        self.processor = processor
        self._encoded = lru_cache(maxsize=20_000)(self._encode)

    def _encode(self, prompt: str, answer: str) -> Encoded:
        return self.processor.encode([("user", f"<image>\n{prompt}"), ("assistant", answer)], 1)

    def packed(self, rows: Sequence[Sequence[Question]]) -> dict[str, torch.Tensor]:
        """One row an image: the image once, every question a branch. Ids, labels, documents and branches (B, T)."""
        none = torch.empty(0, 3, self.processor.image_size, self.processor.image_size, dtype=torch.uint8)
        documents = [share_beginning([self._example(question, none) for question in row]) for row in rows]
        batch = collate_packed([[document] for document in documents], self.processor.tokenizer.pad_token_id, 1)
        del batch["pixel_values"]
        return batch

    def _example(self, question: Question, images: torch.Tensor) -> dict[str, Any]:
        encoded = self._encoded(question.prompt, question.answer)
        return {"input_ids": encoded.input_ids, "labels": encoded.labels, "images": images}

    def prompt(self, question: Question) -> Encoded:
        """The question alone, ready to be answered."""
        return self.processor.encode_question(question.prompt, 1)
