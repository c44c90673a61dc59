"""One whole model out of the ZeRO-3 shards of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from pipelines.checkpoint.lora import MergedWeights
from pipelines.checkpoint.shards import ZeroFiles
from pipelines.checkpoint.state import CheckpointError
from pipelines.checkpoint.whole import WholeWeights


def consolidate(
    directory: Path, model_class: type[PreTrainedModel], init: Path, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """One whole model, on the CPU, from the ZeRO-3 shards of a local checkpoint.

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
    weights = {name: _cast(tensor, dtype) for name, tensor in read_weights(directory, init).items()}
    with no_init_weights():
        model = model_class(model_class.config_class.from_pretrained(init))
    expected = model.state_dict()
    faults = [f"{name} is missing" for name in expected if name not in weights]
    faults += [f"{name} is not in the model" for name in weights if name not in expected]
    faults += [
        f"{name} has shape {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if faults:
        raise CheckpointError(f"{directory} does not fit {model_class.__name__}: {'; '.join(faults[:5])}")
    model.load_state_dict(weights, strict=True, assign=True)
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
    shards = ZeroFiles(directory)
    whole = WholeWeights(shards, init)
    return whole if shards.lora_scale is None else MergedWeights(whole, shards.lora_scale)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
