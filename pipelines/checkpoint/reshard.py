"""Loading a ZeRO-3 checkpoint into an engine of any number of workers, exactly.

A worker of another world takes its own elements out of the old workers' files (`pipelines.checkpoint.shards`): fp32
weights and both moments of AdamW. It then hands DeepSpeed what its own shard file would have held, had the checkpoint
been written by the new world, and DeepSpeed loads that as ever. Frozen parameters are in the engine already, since it
was made from the start model; a checkpoint of an earlier version holds them, too.

DeepSpeed's universal checkpoint (0.19.8) is not used: its loading gives every parameter group the settings of the first
one, lets all sub-groups share one step counter of AdamW, which then advances once per sub-group, and leaves frozen
parameters and buffers as they are. It also writes the whole state twice before anyone can load it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.checkpoint.shards import Layout, ZeroFiles, layout_of, overlaps, partition_length, require_start
from pipelines.checkpoint.state import CheckpointError
from pipelines.compat.deepspeed import engine_layout, load_into_engine


def load_resharded(engine: Any, directory: Path, start: str) -> None:
    """Load a local checkpoint of any number of workers into a running ZeRO-3 engine, as a native resume would.

    Weights, both moments, step counters, every entry of every parameter group, frozen parameters, persistent buffers
    and DeepSpeed's own counters become those of the checkpoint. The checkpoint must be from between two optimizer
    steps. Every worker must call this; each reads little more than its own share.

    Args:
        engine: engine of the same model and parameter groups, with its optimizer's state in memory (no NVMe), before
            its first step.
        directory: the checkpoint, with `zero3/` in it.
        start: digest of the weight files that the engine's frozen parameters were loaded from.

    Raises:
        CheckpointError: if shards are missing or damaged, if parameter groups, names or shapes are others than the
            engine's, if its frozen parameters are those of another start model, or if the old workers disagree about
            what they must have in common.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shards = ZeroFiles(directory)
    model = shards.model(0)
    own = engine_layout(engine)
    layout = Layout(world, own.sub_groups, own.group_of)
    old_layout = layout_of(shards)
    check_groups(old_layout.groups(), layout.groups(), directory)
    check_shapes("frozen parameters", shards.frozen, own.frozen, directory)
    require_start(shards, start)
    state = optimizer_state(shards, old_layout, layout, rank)
    fragments = None
    if shards.start is None:
        sizes = {name: shape.numel() for name, shape in own.frozen.items()}
        fragments = {name: frozen_partition(shards, name, numel, world, rank) for name, numel in sizes.items()}
    load_into_engine(engine, rank, state, common_buffers(shards), fragments, model)


def check_groups(
    old: Sequence[Mapping[str, torch.Size]], new: Sequence[Mapping[str, torch.Size]], directory: Path
) -> None:
    """Compare the parameter groups of a checkpoint with those of an engine.

    Raises:
        CheckpointError: naming the first differences.
    """
    if len(old) != len(new):
        raise CheckpointError(
            f"{directory} has {len(old)} parameter groups, the training has {len(new)}: train the same parts as before"
        )
    for group, (saved, wanted) in enumerate(zip(old, new, strict=True)):
        check_shapes(f"parameter group {group}", saved, wanted, directory)


def check_shapes(what: str, saved: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size], directory: Path) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: naming the first differences.
    """
    faults = [f"{name} is not in the model" for name in saved if name not in wanted]
    faults += [f"{name} is missing" for name in wanted if name not in saved]
    faults += [
        f"{name} has shape {tuple(saved[name])} instead of {tuple(shape)}"
        for name, shape in wanted.items()
        if name in saved and tuple(saved[name]) != tuple(shape)
    ]
    if faults:
        raise CheckpointError(f"{directory}, {what}: {'; '.join(faults[:5])}")


def optimizer_state(shards: ZeroFiles, old: Layout, new: Layout, rank: int) -> dict[str, Any]:
    """What worker `rank` of the world of `new` would have written as its optimizer state.

    Raises:
        CheckpointError: if sub-groups that are to become one have done different numbers of steps.
    """
    first = shards.optimizer(0)
    groups = [
        {**{key: value for key, value in entries.items() if key != "params"}, "params": new.members(group)}
        for group, entries in enumerate(first["optimizer_state_dict"]["param_groups"])
    ]
    reader = _OptimizerReader(shards, old, new, rank)
    states = {sub_group: reader.state(sub_group) for sub_group in range(len(new.shapes))}
    return {
        **{key: first[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow")},
        "optimizer_state_dict": {"state": states, "param_groups": groups},
        "fp32_flat_groups": [reader.weights(sub_group) for sub_group in range(len(new.shapes))],
    }


class _OptimizerReader:
    """Flat tensors of one worker of a new world, out of the shards of an old one."""

    def __init__(self, shards: ZeroFiles, old: Layout, new: Layout, rank: int) -> None:
        self._shards = shards
        self._old = old
        self._new = new
        self._rank = rank
        self._places = old.places()

    def weights(self, sub_group: int) -> Tensor:
        """The fp32 weights of a new sub-group."""
        dtype = self._shards.optimizer(0)["fp32_flat_groups"][0].dtype
        flat = torch.zeros(self._new.flat_length(sub_group), dtype=dtype)
        self._fill(flat, sub_group, lambda source, old: self._shards.optimizer(source)["fp32_flat_groups"][old])
        return flat

    def state(self, sub_group: int) -> dict[str, Any]:
        """The optimizer's state of a new sub-group; padding is zero."""
        origins = sorted({self._places[name].sub_group for name in self._new.shapes[sub_group]})
        saved = [self._saved(0, origin) for origin in origins]
        if any(other.keys() != saved[0].keys() for other in saved):
            raise CheckpointError(
                f"{self._shards.directory} holds different optimizer states in sub-groups {origins}: "
                f"{[sorted(other) for other in saved]}"
            )
        state: dict[str, Any] = {}
        for key, value in saved[0].items():
            if isinstance(value, Tensor) and value.dim():
                state[key] = torch.zeros(self._new.flat_length(sub_group), dtype=value.dtype)
                self._fill(state[key], sub_group, lambda source, old, key=key: self._saved(source, old)[key])
                continue
            others = [other[key] for other in saved]
            if any(other != value for other in others):
                raise CheckpointError(
                    f"{self._shards.directory} holds different values of {key!r} in sub-groups {origins}: {others}"
                )
            # A tensor of its own: the optimizer advances the step counter of every sub-group in place.
            state[key] = value.clone() if isinstance(value, Tensor) else value
        return state

    def _saved(self, source: int, sub_group: int) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._shards.optimizer(source)["optimizer_state_dict"]["state"].get(sub_group, {})
        return state

    def _fill(self, flat: Tensor, sub_group: int, source_flat: Any) -> None:
        offset = 0
        for name, shape in self._new.shapes[sub_group].items():
            place = self._places[name]
            for overlap in overlaps(shape.numel(), self._old.world, self._new.world, self._rank):
                source = source_flat(overlap.source, place.sub_group)
                begin = place.offset + overlap.source_start
                target = offset + overlap.target_start
                flat[target : target + overlap.length] = source[begin : begin + overlap.length]
            offset += partition_length(shape.numel(), self._new.world)


def frozen_partition(shards: ZeroFiles, name: str, numel: int, world: int, rank: int) -> Tensor:
    """Worker `rank`'s partition of a frozen parameter that the shards hold, among `world` workers; padding is zero."""
    dtype = shards.model(0)["frozen_param_fragments"][name].dtype
    partition = torch.zeros(partition_length(numel, world), dtype=dtype)
    for overlap in overlaps(numel, shards.world, world, rank):
        source = shards.model(overlap.source)["frozen_param_fragments"][name]
        target = slice(overlap.target_start, overlap.target_start + overlap.length)
        partition[target] = source[overlap.source_start :][: overlap.length]
    return partition


def common_buffers(shards: ZeroFiles) -> dict[str, Tensor]:
    """The persistent buffers.

    Raises:
        CheckpointError: if a buffer differs between the old workers, so that no new worker has a right one.
    """
    first = shards.model(0)
    buffers: dict[str, Tensor] = {name: first["module"][name] for name in first["buffer_names"]}
    for rank in range(1, shards.world):
        module = shards.model(rank)["module"]
        for name, buffer in buffers.items():
            if not torch.equal(module[name], buffer):
                raise CheckpointError(
                    f"{shards.directory}: buffer {name} of worker {rank} differs from worker 0's; buffers that differ "
                    "between workers can only be resumed on the same number of workers"
                )
    return buffers
