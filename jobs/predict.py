"""Ask a registered model: `python jobs/predict.py --model models:/NAME@ALIAS --image FILE --prompt TEXT`.

Needs nothing but MLFLOW_TRACKING_URI: the model comes from the registry, every byte checked.
"""

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from meteor_model.chat import IMAGE_PLACEHOLDER
from meteor_model.images import ImageError
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.export import pull_model
from pipelines.model_folder import tokens_by_stage


@dataclass(frozen=True)
class Predict:
    """What is asked."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of an exported model."""
    prompt: str
    """The question. `<image>` in it says where each image stands; without it they stand in front."""
    image: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = field(default=())
    """An image file (JPEG, PNG, WebP, GIF); may be given several times, or not at all."""
    max_new_tokens: int = 32
    """Longest answer, in tokens."""


def load_images(files: tuple[Path, ...], processor: MeteorProcessor) -> list[torch.Tensor]:
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


def answer(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    prompt: str,
    images: list[torch.Tensor],
    max_new_tokens: int,
) -> tuple[str, int | None]:
    """The greedy answer, and the visual tokens that stage 3 kept (None where it is off)."""
    batch = processor(prompt, [images])
    cache = model.new_cache()
    output_ids = model.generate(
        **batch,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=processor.tokenizer.pad_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    decision = None if cache is None else cache.decision
    kept = None if decision is None else int(decision.kept_counts_B[0])
    return processor.decode(output_ids[0, batch["input_ids"].shape[1] :]), kept


def check(settings: Predict) -> None:
    """What can be wrong before anything is downloaded. Raises ValueError."""
    for file in settings.image:
        if not file.is_file():
            raise ValueError(f"image {file} does not exist")
    written = settings.prompt.count(IMAGE_PLACEHOLDER)
    if written not in (0, len(settings.image)):
        raise ValueError(
            f"the prompt has {written} {IMAGE_PLACEHOLDER} placeholders, {len(settings.image)} images are given"
        )
    if settings.max_new_tokens < 1:
        raise ValueError(f"max-new-tokens is {settings.max_new_tokens}; it must be at least 1")
    if settings.model.startswith("models:") and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise ValueError(
            "MLFLOW_TRACKING_URI is not set, so there is no registry to ask: set it to the address of the MLflow "
            "server (`make status` shows the local one)"
        )


def predict(settings: Predict) -> None:
    """Load, answer, and print answer and token counts."""
    check(settings)
    with tempfile.TemporaryDirectory(prefix="meteor-predict-") as scratch:
        folder = pull_model(settings.model, Path(scratch) / "model")
        processor = MeteorProcessor.from_pretrained(folder)
        images = load_images(settings.image, processor)
        model = MeteorForConditionalGeneration.from_pretrained(folder, use_safetensors=True).eval()
    text, kept = answer(model, processor, settings.prompt, images, settings.max_new_tokens)
    print(f"answer: {text}")
    if images:
        for stage, counts in tokens_by_stage(model.config).items():
            if stage != "visual_tokens.decode":
                print(f"{stage}: {counts}")
        entering = len(images) * model.config.tokens_per_image
        print(f"visual_tokens.decode: {entering} > {entering if kept is None else kept} ({len(images)} image(s))")


def main() -> int:
    """Command line; a fault of the input is one line on stderr and exit code 2."""
    settings = tyro.cli(Predict, description=__doc__)
    try:
        predict(settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
