"""Packed rows: several samples in a row instead of padding, and several questions behind their image, which comes once.

Every token belongs to a document (a sample) and to a branch of it. Branch 0 is what all branches begin with, such as
the image; branches 1, 2, ... are what follows, such as one question and its answer each. Token i sees token j <= i
where both are of one document and j is of branch 0 or of i's own. Positions begin at 0 in every document, and each
branch goes on where branch 0 ends. So every token sees what it would see in a row of its own, at the same places: loss
and gradients are those of separate rows up to rounding. The model's side is `meteor_model/decoder/packed.py`.

Three steps, each of them pure:

    1. share    samples that begin alike become one document with branches (`share_beginning`)
    2. fit      documents are dealt to rows (`first_fit_decreasing`, `pack_evenly`)
    3. collate  rows become one batch for the model's forward (`collate_packed`)

Legend: B rows, T tokens of the longest row, M images of all rows in order, S travelling image size.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from meteor_model.chat import IGNORE_INDEX
from meteor_model.collate import cat_images, pad

PADDING = -1
"""In `document_ids`, where a row holds no token."""
TOLERANCE = 1.01
"""Places that shorter rows may take over the fewest."""


def share_beginning(examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples with the same images as one document: what they begin with once, then what is each one's own.

    Branch 0 is the longest common beginning in which nothing is learned. It ends a token before the first learned one,
    since a token is learned from the one before it, and leaves each sample a token of its own.

    Args:
        examples: mappings with `input_ids`, `labels` (sequences of int) and `images` (uint8 (n, 3, S, S)), which are
            the same in all of them and lie in the common beginning: the document has those of the first.

    Returns:
        `input_ids`, `labels`, `branch_ids` (int64 arrays of one length) and `images`.

    Raises:
        ValueError: without examples; where they have other numbers of images; where they begin with different tokens.
    """
    if not examples:
        raise ValueError("no samples are given that could share their beginning")
    counts = sorted({len(example["images"]) for example in examples})
    if len(counts) > 1:
        raise ValueError(f"samples that share their beginning have the same images; these have {counts}")
    ids = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
    labels = [np.asarray(example["labels"], dtype=np.int64) for example in examples]
    shared = _common_beginning(ids, labels)
    if shared < 1:
        raise ValueError(f"{len(examples)} samples begin with different tokens, or learn the first: nothing is shared")
    branches = [np.full(len(own) - shared, number, dtype=np.int64) for number, own in enumerate(ids, start=1)]
    return {
        "input_ids": np.concatenate([ids[0][:shared], *(own[shared:] for own in ids)]),
        "labels": np.concatenate([labels[0][:shared], *(own[shared:] for own in labels)]),
        "branch_ids": np.concatenate([np.zeros(shared, dtype=np.int64), *branches]),
        "images": examples[0]["images"],
    }


def _common_beginning(ids: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> int:
    """Tokens of the longest common beginning, after which the next token of no sample is learned."""
    end = min(len(own) for own in ids) - 1
    differs = np.logical_or.reduce([own[:end] != ids[0][:end] for own in ids])
    if differs.any():
        end = int(differs.argmax())
    learned = np.logical_or.reduce([own[: end + 1] != IGNORE_INDEX for own in labels])
    return int(learned.argmax()) - 1 if learned.any() else end


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Deal documents to rows: the longest first, each to the first row with room, a new one where none has.

    Never more than 11/9 of the fewest possible rows and 6/9 of one (Dósa 2007). A function of the lengths alone.

    Args:
        lengths: tokens of each document.
        capacity: tokens that a row may hold.

    Returns:
        the documents of each row, ascending; rows by their first document. Every document is in one row.

    Raises:
        ValueError: for a document that is longer than a row, naming it.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):  # stable: ties in their order
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"document {index} has {length} tokens, a packed row holds {capacity}")
        row = next((row for row, left in enumerate(room) if left >= length), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= length
    return sorted(sorted(row) for row in rows)


def pack_evenly(lengths: Sequence[int], capacity: int, groups: int) -> list[list[list[int]]]:
    """Deal documents to the rows of `groups` batches so that little is padded: a batch is as wide as its longest row.

    For every number of rows from the fewest that `first_fit_decreasing` needs to one a document, the longest document
    first goes to the emptiest row, and rows of like length share a batch. Of these, and first fit decreasing itself,
    the one with the fewest places counts; within `TOLERANCE` of it the most rows, since attention pays for a row's
    length twice. A function of the lengths alone.

    Args:
        lengths: tokens of each document.
        capacity: tokens that a row may hold.
        groups: batches; each gets as many rows, or the last ones fewer.

    Returns:
        for each batch its rows, each with its documents, ascending; the longest rows first. Batches may be empty.

    Raises:
        ValueError: for a document that is longer than a row, naming it.
    """
    fewest = first_fit_decreasing(lengths, capacity)
    found = [_grouped(fewest, lengths, groups)]
    for each in range(-(-len(fewest) // groups), -(-len(lengths) // groups) + 1):
        rows = _fill_evenly(lengths, min(each * groups, len(lengths)))
        if all(_tokens(row, lengths) <= capacity for row in rows):
            found.append(_grouped(rows, lengths, groups))
    places = [_places(batches, lengths) for batches in found]
    return next(found[index] for index in reversed(range(len(found))) if places[index] <= TOLERANCE * min(places))


def _grouped(rows: Sequence[list[int]], lengths: Sequence[int], groups: int) -> list[list[list[int]]]:
    each = -(-len(rows) // groups)
    ordered = sorted(rows, key=lambda row: (-_tokens(row, lengths), row))
    return [ordered[group * each : (group + 1) * each] for group in range(groups)]


def _places(batches: Sequence[Sequence[Sequence[int]]], lengths: Sequence[int]) -> int:
    """Tokens and padding of batches whose longest row comes first."""
    return sum(len(batch) * _tokens(batch[0], lengths) for batch in batches if batch)


def _fill_evenly(lengths: Sequence[int], count: int) -> list[list[int]]:
    """`count` rows, at most as many as documents: the longest first, each to the emptiest row."""
    rows: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, row) for row in range(count)]
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        tokens, row = heapq.heappop(emptiest)
        rows[row].append(index)
        heapq.heappush(emptiest, (tokens + lengths[index], row))
    return [sorted(row) for row in rows]


def _tokens(row: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[index] for index in row)


def collate_packed(
    rows: Sequence[Sequence[Mapping[str, Any]]], pad_token_id: int, image_size: int, length: int | None = None
) -> dict[str, torch.Tensor]:
    """Rows of documents -> one training batch, padded on the right.

    Args:
        rows: for each row its documents: mappings as `meteor_model.collate.collate` takes, with `branch_ids` where
            they have branches (`share_beginning`).
        pad_token_id: id that fills `input_ids`.
        image_size: S, for a batch without any image.
        length: T; by default the longest row's.

    Returns:
        input_ids, labels, document_ids (B, T) int64; branch_ids (B, T) int64 where a document has branches;
        pixel_values (M, 3, S, S) uint8, M >= 0 images in the order of rows and documents.

    Raises:
        ValueError: without rows, for an empty row, or for one that is longer than `length`.
    """
    if not rows or not all(rows):
        raise ValueError("a packed batch has at least one row, and every row at least one document")
    joined = [_join(row) for row in rows]
    longest = max(len(row["input_ids"]) for row in joined)
    if length is not None and longest > length:
        raise ValueError(f"a row of {longest} tokens does not fit into {length}")
    fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "document_ids": PADDING, "branch_ids": 0}
    if not any("branch_ids" in document for row in rows for document in row):
        del fill["branch_ids"]
    batch = {name: pad([row[name] for row in joined], value, "right", length)[0] for name, value in fill.items()}
    images = [document["images"] for row in rows for document in row]
    return {**batch, "pixel_values": cat_images(images, image_size)}


def _join(documents: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """One row: its documents behind one another, numbered from 0."""
    lengths = [len(document["input_ids"]) for document in documents]
    own = [
        np.asarray(document["branch_ids"], dtype=np.int64) if "branch_ids" in document else np.zeros(length, np.int64)
        for document, length in zip(documents, lengths, strict=True)
    ]
    return {
        "input_ids": np.concatenate([np.asarray(document["input_ids"], dtype=np.int64) for document in documents]),
        "labels": np.concatenate([np.asarray(document["labels"], dtype=np.int64) for document in documents]),
        "document_ids": np.repeat(np.arange(len(documents)), lengths),
        "branch_ids": np.concatenate(own),
    }
