"""The ZeRO-3 shards of a checkpoint: written without what is frozen, read by the elements that a reader wants.

DeepSpeed's shards say which elements of which parameter they hold. At world size W, a parameter of n elements,
flattened, is cut into W partitions of ceil(n / W) elements, the last of them padded. A sub-group is a list of
parameters of one parameter group; a worker's partitions of them, one after another, are one flat tensor. Which
parameters a sub-group has depends on W.

Frozen parameters are those of the start model for ever, so they are not written: the shards name the weight files that
hold them by digest (`pipelines.checkpoint.start_weights`). Shards of earlier versions hold them; they are read as ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.checkpoint.state import ZERO3_TAG, CheckpointError
from pipelines.compat.deepspeed import checkpoint_classes, engine_layout

SHARD_NAME = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(model|optim)_states\.pt")
FROZEN_KEY = "frozen_in_start"
"""Of a worker's model states: what is not in the checkpoint."""
LORA_KEY = "lora_scale"


def save_shards(engine: Any, folder: Path, start: str, lora_scale: float | None = None) -> None:
    """Write a worker's shards to a local folder; every worker must call this.

    Args:
        engine: DeepSpeed's.
        folder: of the checkpoint.
        start: digest of the weight files that the engine's frozen parameters were loaded from.
        lora_scale: what the adapters' products are multiplied by; None without adapters.
    """
    frozen = {"start": start, "shapes": dict(engine_layout(engine).frozen)}
    own = {FROZEN_KEY: frozen, LORA_KEY: lora_scale}
    engine.save_checkpoint(
        str(folder), tag=ZERO3_TAG, client_state=own, save_latest=False, exclude_frozen_parameters=True
    )


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
        """Names, shapes, buffers and, of earlier versions, frozen parameters, as worker `rank` wrote them."""
        return self._load("model", rank)

    @property
    def start(self) -> str | None:
        """Digest of the weight files that hold the frozen parameters; None where the shards hold them."""
        return self.model(0)[FROZEN_KEY]["start"] if FROZEN_KEY in self.model(0) else None

    @property
    def frozen(self) -> Mapping[str, torch.Size]:
        """Frozen parameters, wherever they are: names to whole shapes."""
        model = self.model(0)
        shapes: Mapping[str, torch.Size] = (
            model["frozen_param_shapes"] if self.start is None else model[FROZEN_KEY]["shapes"]
        )
        return shapes

    @property
    def lora_scale(self) -> float | None:
        """What the adapters' products are multiplied by; None without adapters."""
        scale: float | None = self.model(0).get(LORA_KEY)
        return scale

    @property
    def needs_start(self) -> bool:
        """Whether the start model's weights are a part of the checkpoint."""
        return self.start is not None and bool(self.frozen)

    def optimizer(self, rank: int) -> Mapping[str, Any]:
        """Worker `rank`'s partitions of fp32 weights and optimizer state."""
        state: Mapping[str, Any] = self._load("optim", rank)["optimizer_state_dict"]
        return state

    def unmap(self) -> None:
        """Let go of what is mapped and not in use; it is mapped again when it is asked for."""
        self._open.clear()

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


def require_start(shards: ZeroFiles, digest: str) -> None:
    """Refuse weight files other than those that a checkpoint leaves its frozen parameters to.

    Args:
        shards: of the checkpoint.
        digest: of the weight files at hand (`StartWeights.digest`).

    Raises:
        CheckpointError: naming both.
    """
    if shards.needs_start and shards.start != digest:
        raise CheckpointError(
            f"{shards.directory} leaves {len(shards.frozen)} frozen parameters to the start model "
            f"{str(shards.start)[:12]}, but the run's init/ holds {digest[:12]}: restore init/ as it was when the run "
            "began"
        )
