"""Sums that tell one set of weights from another, bit by bit, whatever number of workers holds them.

A sum is over all elements of a parameter: the element's bits times an odd number that its place gives, modulo 2^64.
Integers add up to the same in any order, so workers add the sums of their partitions. Another value, another place or
another order of elements gives another sum, but for one chance in about 2^64.

The sums of a training are those of the weights that its forward used. A model that is made from its checkpoint, whoever
makes it, has the same or is another: in bf16, logits alone would not show a tenth of noise on a weight matrix
(docs/LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16"]
"""Number formats of weights, as settings name them."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
COARSER: dict[Precision, tuple[Precision, ...]] = {"fp32": ("fp32", "bf16"), "bf16": ("bf16",)}
"""Formats that weights of a format can be rounded to, that format itself first."""

WeightSums = Mapping[str, int]
"""Parameter names to sums."""

CHUNK = 1 << 18
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 over the golden ratio: neighbouring places get unlike numbers
_BITS: dict[Precision, torch.dtype] = {"fp32": torch.int32, "bf16": torch.int16}


def weight_sum(part: Tensor, precision: Precision, start: int = 0) -> Tensor:
    """The sum of some elements of a parameter, rounded to a format; an int64 scalar where they are.

    Args:
        part: consecutive elements of the flattened parameter; a quarter of a million is rounded at a time.
        precision: that format.
        start: place of the first of them.
    """
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    for number, chunk in enumerate(part.detach().reshape(-1).split(CHUNK)):
        begin = start + number * CHUNK
        bits = chunk.to(DTYPES[precision]).view(_BITS[precision]).to(torch.int64)
        places = torch.arange(begin, begin + len(chunk), device=part.device)
        total += (bits * (places * _ODD | 1)).sum()
    return total


def weight_sums(parameters: Iterable[tuple[str, Tensor]], precision: Precision) -> WeightSums:
    """The sums of whole parameters, rounded to a format one after another."""
    return {name: int(weight_sum(parameter, precision)) for name, parameter in parameters}


def differing(found: WeightSums, expected: WeightSums) -> list[str]:
    """Names of the parameters that differ, in the order of `expected`, and those that only one side has."""
    wrong = [name for name, value in expected.items() if found.get(name) != value]
    return wrong + [name for name in found if name not in expected]
