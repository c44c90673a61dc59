"""Every weight of a model, whole, out of the ZeRO-3 shards of a checkpoint and its start model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipelines.checkpoint.lora import plain_name
from pipelines.checkpoint.shards import ZeroFiles, layout_of, overlaps, require_start
from pipelines.checkpoint.start_weights import StartWeights
from pipelines.checkpoint.state import CheckpointError


class WholeWeights(Mapping[str, Tensor]):
    """Every weight and persistent buffer of the model by name, each put together when it is asked for.

    Trained weights and buffers as fp32; frozen ones as the start model holds them, or, where a checkpoint of an earlier
    version holds them, in the format they were trained beside.
    """

    def __init__(self, shards: ZeroFiles, init: Path) -> None:
        """Look at the shards; `init` is the folder of the start model, whose weights are needed if parts are frozen.

        Raises:
            CheckpointError: if shards are missing or damaged, or name frozen weights that the start model does not
                have.
        """
        self._shards = shards
        self._layout = layout_of(shards)
        self._places = self._layout.places()
        self._trained = {name: shape for shapes in self._layout.shapes for name, shape in shapes.items()}
        model = shards.model(0)
        self._buffers: list[str] = list(model["buffer_names"])
        here = {*self._buffers, *shards.frozen, *self._trained}
        self._aliases = {alias: name for alias, name in model["shared_params"].items() if name in here}
        self._start = _start_of(shards, init)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys((*self._buffers, *self._shards.frozen, *self._trained, *self._aliases))

    def __getitem__(self, name: str) -> Tensor:
        name = self._aliases.get(name, name)
        if name in self._trained:
            return self._trained_weight(name)
        if name in self._shards.frozen:
            return self._frozen_weight(name) if self._start is None else self._start_weight(name, self._start)
        if name in self._buffers:
            buffer: Tensor = self._shards.model(0)["module"][name]
            return buffer.float() if buffer.is_floating_point() else buffer
        raise KeyError(name)

    def _trained_weight(self, name: str) -> Tensor:
        place, shape = self._places[name], self._trained[name]
        flats = [
            self._shards.optimizer(rank)["fp32_flat_groups"][place.sub_group] for rank in range(self._shards.world)
        ]
        whole = torch.empty(shape.numel(), dtype=flats[0].dtype)
        for part in overlaps(shape.numel(), self._shards.world, 1, 0):
            begin = place.offset + part.source_start
            whole[part.target_start :][: part.length] = flats[part.source][begin:][: part.length]
        return whole.view(shape)

    def _frozen_weight(self, name: str) -> Tensor:
        shape = self._shards.frozen[name]
        parts = [self._shards.model(rank)["frozen_param_fragments"][name] for rank in range(self._shards.world)]
        return torch.cat(parts)[: shape.numel()].view(shape)

    def _start_weight(self, name: str, start: StartWeights) -> Tensor:
        aliases = (alias for alias, target in self._aliases.items() if target == name)
        names = [plain_name(one) for one in (name, *aliases)]
        stored = [one for one in names if one in start]
        if not stored or start.shape(stored[0]) != tuple(self._shards.frozen[name]):
            found = f"{stored[0]} with shape {start.shape(stored[0])}" if stored else f"none of {', '.join(names)}"
            raise CheckpointError(
                f"{self._shards.directory} leaves {name}, of shape {tuple(self._shards.frozen[name])}, to the start "
                f"model, but {start.directory} holds {found}"
            )
        return start.read(stored[0])


def _start_of(shards: ZeroFiles, init: Path) -> StartWeights | None:
    """The weights of the start model, where the checkpoint needs them."""
    if not shards.needs_start:
        return None
    start = StartWeights(init)
    require_start(shards, start.digest)
    return start
