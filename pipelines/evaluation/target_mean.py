"""Stage 3's lambda for a target mean per image: the attention mass that prompts give, and what solves for it.

`pruning.decode.target_mean` is a number of visual tokens per image. `pruners.counts.solve_lambda` counts prompts;
where they hold several images, its target is the one per image times the images of a prompt on average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.pruners.counts import solve_lambda
from pipelines.evaluation.embedded import Embed, embed_questions
from pipelines.evaluation.questions import BATCH, Question


def solve_lambda_per_image(
    mass_B: torch.Tensor, num_visual_B: torch.Tensor, images_B: torch.Tensor, target_per_image: float, k_min: int
) -> float:
    """Lambda for which these prompts keep so many visual tokens per image on average.

    Args:
        mass_B: attention mass on visual tokens, prompt by prompt.
        num_visual_B: visual tokens of each prompt.
        images_B: images of each prompt.
        target_per_image: wanted mean.
        k_min: fewest that a prompt keeps.

    Raises:
        ValueError: where the target cannot be reached.
    """
    with_images = int((images_B > 0).sum())
    images, tokens = int(images_B.sum()), int(num_visual_B.sum())
    wanted = target_per_image * images  # of all prompts together; all their tokens, where rounding alone is beyond
    wanted = float(tokens) if math.isclose(wanted, tokens, rel_tol=1e-9) else wanted
    try:
        return solve_lambda(mass_B, num_visual_B, wanted / max(1, with_images), k_min)
    except ValueError as error:
        if with_images == images:
            raise
        raise ValueError(
            f"{error}; the target is {target_per_image:g} per image, and {with_images} prompts hold {images} images"
        ) from None


def solve_lambda_on(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    questions: Sequence[Question],
    embed: Embed = embed_questions,
) -> float:
    """Lambda for which these prompts keep `pruning.decode.target_mean` visual tokens per image on average.

    Raises:
        ValueError: where the target cannot be reached.
    """
    decode = model.config.pruning.decode
    assert decode.target_mean is not None
    mass_B, num_visual_B = attention_masses(model, processor, questions, embed)
    images_B = torch.tensor([len(question.images) for question in questions])
    return solve_lambda_per_image(mass_B, num_visual_B, images_B, decode.target_mean, decode.k_min)


def solve_for_target(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    questions: Callable[[], Sequence[Question]],
    embed: Embed = embed_questions,
) -> None:
    """Give a model, in place, stage 3's lambda for its target mean per image on these prompts.

    One without a target, or whose budget needs no lambda, is left as it is, and the prompts are not asked for.

    Raises:
        ValueError: where the target cannot be reached.
    """
    decode = model.config.pruning.decode
    if decode.enabled and decode.needs_lambda and decode.target_mean is not None:
        lam = solve_lambda_on(model, processor, questions(), embed)
        model.config = with_lambda(model.config, lam, decode.target_mean)


def attention_masses(
    model: MeteorForConditionalGeneration,
    processor: MeteorProcessor,
    questions: Sequence[Question],
    embed: Embed = embed_questions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass on visual tokens (B,) and their number (B,) of each prompt."""
    masses, counts = [], []
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        mask_BT, embeds_BTC, is_image_BT, position_ids = embed(model, processor, part)
        masses.append(model.embedded_attention_mass(embeds_BTC, is_image_BT, mask_BT, position_ids))
        counts.append(is_image_BT.sum(dim=1))
    return torch.cat(masses), torch.cat(counts)


def with_lambda(config: MeteorConfig, lam: float, target_mean: float) -> MeteorConfig:
    """The configuration with stage 3's lambda and the target that it was solved for."""
    decode = replace(config.pruning.decode, lam=lam, target_mean=target_mean)
    return config.with_pruning(replace(config.pruning, decode=decode))
