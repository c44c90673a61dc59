"""Lambda for a target mean per image, solved on held-back prompts and checked on others.

Solving meets the target on the prompts that it sees, to within rounding. What counts is the mean on prompts that it did
not see: groups of prompts about the same thing take turns, one to solve on and one to check.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meteor_model.loading import load_model_and_processor
from meteor_model.pruners.counts import adaptive_counts
from pipelines.calibration.image_plan import CalibrationError
from pipelines.calibration.ranks import Ranks
from pipelines.data import shards
from pipelines.evaluation.intervals import equivalent, mean
from pipelines.evaluation.questions import read_prompts
from pipelines.evaluation.scores import counted
from pipelines.evaluation.target_mean import attention_masses, solve_lambda_per_image
from pipelines.io.console import say
from pipelines.registry.variants import apply_pruning

TOLERANCE = 0.05
"""Share of the target that the mean of other prompts may be away from it."""


@dataclass(frozen=True)
class LambdaReport:
    """Lambda and the means that it keeps.

    Attributes:
        lam: lambda.
        target_per_image: visual tokens that it was solved for.
        solved_on: prompts that it was solved on.
        solved_per_image: visual tokens kept on those.
        checked_on: other prompts of the same split.
        checked_groups: groups that those are in.
        checked_per_image: visual tokens kept on those.
        low: lower end of the 95 % interval of `checked_per_image`, over groups.
        high: upper end.
        holds: whether that whole interval lies within TOLERANCE of the target; fewer prompts never make it so.
    """

    lam: float
    target_per_image: float
    solved_on: int
    solved_per_image: float
    checked_on: int
    checked_groups: int
    checked_per_image: float
    low: float
    high: float
    holds: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def check_lambda(
    mass_B: torch.Tensor,
    num_visual_B: torch.Tensor,
    images_B: torch.Tensor,
    groups: Sequence[Hashable],
    target_per_image: float,
    k_min: int,
) -> LambdaReport:
    """Solve on the prompts of every other group (the first, third, ...), check on those of the others.

    Args:
        mass_B: attention mass on visual tokens, prompt by prompt.
        num_visual_B: visual tokens of each prompt.
        images_B: images of each prompt, at least one.
        groups: of prompts that are no independent draws.
        target_per_image: wanted.
        k_min: fewest that a prompt keeps.

    Raises:
        CalibrationError: fewer than two prompts to check on.
        ValueError: a target that no lambda reaches.
    """
    order: dict[Hashable, int] = {}
    turns = np.array([order.setdefault(group, len(order)) % 2 for group in groups], dtype=bool)
    if min((~turns).sum(), turns.sum()) < 2:
        raise CalibrationError(
            f"{len(groups)} prompts with images in {len(order)} groups: lambda needs two to solve on and two to check "
            "on"
        )
    solved_B = torch.from_numpy(~turns)
    mass_B, num_visual_B, images_B = mass_B.cpu(), num_visual_B.cpu(), images_B.cpu()
    lam = solve_lambda_per_image(mass_B[solved_B], num_visual_B[solved_B], images_B[solved_B], target_per_image, k_min)
    counts = adaptive_counts(mass_B, lam, num_visual_B, k_min).double().numpy()
    images = images_B.numpy()
    # A value for each image, so that the mean is over images; its prompt's group holds them together.
    each = np.repeat(counts[turns] / images[turns], images[turns])
    owners = np.repeat([order[group] for group in groups], images_B.numpy() * turns).tolist()
    interval = mean(each, owners)
    return LambdaReport(
        lam=lam,
        target_per_image=target_per_image,
        solved_on=int((~turns).sum()),
        solved_per_image=float(counts[~turns].sum() / images[~turns].sum()),
        checked_on=int(turns.sum()),
        checked_groups=len(order) // 2,
        checked_per_image=float(each.mean()),
        low=interval.low,
        high=interval.high,
        holds=equivalent(interval, (1 - TOLERANCE) * target_per_image, (1 + TOLERANCE) * target_per_image),
    )


def solve_on_split(
    folder: Path,
    manifest: shards.Manifest,
    split: str,
    prompts: int,
    target_per_image: float,
    ranks: Ranks | None,
    device: str = "cpu",
) -> LambdaReport:
    """Lambda of a saved model under newly measured ranks, from prompts of a held-back split.

    Args:
        folder: the model with its processor.
        manifest: the shards.
        split: held back from training.
        prompts: to solve on; as many again are checked on. Fewer where the split has fewer.
        target_per_image: visual tokens of an image to keep on average.
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
    decode = replace(pruning.decode, target_mean=target_per_image, lam=None, budget="attention_mass")
    apply_pruning(model, processor, replace(pruning, decode=decode), ranks)
    positions = model.config.text_config.max_position_embeddings
    questions = read_prompts(manifest, split, processor, 2 * prompts, positions=positions)
    left_out = counted(questions.left_out)
    if not questions.asked:
        raise CalibrationError(
            f"split {split!r} of {manifest.url} has no prompt with images to solve lambda on (left out: {left_out})"
        )
    say(f"lambda is solved on {len(questions.asked)} prompts of split {split}, left out: {left_out}")
    mass_B, num_visual_B = attention_masses(model, processor, questions.asked)
    images_B = torch.tensor([len(question.images) for question in questions.asked])
    groups = [question.group for question in questions.asked]
    return check_lambda(mass_B, num_visual_B, images_B, groups, target_per_image, decode.k_min)
