"""Examples of unequal length as one batch of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from meteor_model.chat import IGNORE_INDEX


def collate(examples: Sequence[Mapping[str, Any]], pad_token_id: int, image_size: int) -> dict[str, torch.Tensor]:
    """Examples -> one right-padded training batch.

    Args:
        examples: mappings with `input_ids`, `labels` (sequences of int) and `images` (uint8 (n, 3, S, S), n >= 0).
        pad_token_id: id that fills `input_ids`.
        image_size: S, for a batch without any image.

    Returns:
        input_ids, attention_mask, labels (B, T) int64; pixel_values (M, 3, S, S) uint8, M >= 0 images in sample order.
    """
    input_ids, attention_mask = pad([example["input_ids"] for example in examples], pad_token_id, "right")
    labels, _ = pad([example["labels"] for example in examples], IGNORE_INDEX, "right")
    pixels = cat_images([example["images"] for example in examples], image_size)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "pixel_values": pixels}


def cat_images(images: Sequence[torch.Tensor], image_size: int) -> torch.Tensor:
    """The images of all samples in order, a copy of them, (M, 3, S, S) uint8, M >= 0."""
    some = [own.numpy() for own in images if len(own)]
    pixels_M3SS = torch.empty(sum(map(len, some)), 3, image_size, image_size, dtype=torch.uint8)
    if some:
        # By NumPy: torch copies with all of its threads, which wait for each other where the cores have other work.
        np.concatenate(some, out=pixels_M3SS.numpy())
    return pixels_M3SS


def pad(
    rows: Sequence[Sequence[int] | np.ndarray], value: int, side: str, length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids -> (B, T) int64 filled with `value`, and the attention mask; T: the longest row's by default."""
    length = length or max(len(row) for row in rows)
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        where = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        padded[index, where] = torch.as_tensor(np.asarray(row, dtype=np.int64))
        mask[index, where] = 1
    return padded, mask
