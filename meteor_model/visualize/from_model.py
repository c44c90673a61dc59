"""One call from a model, an image and prompts to the pictures of what the model does with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from meteor_model.decoder.scores import visual_attention_by_head
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.pruners.spectra import RANK_ESTIMATORS
from meteor_model.pruners.text_scores import select_heads
from meteor_model.visualize.charts import draw_head_vav, draw_ranks, rank_report
from meteor_model.visualize.sheets import draw_kept, draw_overview

#: What `explain` can draw; each is a function of its own as well.
PARTS = ("kept", "ranks", "vav")


def explain(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    image: Any,
    prompts: Sequence[str],
    only: Sequence[str] = PARTS,
    rank_images: Sequence[Any] = (),
) -> dict[str, Image.Image]:
    """Everything there is to see of one image.

    Args:
        model: in eval mode.
        processor: the model's own.
        image: whatever the processor takes as one image.
        prompts: two different ones show what stage 3 makes of the question.
        only: some of `PARTS`.
        rank_images: more images for the chart of ranks, to show their spread.

    Returns:
        "overview", "encode", "fuse", "decode" (cells kept), "ranks", "vav" (attention on visual tokens by head).

    Raises:
        ValueError: for an image that cannot be read, prompts that are missing, blank or the same, an unknown part, or a
            model whose stage 3 is off.
    """
    unknown = [part for part in only if part not in PARTS]
    if unknown or not only:
        raise ValueError(f"cannot draw {', '.join(unknown) or 'nothing'}: choose from {', '.join(PARTS)}")
    if not prompts and set(only) != {"ranks"}:
        raise ValueError("stage 3 is drawn for a prompt: give at least one, better two different ones")
    pictures: dict[str, Image.Image] = {}
    if "kept" in only:
        pictures |= explain_kept(model, processor, image, prompts)
    if "ranks" in only:
        pictures["ranks"] = explain_ranks(model, processor, [image, *rank_images])
    if "vav" in only:
        pictures["vav"] = explain_vav(model, processor, image, prompts)
    return pictures


@torch.no_grad()
def explain_kept(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, image: Any, prompts: Sequence[str]
) -> dict[str, Image.Image]:
    """The cells kept by each stage: "overview", "encode", "fuse" and, with prompts, "decode".

    Arguments and errors as in `explain`; without prompts stages 1 and 2 are drawn.
    """
    _check_prompts(prompts)
    pixels_13SS = _pixels(processor, [image]).to(model.device)
    if prompts:
        _check_stage_3(model)
    _, stats = model.encode_images(pixels_13SS)
    kept = {}
    for prompt in prompts:
        inputs = processor(text=[prompt], images=[[pixels_13SS[0].cpu()]]).to(model.device)
        kept[prompt] = model.prune_prompts(**inputs).kept_visual()[0].tolist()
    overview = draw_overview(pixels_13SS[0], model.config, stats, decode_kept=kept)
    return {"overview": overview, **draw_kept(pixels_13SS[0], model.config, stats, decode_kept=kept)}


def explain_ranks(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, images: Sequence[Any]
) -> Image.Image:
    """The chart of ranks by boundary of these images, by every estimator; beside them what budgets were shared by.

    Errors as in `explain`.
    """
    pixels = _pixels(processor, images).to(model.device)
    report = rank_report(model.measure_ranks(pixels, tuple(RANK_ESTIMATORS)))
    return draw_ranks(report, model.config.ranks, model.config.pruning.encode.rank_estimator)


@torch.no_grad()
def explain_vav(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, image: Any, prompts: Sequence[str]
) -> Image.Image:
    """The chart of attention mass on visual tokens by layer and head, nothing pruned in the LLM.

    Arguments and errors as in `explain`.
    """
    if not prompts:
        raise ValueError("attention is that of a prompt: give at least one")
    _check_prompts(prompts)
    _check_stage_3(model)
    pixels_13SS = _pixels(processor, [image])
    settings, vav, chosen = model.config.pruning.decode, {}, {}
    for prompt in prompts:
        inputs = processor(text=[prompt], images=[[pixels_13SS[0]]]).to(model.device)
        embeds_1TC, is_image_1T = model.embed_prompts(inputs["input_ids"], inputs["pixel_values"])
        mass_1LH = visual_attention_by_head(
            model.language_model, embeds_1TC, inputs["attention_mask"], None, is_image_1T, settings.query
        )
        vav[prompt] = mass_1LH[0].cpu().numpy()
        chosen[prompt] = select_heads(mass_1LH[:, settings.layer - 1], model.config.decode_heads)[0].tolist()
    return draw_head_vav(vav, chosen, settings.layer)


def _check_prompts(prompts: Sequence[str]) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompt {index + 1} is empty")
        if prompt in prompts[:index]:
            raise ValueError(f"prompt {index + 1} is the same as an earlier one: {prompt!r}")


def _check_stage_3(model: MeteorForConditionalGeneration) -> None:
    if not model.config.pruning.decode.enabled:
        raise ValueError(
            "stage 3 of this model is off (pruning.decode.enabled is false): draw the ranks, or stages 1 and 2 without "
            "prompts"
        )


def _pixels(processor: MeteorProcessor, images: Sequence[Any]) -> torch.Tensor:
    """Images as they travel, (M, 3, S, S) uint8."""
    pixels = []
    for image in images:
        try:
            pixels.append(processor.load_image(image))
        except OSError as error:
            name = str(image)[:100] if isinstance(image, str | Path) else "given"
            raise ValueError(f"image {name} cannot be read: {error.strerror or error}") from None
        except ValueError as error:
            if not isinstance(image, str | Path):
                raise
            raise ValueError(f"image {str(image)[:100]} cannot be used: {error}") from None
    return torch.stack(pixels)
