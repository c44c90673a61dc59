"""Loading a ZeRO-3 checkpoint into an engine of any number of workers, exactly.

DeepSpeed's shards say which elements of which parameter they hold, so a worker of another world takes its own elements
out of the old workers' files: fp32 weights, both moments of AdamW, frozen parameters. It then hands DeepSpeed what its
own shard file would have held, had the checkpoint been written by the new world, and DeepSpeed loads that as ever.

DeepSpeed's universal checkpoint (0.19.8) is not used: its loading gives every parameter group the settings of the first
one, lets all sub-groups share one step counter of AdamW, which then advances once per sub-group, and leaves frozen
parameters and buffers as they are. It also writes the whole state twice before anyone can load it.

Layout of the shards, at world size W: a parameter of n elements, flattened, is cut into W partitions of ceil(n / W)
elements, the last of them padded. A sub-group is a list of parameters of one parameter group; a worker's partitions of
them, one after another, are one flat tensor. Which parameters a sub-group has depends on W.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.checkpoint.state import ZERO3_TAG, CheckpointError
from pipelines.compat.deepspeed import checkpoint_classes, engine_layout, load_into_engine

SHARD_NAME = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")


@dataclass(frozen=True)
class Overlap:
    """Consecutive elements of a parameter that one old worker holds and one new worker needs."""

    source: int
    """Rank of the old worker."""
    source_start: int
    """First element, in the old worker's partition of the parameter."""
    target_start: int
    """First element, in the new worker's partition of the parameter."""
    length: int


def partition_length(numel: int, world: int) -> int:
    """Elements of one worker's partition of a parameter, padding included."""
    return -(-numel // world)


def overlaps(numel: int, old_world: int, new_world: int, rank: int) -> Iterator[Overlap]:
    """What new worker `rank` needs of a parameter of `numel` elements, in order; padding is left out."""
    old, new = partition_length(numel, old_world), partition_length(numel, new_world)
    position, stop = rank * new, min((rank + 1) * new, numel)
    while position < stop:
        source = position // old
        length = min((source + 1) * old, stop) - position
        yield Overlap(source, position - source * old, position - rank * new, length)
        position += length


class ZeroFiles:
    """The ZeRO-3 files of a local checkpoint, mapped into memory: what is not used is not read."""

    def __init__(self, directory: Path) -> None:
        """Find the files.

        Raises:
            CheckpointError: if files are missing, or were written by different numbers of workers.
        """
        self.directory = directory
        self._paths: dict[tuple[str, int], Path] = {}
        self._open: dict[tuple[str, int], Mapping[str, Any]] = {}
        for path in sorted((directory / ZERO3_TAG).glob("*.pt")):
            if match := SHARD_NAME.fullmatch(path.name):
                self._paths[match[2], int(match[1])] = path
        if ("model", 0) not in self._paths:
            raise CheckpointError(f"{directory / ZERO3_TAG} holds no ZeRO-3 shard of worker 0")
        self.world: int = self.model(0)["dp_world_size"]
        """Workers that wrote the checkpoint."""
        expected = {(kind, rank) for kind in ("model", "optim") for rank in range(self.world)}
        missing, foreign = sorted(expected - self._paths.keys()), sorted(self._paths.keys() - expected)
        if missing or foreign:
            names = [f"{kind} states of worker {rank} " for kind, rank in missing or foreign]
            raise CheckpointError(
                f"{directory / ZERO3_TAG} is not the whole checkpoint of {self.world} workers: "
                f"{', '.join(names[:5])}{'are missing' if missing else 'are too many'}"
            )

    def model(self, rank: int) -> Mapping[str, Any]:
        """Names, shapes, buffers and frozen parameters, as worker `rank` wrote them."""
        return self._load("model", rank)

    def optimizer(self, rank: int) -> Mapping[str, Any]:
        """Worker `rank`'s partitions of fp32 weights and optimizer state."""
        state: Mapping[str, Any] = self._load("optim", rank)["optimizer_state_dict"]
        return state

    def _load(self, kind: str, rank: int) -> Mapping[str, Any]:
        key = (kind, rank)
        if key not in self._open:
            path = self._paths[key]
            self._open[key] = load_shard(path)
        return self._open[key]


def load_shard(path: Path) -> Mapping[str, Any]:
    """One file of DeepSpeed, mapped into memory: tensors, plain values, and its own two plain classes; nothing runs.

    Raises:
        CheckpointError: if it is damaged, or holds anything else.
    """
    try:
        with torch.serialization.safe_globals(checkpoint_classes()):
            content: Mapping[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever foreign bytes raise
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            raise CheckpointError(
                f"{path} holds {foreign[1]}, which no checkpoint of a training holds; it was not loaded, since that "
                "could run code. Restore the file, or resume from an older checkpoint with --run.resume-step"
            ) from error
        raise CheckpointError(f"{path} is damaged: {str(error)[:300]}") from error
    return content


@dataclass(frozen=True)
class FlatOffset:
    """Where a parameter's partitions are in the shards of a world: in every worker's flat tensor of `sub_group`."""

    sub_group: int
    offset: int


@dataclass(frozen=True)
class Layout:
    """Which parameters the sub-groups of a world hold, in order, and which parameter group each sub-group is of."""

    world: int
    shapes: Sequence[Mapping[str, torch.Size]]
    """Per sub-group: parameter names to whole shapes."""
    group_of: Sequence[int]
    """Per sub-group: its parameter group."""

    def places(self) -> dict[str, FlatOffset]:
        """The place of every parameter."""
        places: dict[str, FlatOffset] = {}
        for sub_group, shapes in enumerate(self.shapes):
            offset = 0
            for name, shape in shapes.items():
                places[name] = FlatOffset(sub_group, offset)
                offset += partition_length(shape.numel(), self.world)
        return places

    def flat_length(self, sub_group: int) -> int:
        """Elements of a worker's flat tensor of `sub_group`."""
        return sum(partition_length(shape.numel(), self.world) for shape in self.shapes[sub_group].values())

    def groups(self) -> list[dict[str, torch.Size]]:
        """Per parameter group: parameter names to whole shapes."""
        groups: list[dict[str, torch.Size]] = [{} for _ in range(max(self.group_of, default=-1) + 1)]
        for group, shapes in zip(self.group_of, self.shapes, strict=True):
            groups[group].update(shapes)
        return groups

    def members(self, group: int) -> list[int]:
        """The sub-groups of a parameter group."""
        return [sub_group for sub_group, of in enumerate(self.group_of) if of == group]


def load_resharded(engine: Any, directory: Path) -> None:
    """Load a local checkpoint of any number of workers into a running ZeRO-3 engine, as a native resume would.

    Weights, both moments, step counters, every entry of every parameter group, frozen parameters, persistent buffers
    and DeepSpeed's own counters become those of the checkpoint. The checkpoint must be from between two optimizer
    steps. Every worker must call this; each reads little more than its own share.

    Args:
        engine: engine of the same model and parameter groups, with its optimizer's state in memory (no NVMe), before
            its first step.
        directory: the checkpoint, with `zero3/` in it.

    Raises:
        CheckpointError: if shards are missing or damaged, if parameter groups, names or shapes are others than the
            engine's, or if the old workers disagree about what they must have in common.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shards = ZeroFiles(directory)
    model = shards.model(0)
    own = engine_layout(engine)
    layout = Layout(world, own.sub_groups, own.group_of)
    old_layout = layout_of(shards)
    check_groups(old_layout.groups(), layout.groups(), directory)
    check_shapes("frozen parameters", model["frozen_param_shapes"], own.frozen, directory)
    state = optimizer_state(shards, old_layout, layout, rank)
    fragments = {name: frozen_partition(shards, name, shape.numel(), world, rank) for name, shape in own.frozen.items()}
    load_into_engine(engine, rank, state, common_buffers(shards), fragments, model)


def layout_of(shards: ZeroFiles) -> Layout:
    """The layout of a checkpoint.

    Raises:
        CheckpointError: if the flat tensors do not have the lengths that the parameters' shapes ask for.
    """
    optimizer = shards.optimizer(0)
    group_of = {
        sub_group: group
        for group, entries in enumerate(optimizer["optimizer_state_dict"]["param_groups"])
        for sub_group in entries["params"]
    }
    shapes = shards.model(0)["param_shapes"]
    if sorted(group_of) != list(range(len(shapes))):
        raise CheckpointError(f"{shards.directory} describes {len(shapes)} sub-groups, but holds {len(group_of)}")
    layout = Layout(shards.world, shapes, [group_of[sub_group] for sub_group in range(len(shapes))])
    for sub_group, flat in enumerate(optimizer["fp32_flat_groups"]):
        if flat.numel() != layout.flat_length(sub_group):
            raise CheckpointError(
                f"{shards.directory} holds {flat.numel()} elements of sub-group {sub_group} in worker 0's shard, "
                f"but the shapes of its parameters ask for {layout.flat_length(sub_group)}"
            )
    return layout


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


def whole_weights(shards: ZeroFiles) -> dict[str, Tensor]:
    """Every weight and persistent buffer of the model by name, put together from all workers' partitions.

    Trained weights and buffers as fp32, frozen ones in the format they were trained beside.

    Raises:
        CheckpointError: as `layout_of`.
    """
    layout, model = layout_of(shards), shards.model(0)
    reader = _OptimizerReader(shards, layout, Layout(1, layout.shapes, layout.group_of), rank=0)
    weights: dict[str, Tensor] = {}
    for name in model["buffer_names"]:
        buffer = model["module"][name]
        weights[name] = buffer.float() if buffer.is_floating_point() else buffer
    for name, shape in model["frozen_param_shapes"].items():
        weights[name] = frozen_partition(shards, name, shape.numel(), 1, 0).view(shape)
    for sub_group, shapes in enumerate(layout.shapes):
        parts = reader.weights(sub_group).split([shape.numel() for shape in shapes.values()])
        weights |= {name: part.view(shapes[name]).clone() for name, part in zip(shapes, parts, strict=True)}
    shared = {alias: name for alias, name in model["shared_params"].items() if name in weights}
    return weights | {alias: weights[name] for alias, name in shared.items()}


def frozen_partition(shards: ZeroFiles, name: str, numel: int, world: int, rank: int) -> Tensor:
    """Worker `rank`'s partition of frozen parameter `name` in a world of `world` workers; padding is zero."""
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
