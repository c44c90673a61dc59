"""The one place where a parameter is read past the module that owns it.

Whatever stands around a library's module acts where that module is called: an adapter (LoRA) adds to a projection, a
quantised layer has no weight to multiply by, accelerate brings offloaded weights in and takes them out again, DeepSpeed
and FSDP gather them. Code that runs a tower block by block reads some parameters while their owner is not running;
these functions see to it that such a read gives what a call would have used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def whole_weight(layer: nn.Module, like: Tensor) -> Tensor | None:
    """W of a layer that is exactly W x + b, on the device of `like`; None where only a call says what the layer does.

    None for an adapter around a layer, a quantised one, a ZeRO-3 shard, an offloaded one, and one with hooks.
    """
    if type(layer) is not nn.Linear or "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return None
    weight = layer.weight
    whole = weight.shape == (layer.out_features, layer.in_features) and weight.device == like.device
    return weight if whole else None


def project_part(layer: nn.Module, hidden: Tensor, part: int, bias: Tensor | None = None) -> Tensor:
    """Query (0), key (1) or value (2) of a fused projection, (..., D) -> (..., H * d).

    Its own rows alone where the weights are at hand, else a third of what the whole layer gives. `bias` is that of the
    part, for libraries that keep it beside the layer.
    """
    weight = whole_weight(layer, hidden)
    if weight is None:
        projected: Tensor = layer(hidden).chunk(3, dim=-1)[part]
        return projected if bias is None else projected + bias
    own_bias = cast(nn.Linear, layer).bias
    if bias is None and own_bias is not None:
        bias = own_bias.chunk(3)[part]
    return F.linear(hidden, weight.chunk(3)[part], bias)


def of_a_zero_token(layer: nn.Module, like: Tensor) -> Tensor:
    """What a projection makes of a token that is zero: its bias, whatever stands around it. (..., D) -> (width,)."""
    projected: Tensor = layer(like.new_zeros(1, like.shape[-1]))[0]
    return projected


@contextmanager
def own_tensors(*modules: nn.Module) -> Iterator[None]:
    """The modules' own parameters (not those of their children) can be read inside the block, offloaded or not.

    DeepSpeed gathers a parameter that is read during a forward by itself; accelerate's hook has to be asked.
    """
    hooked = [(module, cast(Any, module)._hf_hook) for module in modules if hasattr(module, "_hf_hook")]
    for module, hook in hooked:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in reversed(hooked):
            hook.post_forward(module, None)


def runs_at(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype in which a module takes its input, wherever and as whatever its weights are stored."""
    tensors = [*module.parameters(), *module.buffers()]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.get_default_dtype()
    for child in module.modules():
        device: Any = getattr(getattr(child, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device), dtype
    stored = floating or tensors
    return stored[0].device if stored else torch.device("cpu"), dtype
