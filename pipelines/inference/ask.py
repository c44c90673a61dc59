"""One question about some images, asked of a model on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from meteor_model.answering import Answerer, Budget, Question
from meteor_model.images import ImageError
from meteor_model.loading import load_model_and_processor
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.registry.folder import tokens_by_stage
from pipelines.registry.open import apply_pruner, open_model
from pipelines.registry.versions import pin_model


@dataclass(frozen=True)
class Reply:
    """An answer, and how many visual tokens each stage kept for it.

    Attributes:
        text: the answer.
        visual_tokens: by stage, for people; empty without images.
    """

    text: str
    visual_tokens: dict[str, str]


def ask(
    model: str,
    prompt: str,
    files: Sequence[Path],
    max_new_tokens: int,
    device: str,
    uri: str,
    pruner: tuple[str, int, Mapping[str, float]] = ("", 0, {}),
) -> Reply:
    """Open a model, ask it, and count.

    Args:
        model: as for `pipelines.registry.open.open_model`.
        prompt: the question.
        files: of the images that it is about.
        max_new_tokens: longest answer.
        device: where the model runs.
        uri: of the tracking server, for a registered model.
        pruner: name, tokens kept and numbers of another pruner than the model's own.

    Raises:
        ValueError: a pruner that the model does not allow, a file that is no image, or a model that cannot be opened.
    """
    with open_model(pin_model(model, uri)) as folder:
        loaded, processor = load_model_and_processor(folder)
    apply_pruner(loaded, processor, *pruner)
    images = load_images(files, processor)
    question = Question.of(prompt, processor, images)
    (answer,) = Answerer(loaded.to(device), processor).answer([question], Budget(max_new_tokens))
    if not images:
        return Reply(answer.text, {})
    counts = tokens_by_stage(loaded.config)
    entering = len(images) * loaded.config.tokens_per_image
    counts["visual_tokens.decode"] = f"{entering} > {answer.visual_tokens} ({len(images)} image(s))"
    return Reply(answer.text, counts)


def load_images(files: Sequence[Path], processor: MeteorProcessor) -> list[torch.Tensor]:
    """The images as (3, S, S) uint8. Raises ValueError that names the file."""
    images = []
    for file in files:
        try:
            images.append(processor.load_image(file.read_bytes()))
        except OSError as error:
            raise ValueError(f"image {file} cannot be read: {error.strerror}") from None
        except ImageError as error:
            raise ValueError(f"image {file} cannot be used: {error}") from None
    return images
