"""From rows of the stream to batches of the model, and what a micro-batch counts.

A row is one sample of the plan: `row`, `epoch`, `shard`, `index`, `key`, `reason`, `detail`, `input_ids`, `labels`,
`images` (bytes) and `num_images`. A row with a `reason` takes part in no batch: "void" fills up the last step, any
other reason is a faulty sample, which is counted.

Legend: B samples, T tokens, M images of all samples in order, S image size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
import torch
from torch import Tensor

from meteor_model.chat import IGNORE_INDEX
from pipelines.checkpoint import DroppedSample
from pipelines.schema import REASONS, VOID

Row = Mapping[str, Any]
Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""Examples (`input_ids`, `labels`, `images` uint8 (n, 3, S, S)) to a batch for the model's forward."""


class StreamOrderError(ValueError):
    """The stream delivered other rows than the plan says; the message names both."""


@dataclass(frozen=True, slots=True)
class SampleId:
    """Which sample a row holds: dataset of the mixture, epoch, shard of the split, index in the shard, and its key."""

    dataset: int
    epoch: int
    shard: int
    index: int
    key: str


@dataclass(frozen=True)
class MicroBatch:
    """What one worker runs through the model at a time."""

    inputs: dict[str, Tensor]
    """Arguments of the model's forward."""
    num_images: tuple[int, ...]
    """Images of each of the B samples."""
    supervised: int
    """Tokens that the loss counts."""
    tokens: int
    """Tokens that are no padding, visual ones included."""
    seen: int
    """Samples in the batch."""
    samples: tuple[SampleId, ...]
    """Which samples those are, in the order of the batch."""
    dropped: tuple[DroppedSample, ...]
    """Faulty samples among the rows."""


def iterate_rows(share: ray.data.DataIterator, micro_batch: int) -> Iterator[Sequence[Row]]:
    """The rows of one worker's share of a stream, `micro_batch` at a time."""
    for table in share.iter_batches(batch_size=micro_batch, batch_format="pyarrow", prefetch_batches=2):
        yield table.to_pylist()


@dataclass(frozen=True)
class BatchReader:
    """Makes the micro-batches of one worker, and checks their rows against the plan: number j of all workers' is rows
    [first_row + j * micro_batch, ...), and goes to worker j % world."""

    collate: Collate
    pad_token_id: int
    micro_batch: int
    rank: int
    world: int

    def read(self, rows: Iterator[Sequence[Row]], first_row: int) -> Iterator[MicroBatch]:
        """The micro-batches of `rows`, a stream that starts at `first_row` for worker 0.

        Raises:
            StreamOrderError: if the stream delivers other rows.
        """
        expected = first_row + self.rank * self.micro_batch
        for members in rows:
            found = [int(row["row"]) for row in members]
            if found != list(range(expected, expected + self.micro_batch)):
                raise StreamOrderError(
                    f"worker {self.rank} of {self.world} expected rows {expected} to {expected + self.micro_batch - 1} "
                    f"and got {found}: the data stream and the checkpoint disagree, or the stream is out of order"
                )
            expected += self.micro_batch * self.world
            yield make_micro_batch(members, self.collate, self.pad_token_id)


def make_micro_batch(rows: Sequence[Row], collate: Collate, pad_token_id: int) -> MicroBatch:
    """Collate the rows that are samples; without any, a batch of one padding token that no loss counts."""
    samples = [row for row in rows if not row["reason"]]
    dropped = tuple(_dropped(row) for row in rows if row["reason"] not in ("", VOID))
    supervised = sum(int((np.asarray(row["labels"])[1:] != IGNORE_INDEX).sum()) for row in samples)
    tokens = sum(len(row["input_ids"]) for row in samples)
    examples = [_example(row) for row in samples] or [_empty_example(pad_token_id)]
    num_images = tuple(len(example["images"]) for example in examples)
    ids = tuple(_sample_id(row) for row in samples)
    return MicroBatch(collate(examples), num_images, supervised, tokens, len(samples), ids, dropped)


def _sample_id(row: Row) -> SampleId:
    return SampleId(
        int(row.get("dataset", 0)), int(row["epoch"]), int(row["shard"]), int(row["index"]), str(row["key"])
    )


def _empty_example(pad_token_id: int) -> dict[str, Any]:
    return {"input_ids": [pad_token_id], "labels": [IGNORE_INDEX], "images": torch.empty(0, dtype=torch.uint8)}


def _example(row: Row) -> dict[str, Any]:
    count = int(row["num_images"])
    images = torch.empty(0, dtype=torch.uint8)
    if count:
        flat = torch.frombuffer(bytearray(row["images"]), dtype=torch.uint8)
        size = int((flat.numel() // (3 * count)) ** 0.5)
        images = flat.view(count, 3, size, size)
    return {"input_ids": row["input_ids"], "labels": row["labels"], "images": images}


def _dropped(row: Row) -> DroppedSample:
    if row["reason"] not in REASONS:
        raise AssertionError(f"row {row['row']} has the unknown reason {row['reason']!r}")
    return DroppedSample(
        row=int(row["row"]),
        epoch=int(row["epoch"]),
        shard=int(row["shard"]),
        index=int(row["index"]),
        key=str(row["key"]),
        reason=str(row["reason"]),
        detail=str(row["detail"]),
    )


@dataclass(frozen=True)
class Counts:
    """What several micro-batches count together."""

    supervised: int
    tokens: int
    seen: int
    dropped: dict[str, int]

    @classmethod
    def of(cls, batches: Sequence[MicroBatch]) -> "Counts":
        """The counts of `batches`."""
        reasons = [sample.reason for batch in batches for sample in batch.dropped]
        return cls(
            sum(batch.supervised for batch in batches),
            sum(batch.tokens for batch in batches),
            sum(batch.seen for batch in batches),
            {reason: reasons.count(reason) for reason in REASONS},
        )

    def summed_over_workers(self, device: torch.device) -> "Counts":
        """The sum over all workers, in one all-reduce; every worker must call it."""
        numbers = [self.supervised, self.tokens, self.seen, *(self.dropped[reason] for reason in REASONS)]
        total = torch.tensor(numbers, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(total)
        supervised, tokens, seen, *dropped = total.tolist()
        return Counts(supervised, tokens, seen, dict(zip(REASONS, dropped, strict=True)))
