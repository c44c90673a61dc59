"""Stage 3's lambda for a target mean: the attention mass that prompts give, and what solves for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.pruners.counts import solve_lambda
from pipelines.evaluation.questions import BATCH, Question


def solve_lambda_on(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, questions: Sequence[Question]
) -> float:
    """Lambda for which these prompts keep `pruning.decode.target_mean` visual tokens on average.

    Raises:
        ValueError: where the target cannot be reached.
    """
    decode = model.config.pruning.decode
    assert decode.target_mean is not None
    mass_B, num_visual_B = attention_masses(model, processor, questions)
    return solve_lambda(mass_B, num_visual_B, decode.target_mean, decode.k_min)


def solve_for_target(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, questions: Callable[[], Sequence[Question]]
) -> None:
    """Give a model, in place, stage 3's lambda for its target mean on these prompts.

    One without a target, or whose budget needs no lambda, is left as it is, and the prompts are not asked for.

    Raises:
        ValueError: where the target cannot be reached.
    """
    decode = model.config.pruning.decode
    if decode.enabled and decode.needs_lambda and decode.target_mean is not None:
        lam = solve_lambda_on(model, processor, questions())
        model.config = with_lambda(model.config, lam, decode.target_mean)


def attention_masses(
    model: MeteorForConditionalGeneration, processor: MeteorProcessor, questions: Sequence[Question]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention mass on visual tokens (B,) and their number (B,) of each prompt."""
    masses, counts = [], []
    for start in range(0, len(questions), BATCH):
        part = questions[start : start + BATCH]
        inputs = processor.batch_prompts([q.prompt for q in part], [q.images for q in part]).to(model.device)
        mass_B, num_visual_B = model.visual_attention_mass(**inputs)
        masses.append(mass_B)
        counts.append(num_visual_B)
    return torch.cat(masses), torch.cat(counts)


def with_lambda(config: MeteorConfig, lam: float, target_mean: float) -> MeteorConfig:
    """The configuration with stage 3's lambda and the target that it was solved for."""
    decode = replace(config.pruning.decode, lam=lam, target_mean=target_mean)
    return config.with_pruning(replace(config.pruning, decode=decode))
