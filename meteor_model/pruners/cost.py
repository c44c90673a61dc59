"""What a pruner costs, and the setting at which it costs as much as another: comparisons at equal cost.

Three measures, for the field uses all of them: the tokens that are left at the end, the tokens that a layer of the
language model sees on average, and TFLOPs to the first token (`meteor_model.flops`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from meteor_model.checks import finite_number
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.flops import TEXT_TOKENS, count_flops
from meteor_model.pruners.named import numbers_of, with_pruner
from meteor_model.pruners.spectra import energy_rank

Measure = Literal["kept", "layer_mean", "tflops"]


def kept_at_the_end(config: MeteorConfig) -> float:
    """Visual tokens of an image in the last layer of the language model; a mean where the number is the prompt's."""
    decode = config.pruning.decode
    if not decode.enabled:
        return float(config.tokens_per_image)
    cuts = decode.cuts()
    if cuts[-1].keep is None:
        raise ValueError("pruning.decode.target_mean is not set: give the mean that is expected")
    return min(float(config.tokens_per_image), *(float(cut.keep) for cut in cuts if cut.keep is not None))


def mean_over_layers(config: MeteorConfig) -> float:
    """Visual tokens of an image that a layer of the language model sees, on average over its layers, at prefill."""
    layers, decode = config.text_config.num_hidden_layers, config.pruning.decode
    present, first, seen = float(config.tokens_per_image), 0, 0.0
    for cut in decode.cuts() if decode.enabled and decode.query != "answer" else ():
        seen += (cut.layer - first) * present
        present, first = min(present, float(cut.keep or 0)), cut.layer
    return (seen + (layers - first) * present) / layers


def tflops(config: MeteorConfig, text_tokens: int = TEXT_TOKENS) -> float:
    """TFLOPs of one image and prompt to the first token."""
    return count_flops(config, text_tokens).total / 1e12


MEASURES: dict[Measure, Callable[[MeteorConfig], float]] = {
    "kept": kept_at_the_end,
    "layer_mean": mean_over_layers,
    "tflops": tflops,
}


@dataclass(frozen=True)
class Solved:
    """A pruner at a target.

    Attributes:
        config: the model's, under the pruner.
        keep: the number that gives it.
        reached: of the measure; whole tokens may miss the target by a little.
    """

    config: MeteorConfig
    keep: int
    reached: float


def solve_pruner(config: MeteorConfig, name: str, measure: Measure, target: float, **settings: Any) -> Solved:
    """The number of tokens at which a pruner comes nearest to a target; of two equally near the smaller.

    Args:
        config: any model.
        name: of the pruner.
        measure: "kept" at the end, "layer_mean", or "tflops".
        target: of it.
        settings: the pruner's own.

    Raises:
        ValueError: for an unknown pruner or measure, or a target that is out of its reach, with the range.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure {measure!r} is unknown; known: {', '.join(MEASURES)}")
    target = finite_number("target", target)
    numbers, cost = numbers_of(config, name), MEASURES[measure]
    known: dict[int, Solved] = {}

    def at(index: int) -> Solved:
        if index not in known:
            pruned = with_pruner(config, name, numbers[index], **settings)
            known[index] = Solved(pruned, numbers[index], cost(pruned))
        return known[index]

    low, high = 0, len(numbers) - 1
    least, most = at(low).reached, at(high).reached
    if not least <= target <= most:
        raise ValueError(
            f"pruner {name!r} reaches {measure} {least:.4g} (keeping {numbers[low]}) to {most:.4g} (keeping "
            f"{numbers[high]}) with this model, not {target:g}"
        )
    while low < high:  # the first that reaches the target: cost grows with the number kept
        middle = (low + high) // 2
        low, high = (low, middle) if at(middle).reached >= target else (middle + 1, high)
    below = max(low - 1, 0)
    return min((at(below), at(low)), key=lambda solved: abs(solved.reached - target))


def solve_share(spectra_BR: Tensor, target_mean: float) -> float:
    """The share of spectral energy for which E-AdaPrune keeps `target_mean` tokens of these prompts on average.

    Args:
        spectra_BR: singular values of the visual tokens of each prompt, largest first (`spectra.singular_values`).
        target_mean: tokens.

    Raises:
        ValueError: for a target below 1 or above the mean number of values that are not zero.
    """
    highest = float(energy_rank(spectra_BR, 1.0).mean())
    if not 1 <= target_mean <= highest:
        raise ValueError(f"a mean of {target_mean} tokens cannot be reached: any share keeps between 1 and {highest:g}")
    held_BR = spectra_BR.double().square().cumsum(dim=-1)
    held_BR = held_BR / held_BR[:, -1:]
    shares: Sequence[float] = torch.unique(held_BR).clamp(max=1.0).tolist()
    low, high = 0, len(shares) - 1
    while low < high:
        middle = (low + high) // 2
        reached = float(energy_rank(spectra_BR, shares[middle]).mean())
        low, high = (low, middle) if reached >= target_mean else (middle + 1, high)
    return shares[low]
