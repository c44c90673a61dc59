"""Lambda for a target mean, solved on held-back prompts and checked on others.

Solving meets the target on the prompts that it sees, to within rounding. What counts is the mean on prompts that it did
not see: samples of one split take turns, one to solve on and one to check.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meteor_model.loading import load_model_and_processor
from meteor_model.pruners.counts import adaptive_counts, solve_lambda
from pipelines.calibration.image_plan import CalibrationError
from pipelines.calibration.ranks import Ranks
from pipelines.calibration.statistics import RunningStatistics, half_width
from pipelines.data import shards
from pipelines.evaluation.questions import read_questions
from pipelines.evaluation.scores import counted
from pipelines.evaluation.target_mean import attention_masses
from pipelines.io.console import say
from pipelines.registry.variants import apply_pruning


@dataclass(frozen=True)
class LambdaReport:
    """Lambda and the means that it keeps.

    Attributes:
        lam: lambda.
        target_mean: visual tokens that it was solved for.
        solved_on: prompts that it was solved on.
        solved_mean: visual tokens kept on those.
        checked_on: other prompts of the same split.
        checked_mean: visual tokens kept on those.
        checked_std: over those prompts.
        low: lower end of the 95 % interval of `checked_mean`.
        high: upper end.
        holds: whether the target lies in that interval.
    """

    lam: float
    target_mean: float
    solved_on: int
    solved_mean: float
    checked_on: int
    checked_mean: float
    checked_std: float
    low: float
    high: float
    holds: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_lambda(mass_B: torch.Tensor, num_visual_B: torch.Tensor, target_mean: float, k_min: int) -> LambdaReport:
    """Solve on every other prompt (the first, third, ...), check on those between.

    Args:
        mass_B: attention mass on visual tokens, prompt by prompt.
        num_visual_B: visual tokens of each prompt.
        target_mean: wanted.
        k_min: fewest that a prompt keeps.

    Raises:
        CalibrationError: fewer than two prompts to check on.
        ValueError: a target that no lambda reaches.
    """
    if len(mass_B) < 4:
        raise CalibrationError(f"{len(mass_B)} prompts with images: lambda needs two to solve on and two to check on")
    lam = solve_lambda(mass_B[::2], num_visual_B[::2], target_mean, k_min)
    counts = adaptive_counts(mass_B, lam, num_visual_B, k_min).double().cpu().numpy()
    checked = RunningStatistics.of(counts[1::2, None])
    mean, std = float(checked.mean_K[0]), float(checked.std_K[0])
    width = half_width(std, checked.count)
    low, high = mean - width, mean + width
    solved = counts[::2]
    return LambdaReport(
        lam,
        target_mean,
        len(solved),
        float(np.mean(solved)),
        checked.count,
        mean,
        std,
        low,
        high,
        low <= target_mean <= high,
    )


def solve_on_split(
    folder: Path,
    manifest: shards.Manifest,
    split: str,
    prompts: int,
    target_mean: float,
    ranks: Ranks | None,
    device: str = "cpu",
) -> LambdaReport:
    """Lambda of a saved model under newly measured ranks, from prompts of a held-back split.

    Args:
        folder: the model with its processor.
        manifest: the shards.
        split: held back from training.
        prompts: to solve on; as many again are checked on. Fewer where the split has fewer.
        target_mean: visual tokens to keep on average.
        ranks: that decide stage 1's budgets; None keeps the model's.
        device: where the model runs.

    Raises:
        CalibrationError, ValueError: as `check_lambda`; a model whose stage 3 is off.
        ShardError: a shard that is missing or damaged.
    """
    model, processor = load_model_and_processor(folder)
    model.to(device)
    pruning = model.config.pruning
    if not pruning.decode.enabled:
        raise CalibrationError("pruning.decode.enabled is false: stage 3 is off, so there is no lambda to solve for")
    decode = replace(pruning.decode, target_mean=target_mean, lam=None, budget="attention_mass")
    apply_pruning(model, processor, replace(pruning, decode=decode), ranks)
    positions = model.config.text_config.max_position_embeddings
    questions = read_questions(manifest, split, processor, 2 * prompts, positions=positions)
    left_out = counted(questions.left_out)
    if not questions.asked:
        raise CalibrationError(
            f"split {split!r} of {manifest.url} has no prompt with images to solve lambda on (left out: {left_out})"
        )
    say(f"lambda is solved on {len(questions.asked)} prompts of split {split}, left out: {left_out}")
    mass_B, num_visual_B = attention_masses(model, processor, questions.asked)
    return check_lambda(mass_B, num_visual_B, target_mean, decode.k_min)
