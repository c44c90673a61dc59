"""Sums of weights: the same for every number of workers, another for every other tensor."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.checkpoint import weight_sums as module
from pipelines.checkpoint.weight_sums import Precision, differing, weight_sum, weight_sums

ODD = 0x9E3779B97F4A7C15


def literal(values: list[float], precision: Precision) -> int:
    """Element by element, in Python's integers."""
    total = 0
    for place, value in enumerate(values):
        if precision == "fp32":
            (bits,) = struct.unpack("<i", struct.pack("<f", value))
        else:
            bits = int(torch.tensor(value).bfloat16().view(torch.int16))
        total += bits * (place * ODD | 1)
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@settings(deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    world=st.integers(1, 5),
    chunk=st.integers(1, 9),
)
def test_a_sum_is_the_literal_one_whatever_holds_the_parts(
    precision: Precision, values: list[float], world: int, chunk: int
) -> None:
    weight, length = torch.tensor(values), -(-len(values) // world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        parts = [weight_sum(weight[start:][:length], precision, start) for start in range(0, len(values), length)]
    total = int(torch.stack(parts).sum())
    assert total == literal(values, precision) == int(weight_sum(weight, precision))


@settings(deadline=None)
@given(st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=30), st.data())
def test_another_value_or_order_gives_another_sum(values: list[float], data: st.DataObject) -> None:
    weight = torch.tensor(values)
    other = weight.clone()
    place = data.draw(st.integers(0, len(values) - 1))
    other[place] = torch.nextafter(other[place], torch.tensor(torch.inf))
    assert int(weight_sum(weight, "fp32")) != int(weight_sum(other, "fp32"))
    turned = torch.tensor(data.draw(st.permutations(values)))
    assert (int(weight_sum(turned, "fp32")) == int(weight_sum(weight, "fp32"))) == torch.equal(
        turned.view(torch.int32), weight.view(torch.int32)
    )


def test_rounding_is_that_of_the_whole_tensor() -> None:
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert weight_sums([("w", weight)], "bf16") == weight_sums([("w", weight.bfloat16())], "bf16")
    assert weight_sums([("w", weight)], "bf16") != weight_sums([("w", weight)], "fp32")


def test_what_differs_is_named() -> None:
    assert differing({"a": 1, "b": 2}, {"a": 1, "b": 2}) == []
    assert differing({"a": 1, "b": 3, "d": 4}, {"a": 1, "b": 2, "c": 3}) == ["b", "c", "d"]
