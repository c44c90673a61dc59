"""A checkpoint as a training of several workers writes it, made of a model in memory without DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipelines.checkpoint.shards import partition_length
from pipelines.checkpoint.state import ZERO3_TAG


def write_checkpoint(model: PreTrainedModel, directory: Path, world: int) -> None:
    """Every parameter trained, in one sub-group, with AdamW's two moments."""
    named = dict(model.named_parameters())
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in named}
    shared = _aliases(model)
    common: dict[str, Any] = {
        "dp_world_size": world,
        "buffer_names": [name for name in buffers if name not in shared],
        "module": {name: tensor for name, tensor in buffers.items() if name not in shared},
        "param_shapes": [{name: tensor.shape for name, tensor in named.items()}],
        "frozen_param_shapes": {},
        "frozen_param_fragments": {},
        "shared_params": shared,
    }
    (directory / ZERO3_TAG).mkdir(parents=True)
    for rank in range(world):
        torch.save(common, directory / ZERO3_TAG / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        parts = []
        for tensor in named.values():
            length, flat = partition_length(tensor.numel(), world), tensor.detach().reshape(-1).float()
            part = flat[rank * length :][:length]
            parts.append(torch.nn.functional.pad(part, (0, length - part.numel())))
        flat = torch.cat(parts)
        state = {
            0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        }
        optimizer = {
            "optimizer_state_dict": {"state": state, "param_groups": [{"lr": 1e-3, "params": [0]}]},
            "fp32_flat_groups": [flat],
        }
        path = directory / ZERO3_TAG / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, path)


def _aliases(model: PreTrainedModel) -> dict[str, str]:
    first: dict[torch.nn.Parameter, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in first:
            aliases[name] = first[parameter]
        first.setdefault(parameter, name)
    return aliases
