"""Torch's dispatch counter with the products that it leaves out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

T = TypeVar("T")


def _matrix_vector(matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _add_matrix_vector(bias: Sequence[int], matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _inner_product(first: Sequence[int], second: Sequence[int], **_: Any) -> int:
    return 2 * first[0]


def _cpu_attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


def _cpu_attention_backward(grad: Sequence[int], query: Sequence[int], *rest: Any, **options: Any) -> int:
    return 2 * _cpu_attention(
        query, *rest, **options
    )  # four products; what a kernel recomputes is no cost of the model


def _convolution_backward(
    grad: Sequence[int], pixels: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any
) -> int:
    """As many products as forward, for each of the two gradients wanted: of the input and of the weight."""
    transposed, output_mask = rest[4], rest[7]
    places = pixels[2:] if transposed else grad[2:]
    forward = 2 * math.prod(weight) * grad[0] * math.prod(places)
    return forward * sum(output_mask[:2])


#: Products that torch's counter leaves out (attention on a CPU would count as nothing) or gets wrong (the gradient of a
#: depthwise convolution's weight, by a factor of its channels).
EXTRA_FORMULAS: dict[Any, Any] = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _add_matrix_vector,
    torch.ops.aten.dot: _inner_product,
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


def flop_counter() -> FlopCounterMode:
    """Torch's counter with the products that it leaves out, for meta, CPU and CUDA alike."""
    return FlopCounterMode(display=False, custom_mapping=EXTRA_FORMULAS)


def counted(function: Callable[..., T], *args: Any, **kwargs: Any) -> tuple[T, int]:
    """The result of a call, and the FLOPs that it dispatched."""
    with flop_counter() as counter:
        result = function(*args, **kwargs)
    return result, counter.get_total_flops()
