"""What this project uses of DeepSpeed beyond its public interface, with the version it was read from and the reason.

Written for DeepSpeed 0.19.8; `pyproject.toml` allows no other minor version. `tests/pipelines/compat/test_deepspeed.py`
fails when one of these things changes. The format of its checkpoint files is read in `pipelines/checkpoint/shards.py`,
and held by `tests/pipelines/checkpoint/test_reshard.py`.

`deepspeed` is imported in the functions, after the accelerator has been chosen.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def import_deepspeed(uses_gpu: bool) -> ModuleType:
    """Import DeepSpeed for GPUs or for CPUs.

    On CPUs two habits of it are switched off. It would find out which of its native operators can be built, and build
    one (for inference, in shared memory) at its first process group, which needs a C++ compiler and half a minute; this
    project uses none of them there. And it would open a range for NVIDIA's profiler thousands of times a step.
    """
    if not uses_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not uses_gpu:
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.utils.nvtx.enable_nvtx = False
    return deepspeed


def checkpoint_classes() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The classes beside tensors and plain values that its checkpoint files hold; both are plain values, too.

    They are all that `torch.load(weights_only=True)` must allow: DeepSpeed's own loaders take any pickle.
    """
    import_deepspeed(uses_gpu=torch.cuda.is_available())
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return [LossScaler, ZeroStageEnum]


def ignore_deprecated_collectives() -> None:
    """Leave out torch's warning, once a process, that DeepSpeed calls collectives by their old names."""
    deprecated = r".*(all_gather_into_tensor|reduce_scatter_tensor).*"
    warnings.filterwarnings("ignore", message=deprecated, category=FutureWarning)


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter before ZeRO-3 partitioned it; its own is that of an empty tensor."""
    shape: torch.Size = parameter.ds_shape  # type: ignore[attr-defined]
    return shape


def own_partition(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """This worker's elements of a parameter that ZeRO-3 partitioned, flat and without padding; place of the first.

    DeepSpeed offers fp32 copies of trained partitions only (`safe_get_local_fp32_param`).
    """
    part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    start: int = parameter.ds_zero_partition_rank * part.numel()  # type: ignore[attr-defined]
    return part[: max(0, whole_shape(parameter).numel() - start)], start


@dataclass(frozen=True)
class EngineLayout:
    """Which parameters a ZeRO-3 engine holds, by the names of the model.

    Attributes:
        sub_groups: of the trained ones, in the order of the flat tensors: names to whole shapes.
        group_of: of each sub-group, the parameter group of the optimizer that it belongs to.
        frozen: names to whole shapes.
    """

    sub_groups: Sequence[Mapping[str, torch.Size]]
    group_of: Sequence[int]
    frozen: Mapping[str, torch.Size]


def engine_layout(engine: Any) -> EngineLayout:
    """The layout of an engine; DeepSpeed writes the same into its checkpoints, but offers no function that tells it."""
    optimizer, names = engine.optimizer, engine.param_names
    sub_groups = [{names[one]: whole_shape(one) for one in group} for group in optimizer.fp16_groups]
    trained = {name for group in sub_groups for name in group}
    frozen = {names[one]: whole_shape(one) for one in engine.module.parameters() if names[one] not in trained}
    return EngineLayout(sub_groups, [optimizer.sub_group_to_group_id[one] for one in range(len(sub_groups))], frozen)


def checkpoint_bytes(engine: Any) -> int:
    """About how many bytes this worker's files of a checkpoint take: fp32 weights and AdamW's two moments.

    The buffers are small beside them; what is frozen is not written.
    """
    flat: Sequence[Tensor] = engine.optimizer.fp32_partitioned_groups_flat
    return 3 * sum(one.numel() * one.element_size() for one in flat)


def load_into_engine(
    engine: Any,
    rank: int,
    optimizer_state: Mapping[str, Any],
    buffers: Mapping[str, Tensor],
    frozen: Mapping[str, Tensor] | None,
    counters: Mapping[str, int],
) -> None:
    """Give an engine what worker `rank`'s own files of a checkpoint would have given it; every worker must call this.

    `engine.load_checkpoint` reads files of the same number of workers only.

    Args:
        engine: a ZeRO-3 engine before its first step.
        rank: of this worker.
        optimizer_state: `optimizer_state_dict` of the worker's optimizer file.
        buffers: persistent buffers of the model by name.
        frozen: the worker's partitions of the frozen parameters by name; None leaves them as they are.
        counters: `global_steps`, `global_samples` and `skipped_steps`.
    """
    optimizer = engine.optimizer
    optimizer.checkpoint_event_prologue()
    module = {**engine.module.state_dict(), **buffers}
    engine.load_module_state_dict({"module": module, "frozen_param_fragments": frozen})
    optimizer.load_state_dict([None] * rank + [optimizer_state])
    optimizer.checkpoint_event_epilogue()
    for parameter in engine.module.parameters():
        parameter.ds_secondary_tensor = (
            None  # of the weights before; the next forward makes it anew from the first ones
        )
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, counters[name])
