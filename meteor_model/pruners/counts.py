"""How many visual tokens each sample keeps by its attention mass, and the lambda that gives a target mean.

Legend: B samples, S steps of a step function.
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor

from meteor_model.pruners.select import refuse_nan


def adaptive_counts(mass_B: Tensor, lam: float, num_visual_B: Tensor, k_min: int) -> Tensor:
    """Visual tokens to keep of each sample: K = lam * mass, rounded half up, clamped to [min(k_min, N), N]. (B,) int64.

    Rounding is floor(x + 0.5) in fp64. A sample without visual tokens (N = 0) has K = 0.

    Raises ValueError when a mass is NaN, or `lam` or `k_min` is negative.
    """
    if not (math.isfinite(lam) and lam >= 0) or k_min < 0:
        raise ValueError(f"lambda must be finite and not negative, k_min not negative; got lambda={lam}, k_min={k_min}")
    refuse_nan(mass_B)
    return counts_of_mass(mass_B, lam, num_visual_B, k_min)


def counts_of_mass(mass_B: Tensor, lam: float, num_visual_B: Tensor, k_min: int) -> Tensor:
    """`adaptive_counts` for a caller that looks for NaN itself, so that a GPU is not waited for here."""
    num_visual_B = num_visual_B.to(torch.int64)
    wanted_B = torch.floor(mass_B.double() * lam + 0.5)
    # The bound first, in fp64: a huge lambda must not overflow int64.
    wanted_B = torch.minimum(wanted_B, num_visual_B.double()).to(torch.int64)
    return torch.maximum(wanted_B, num_visual_B.clamp(max=k_min))


def solve_lambda(mass_B: Tensor, num_visual_B: Tensor, target_mean: float, k_min: int) -> float:
    """The lambda whose `adaptive_counts` on these samples have the mean `target_mean`, as near as integers allow.

    Samples without visual tokens do not count in the mean. The mean is a step function of lambda that jumps where some
    lam * mass passes j + 1/2; the search bisects over the middles of its steps, so that the result is not on an edge.
    Of two equally near steps the lower is taken.

    Raises ValueError when no sample has a visual token, or the target is outside what any lambda reaches.
    """
    present_B = num_visual_B > 0
    if not bool(present_B.any()):
        raise ValueError("lambda needs a calibration batch with visual tokens: no sample has any")
    mass_B, num_visual_B = mass_B[present_B].double(), num_visual_B[present_B].to(torch.int64)
    lowest_B = num_visual_B.clamp(max=k_min)
    highest_B = torch.where(mass_B > 0, num_visual_B, lowest_B)
    lowest, highest = float(lowest_B.double().mean()), float(highest_B.double().mean())
    if not lowest <= target_mean <= highest:
        raise ValueError(
            f"a mean of {target_mean} visual tokens cannot be reached on these {len(mass_B)} samples: "
            f"any lambda keeps between {lowest:g} (k_min={k_min}) and {highest:g} (all tokens)"
        )

    edges = [
        (torch.arange(int(low) + 1, int(high) + 1, dtype=torch.float64) - 0.5) / mass.cpu()
        for mass, low, high in zip(mass_B, lowest_B, highest_B, strict=True)
    ]
    edges_S = torch.unique(torch.cat(edges))  # sorted
    if edges_S.numel() == 0:
        return 1.0  # every lambda keeps the same, and a configuration takes positive ones
    steps = list(chain([float(edges_S[0]) / 2], ((edges_S[:-1] + edges_S[1:]) / 2).tolist(), [float(edges_S[-1]) * 2]))

    def mean_count(lam: float) -> float:
        return float(adaptive_counts(mass_B, lam, num_visual_B, k_min).double().mean())

    low, high = 0, len(steps) - 1
    while low < high:  # the first step that reaches the target
        middle = (low + high) // 2
        low, high = (low, middle) if mean_count(steps[middle]) >= target_mean else (middle + 1, high)
    below = max(low - 1, 0)
    nearer_below = target_mean - mean_count(steps[below]) <= mean_count(steps[low]) - target_mean
    return steps[below] if nearer_below and mean_count(steps[low]) != target_mean else steps[low]
