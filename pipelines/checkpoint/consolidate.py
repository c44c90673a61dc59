"""One whole model out of the ZeRO-3 shards of a checkpoint.

Bytes of memory at its peak, for a model of P parameters of b bytes: b P, with 4 bytes for each element of the largest
parameter and `MAPPED_BYTES`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from pipelines.checkpoint.lora import MergedWeights
from pipelines.checkpoint.shards import ZeroFiles
from pipelines.checkpoint.state import CheckpointError
from pipelines.checkpoint.whole import WholeWeights
from pipelines.checkpoint.zero3 import default_dtype

MAPPED_BYTES = 1 << 25
"""Of the shards, as many stay mapped at a time."""


def consolidate(
    directory: Path, model_class: type[PreTrainedModel], init: Path, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """One whole model, on the CPU, from the ZeRO-3 shards of a local checkpoint, one weight after another.

    Args:
        directory: the checkpoint.
        model_class: class of the model.
        init: the folder that training started from: its config, and its weights where parts are frozen.
        dtype: number format of the weights; None keeps the fp32 that the shards hold.

    Raises:
        CheckpointError: if the shards lack a parameter or buffer of the model, hold one too many, or another shape, or
            if they leave what is frozen to another start model.
    """
    dtype = dtype or torch.float32
    shards = ZeroFiles(directory)
    weights = _weights(shards, init)
    model = _unwritten(model_class, init, dtype)
    fault = f"{directory} does not fit {model_class.__name__}"
    _check_names(set(model.state_dict()), weights, fault)
    mapped = 0
    for name, place in [*model.named_parameters(), *_persistent_buffers(model)]:
        weight = weights[name]
        if weight.shape != place.shape:
            raise CheckpointError(f"{fault}: {name} has shape {tuple(weight.shape)} instead of {tuple(place.shape)}")
        _put(model, name, weight.to(dtype) if weight.is_floating_point() else weight)
        mapped += weight.nbytes
        if mapped > MAPPED_BYTES:
            shards.unmap()
            mapped = 0
    model.tie_weights()
    model.config.dtype = dtype
    return model.eval()


def read_weights(directory: Path, init: Path) -> Mapping[str, Tensor]:
    """All weights of a local checkpoint, fp32 where they were trained; what is frozen comes from `init`.

    Adapters are merged into the weights beside which they were trained.

    DeepSpeed's own function for this is not used: it unpickles whatever the files hold.

    Raises:
        CheckpointError: if shards are missing or damaged, or leave what is frozen to another start model.
    """
    return _weights(ZeroFiles(directory), init)


def _weights(shards: ZeroFiles, init: Path) -> Mapping[str, Tensor]:
    whole = WholeWeights(shards, init)
    return whole if shards.lora_scale is None else MergedWeights(whole, shards.lora_scale)


def _unwritten(model_class: type[PreTrainedModel], init: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model whose parameters were never written to, so that they take up no memory.

    Not on the meta device: buffers that no file holds (positions, rotary tables, normalisation) are made here.
    """
    with no_init_weights(), default_dtype(dtype):
        model = model_class(model_class.config_class.from_pretrained(init))
    model.tie_weights()  # part of the initialisation that is left out above
    return model


def _check_names(expected: Collection[str], found: Collection[str], fault: str) -> None:
    faults = [f"{name} is missing" for name in sorted(set(expected) - set(found))]
    faults += [f"{name} is not in the model" for name in sorted(set(found) - set(expected))]
    if faults:
        raise CheckpointError(f"{fault}: {'; '.join(faults[:5])}")


def _persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    saved = model.state_dict()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def _put(model: nn.Module, name: str, weight: Tensor) -> None:
    """Let a parameter or buffer be this tensor; what it was is freed."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    before = getattr(module, leaf)
    is_parameter = isinstance(before, nn.Parameter)
    setattr(module, leaf, nn.Parameter(weight, requires_grad=before.requires_grad) if is_parameter else weight)
