"""The file by which an export is compared with the training model: what it was asked, said, kept, and consisted of.

It is written while the training model is there. A model that is made from a checkpoint's files, whoever makes it,
cannot prove that the files are right.

Content of the safetensors file:

    input_ids, attention_mask   (B, T)
    pixel_values                (M, 3, S, S) uint8
    logits                      (B, T, V) fp32
    kept.encode.NAME.BOUNDARY   (M, K) positions in the grid of an encoder that stayed
    kept.fuse                   (M, K) indices into the pool of all encoders' tokens that stayed
    weights.PRECISION           (P,) int64, `weight_sums` of the parameters rounded to a format
    metadata                    precision: of the weights and activations; parameters: their P names, as JSON; merged:
                                names of weights that are in no sum, since an export merges adapters into them

Files of versions before 2026-11-30 hold inputs and logits alone.

Legend: B samples, T tokens, M images of all samples in order, S image size, K tokens kept, V vocabulary, P parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from meteor_model.foreign import foreign, quoted
from meteor_model.replay import GivenTokens
from pipelines.checkpoint.state import CheckpointError
from pipelines.checkpoint.weight_sums import Precision, WeightSums

INPUTS = ("input_ids", "attention_mask", "pixel_values")
ENCODE, FUSE, WEIGHTS = "kept.encode.", "kept.fuse", "weights."


@dataclass(frozen=True)
class ParityBatch:
    """A batch and what a model made of it.

    Attributes:
        inputs: of its forward.
        logits: (B, T, V).
        kept: tokens that stages 1 and 2 kept; None where the model, or the version that wrote the file, tells of none.
        sums: of its weights, by the format that they are rounded to; empty in files of earlier versions.
        merged: weights that are in no sum, since adapters were trained beside them.
    """

    inputs: Mapping[str, Tensor]
    logits: Tensor
    kept: GivenTokens | None = None
    sums: Mapping[Precision, WeightSums] = field(default_factory=dict)
    merged: tuple[str, ...] = ()

    def save(self, path: Path, precision: Precision) -> None:
        """Write it; `precision` is that of the model."""
        tensors = dict(self.inputs)
        if self.kept is not None:
            tensors[FUSE] = self.kept.fuse
            for name, boundaries in self.kept.encode.items():
                tensors |= {f"{ENCODE}{name}.{number}": kept_MK for number, kept_MK in enumerate(boundaries)}
        names: list[str] = []
        for rounded_to, sums in self.sums.items():
            names = list(sums)
            tensors[WEIGHTS + rounded_to] = torch.tensor(list(sums.values()), dtype=torch.int64)
        metadata = {"precision": precision, "parameters": json.dumps(names), "merged": json.dumps(self.merged)}
        # Copied, since towers that keep all of theirs may share one tensor, which the format refuses under two names.
        own = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        save_file({**own, "logits": self.logits.float().cpu().contiguous()}, path, metadata=metadata)


def read_parity(path: Path) -> tuple[ParityBatch, Precision]:
    """What `ParityBatch.save` wrote, and the precision of the model.

    Raises:
        CheckpointError: a file that is damaged, or not written whole.
    """
    with foreign(lambda what: CheckpointError(f"{path} holds no parity batch: {what}"), (CheckpointError,)):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        if lacking := sorted({*INPUTS, "logits"} - set(tensors)):
            raise CheckpointError(f"{path} lacks {', '.join(lacking)}: the parity batch was not written whole")
        precision = metadata.get("precision", "fp32")
        if precision not in get_args(Precision):
            raise CheckpointError(f"{path} is of precision {quoted(precision)}, this code knows fp32 and bf16")
        inputs = {name: tensors[name] for name in INPUTS}
        names = json.loads(metadata.get("parameters", "[]"))
        sums: dict[Precision, WeightSums] = {
            rounded_to: dict(zip(names, tensors[WEIGHTS + rounded_to].tolist(), strict=True))
            for rounded_to in get_args(Precision)
            if WEIGHTS + rounded_to in tensors
        }
        merged = tuple(map(str, json.loads(metadata.get("merged", "[]"))))
        return ParityBatch(inputs, tensors["logits"], _kept(tensors), sums, merged), precision


def _kept(tensors: Mapping[str, Tensor]) -> GivenTokens | None:
    if FUSE not in tensors:
        return None
    boundaries: dict[str, dict[int, Tensor]] = {}
    for key, kept_MK in tensors.items():
        if key.startswith(ENCODE):
            name, _, number = key.removeprefix(ENCODE).rpartition(".")
            boundaries.setdefault(name, {})[int(number)] = kept_MK
    encode = {name: tuple(found[number] for number in sorted(found)) for name, found in boundaries.items()}
    return GivenTokens(encode, tensors[FUSE])
