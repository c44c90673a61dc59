"""One image and two questions, a coarse one and one that reads: what the models keep of it and what they answer.

The image is of the validation split: it spends nothing of the final one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from benchmarks.quality.models import Trained
from benchmarks.quality.questions import OCR
from benchmarks.quality.stored_scenes import Scenes
from meteor_model.pruners.named import with_pruner
from meteor_model.visualize.compare import Under, draw_pruners, look_with
from meteor_model.visualize.panels import BACKGROUND
from pipelines.data.sources.scenes import Question

UNTRAINED: tuple[tuple[str, int, dict[str, int]], ...] = (
    ("none", 144, {}),
    ("random", 34, {}),
    ("fastv", 34, {"layer": 2}),
    ("sparsevlm", 34, {}),
)
"""Of the dense model: pruner, tokens and settings."""
COARSE, COLUMNS = "category", 5


def two_questions(questions: Sequence[Question]) -> tuple[Question, Question] | None:
    """A coarse question of an image and one that reads it; None where it has not both."""
    coarse = next((item for item in questions if item.kind == COARSE), None)
    reads = next((item for item in questions if item.group == OCR and not item.learning), None)
    return None if coarse is None or reads is None else (coarse, reads)


def draw_sheet(models: Sequence[Trained], scenes: Scenes, path: Path) -> None:
    """Write the sheet.

    Args:
        models: the dense one, then those trained from it.
        scenes: of which the first with both questions is shown.
        path: of a PNG.
    """
    image, questions = next(
        (index, found) for index, own in enumerate(scenes.questions) if (found := two_questions(own)) is not None
    )
    pixels = scenes.pixels([image])[0]
    sheets = []
    for question in questions:
        sections = {
            "The dense model": [_untrained(models[0], pixels, question, *row) for row in UNTRAINED],
            "Trained on with their pruning on": [_trained(model, pixels, question) for model in models[1:]],
        }
        note = f"the answer is “{question.answer}”; in quotes what the model says"
        sheets.append(draw_pruners(pixels, question.prompt, note, sections, COLUMNS))
    whole = Image.new("RGB", (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), BACKGROUND)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    whole.save(path)


def _trained(trained: Trained, pixels: torch.Tensor, question: Question) -> Under:
    name, config = trained.card["pruner"], trained.model.config
    return look_with(trained.model, trained.processor, pixels, question.prompt, config, name)


def _untrained(
    dense: Trained, pixels: torch.Tensor, question: Question, pruner: str, keep: int, settings: dict[str, int]
) -> Under:
    config = with_pruner(dense.model.config, pruner, keep, **settings)
    return look_with(dense.model, dense.processor, pixels, question.prompt, config, pruner)
