"""From rows of the stream to batches of the model, and what a micro-batch counts.

A worker deals its samples of a step to micro-batches: as they come, by length, or packed, several in a row of a batch
(`meteor_model.packing`). Which samples a step trains does not hang on it, nor do its loss and its ledger.

A row (`pipelines.data.schema.Row`) with a `reason` takes part in no batch: VOID fills up the last step, any other
reason is a faulty sample, which is counted.

Legend: B samples, T tokens, M images of all samples in order, S image size.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray.data
import torch
from torch import Tensor

from meteor_model.chat import IGNORE_INDEX
from meteor_model.packing import pack_evenly
from pipelines.checkpoint.state import DroppedSample
from pipelines.config.settings import SettingsError
from pipelines.data.blocks import rows_from_table, table_of
from pipelines.data.sample_id import SampleId
from pipelines.data.schema import REASONS, Row

Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]
"""Examples (`input_ids`, `labels`, `images` uint8 (n, 3, S, S)) to a batch for the model's forward."""
CollatePacked = Callable[[Sequence[Sequence[Mapping[str, Any]]]], dict[str, Tensor]]
"""The same for rows of several examples each."""
T = TypeVar("T")


class StreamOrderError(ValueError):
    """The stream delivered other rows than the plan says; the message names both."""


@dataclass(frozen=True)
class MicroBatch:
    """What one worker runs through the model at a time."""

    inputs: dict[str, Tensor]
    """Arguments of the model's forward."""
    num_images: tuple[int, ...]
    """Images of each of the B samples."""
    supervised: int
    """Tokens that the loss counts."""
    lengths: tuple[int, ...]
    """Tokens of each sample, visual ones included; padding is in none."""
    cells: int
    """Places of the batch's B x T grid, padding included."""
    seen: int
    """Samples in the batch."""
    samples: tuple[SampleId, ...]
    """Which samples those are, in the order of the batch."""
    dropped: tuple[DroppedSample, ...]
    """Samples among the rows that train nothing: faulty ones, and those that are too long."""
    truncated: int
    """Samples in the batch of which a part was left out, because they are too long."""
    one_a_row: Callable[[], dict[str, Tensor]]
    """Makes the inputs of its first samples, one a row, as many as take no more places: of all unless it is packed."""

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Packing:
    """Samples share rows.

    Attributes:
        collate: rows of samples to a batch.
        capacity: tokens that a row may hold; no sample has more.
    """

    collate: CollatePacked
    capacity: int


def iterate_rows(share: ray.data.DataIterator, micro_batch: int) -> Iterator[Sequence[Row]]:
    """The rows of one worker's share of a stream, `micro_batch` at a time."""
    for block in share.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
        rows = rows_from_table(table_of(block))
        assert len(rows) == micro_batch, f"a block of {len(rows)} rows in a stream of micro-batches of {micro_batch}"
        yield rows


def first_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the first of which is fetched in a thread from now on; its error is raised where it is taken."""
    fetched: queue.SimpleQueue[T | BaseException | None] = queue.SimpleQueue()

    def fetch() -> None:
        try:
            fetched.put(next(items, None))
        except BaseException as error:
            fetched.put(error)

    threading.Thread(target=fetch, name="first batch", daemon=True).start()

    def taken() -> Iterator[T]:
        first = fetched.get()
        if isinstance(first, BaseException):
            raise first
        if first is not None:
            yield first
            yield from items

    return taken()


@dataclass(frozen=True)
class Share:
    """Which micro-batches of a stream belong to one worker.

    Number b, counted from where the stream starts, goes to worker b % world, whatever the world size.

    An optimizer step is `per_step` consecutive micro-batches. Where `world` does not divide them, some workers have one
    fewer in a step; they run an empty one in its place, so that all workers make the same number of forwards.
    """

    rank: int
    world: int
    per_step: int

    def __post_init__(self) -> None:
        if self.world > self.per_step:
            raise SettingsError(
                f"{self.world} workers share {self.per_step} micro-batches of a step, so some would have none: use at "
                f"most {self.per_step} workers, a smaller micro_batch, or a larger global_batch"
            )

    @property
    def forwards(self) -> int:
        """Micro-batches that every worker runs in a step, empty ones included."""
        return -(-self.per_step // self.world)

    def of_step(self, step: int) -> range:
        """Numbers of this worker's micro-batches in step `step`, counted from where the stream starts."""
        first, last = step * self.per_step, (step + 1) * self.per_step
        return range(first + (self.rank - first) % self.world, last, self.world)


@dataclass(frozen=True)
class BatchReader:
    """Makes the micro-batches of one worker, step by step, and checks their rows against the plan.

    Args:
        micro_batch: rows of a micro-batch in the stream, and at most as many samples in a batch.
        by_length: group the worker's samples of a step by their length, the longest first, instead of taking them as
            they come: less padding, and workers that wait less for each other. The set of a step stays the same.
        packing: deal them to rows that they share instead, with hardly any padding; None: one sample a row.
    """

    collate: Collate
    pad_token_id: int
    micro_batch: int
    share: Share
    by_length: bool = False
    packing: Packing | None = None

    def read(self, rows: Iterator[Sequence[Row]], first_row: int, stop_row: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each step from `rows`, this worker's part of a stream of rows [first_row, stop_row).

        Where the stream stops within a step, the rest of that step's micro-batches is empty.

        Raises:
            StreamOrderError: if the stream delivers other rows, or ends before `stop_row`.
        """
        total = (stop_row - first_row) // self.micro_batch
        for step in range(-(-total // self.share.per_step)):
            members: list[Row] = []
            for number in self.share.of_step(step):
                if number < total:
                    members += self._next(rows, first_row + number * self.micro_batch)
            yield self.batches(members)

    def _next(self, rows: Iterator[Sequence[Row]], expected: int) -> Sequence[Row]:
        who = f"worker {self.share.rank} of {self.share.world} expected rows {expected} to "
        who += str(expected + self.micro_batch - 1)
        part = next(rows, None)
        if part is None:
            raise StreamOrderError(f"{who}, and the data stream ended: it has fewer rows than the plan")
        found = [row.row for row in part]
        if found != list(range(expected, expected + self.micro_batch)):
            raise StreamOrderError(
                f"{who} and got {found}: the data stream and the checkpoint disagree, or the stream is out of order"
            )
        return part

    def batches(self, members: Sequence[Row]) -> list[MicroBatch]:
        """`share.forwards` micro-batches of the rows of a step, each row in one; the last ones may be empty."""
        if self.packing is not None:
            return pack_micro_batches(members, self.packing, self.share.forwards, self.collate, self.pad_token_id)
        if self.by_length:
            members = sorted(members, key=_length, reverse=True)  # stable: ties stay in the order of the plan
        cuts = [number * self.micro_batch for number in range(self.share.forwards)]
        return [
            make_micro_batch(members[cut : cut + self.micro_batch], self.collate, self.pad_token_id) for cut in cuts
        ]


def _length(row: Row) -> int:
    return len(row.input_ids) if row.usable else 0


def make_micro_batch(rows: Sequence[Row], collate: Collate, pad_token_id: int) -> MicroBatch:
    """Collate the rows that are samples; without any, a batch of one padding token that no loss counts."""
    inputs = collate([_example(row) for row in rows if row.usable] or [_empty_example(pad_token_id)])
    return _counted(rows, inputs, lambda: inputs)


def pack_micro_batches(
    members: Sequence[Row], packing: Packing, count: int, collate: Collate, pad_token_id: int
) -> list[MicroBatch]:
    """`count` micro-batches of the rows of a step, several samples in a row of a batch; the last ones may be empty.

    Rows that are no samples are counted by the first.
    """
    samples = [row for row in members if row.usable]
    others = [row for row in members if not row.usable]
    dealt = pack_evenly([len(row.input_ids) for row in samples], packing.capacity, count)
    batches = []
    for places in dealt:
        packed = [[samples[place] for place in row] for row in places]
        examples = [[_example(sample) for sample in row] for row in packed] or [[_empty_example(pad_token_id)]]
        inputs = packing.collate(examples)
        one_a_row = partial(_one_a_row, list(chain.from_iterable(examples)), inputs["input_ids"].numel(), collate)
        batches.append(_counted([*chain.from_iterable(packed), *others], inputs, one_a_row))
        others = []
    return batches


def _one_a_row(examples: Sequence[Mapping[str, Any]], cells: int, collate: Collate) -> dict[str, Tensor]:
    lengths = [len(example["input_ids"]) for example in examples]
    fits = [number * longest <= cells for number, longest in enumerate(accumulate(lengths, max), start=1)]
    return collate(examples[: max(1, sum(fits))])  # (once they fit no more, they never do)


def _counted(rows: Sequence[Row], inputs: dict[str, Tensor], one_a_row: Callable[[], dict[str, Tensor]]) -> MicroBatch:
    """A batch of the samples among `rows`, in their order, and what it counts."""
    samples = [row for row in rows if row.usable]
    return MicroBatch(
        inputs,
        num_images=tuple(row.num_images for row in samples) or (0,),
        supervised=sum(int((np.asarray(row.labels)[1:] != IGNORE_INDEX).sum()) for row in samples),
        lengths=tuple(len(row.input_ids) for row in samples),
        cells=inputs["input_ids"].numel() if samples else 0,
        seen=len(samples),
        samples=tuple(row.sample for row in samples),
        dropped=tuple(_dropped(row) for row in rows if not (row.usable or row.void)),
        truncated=sum(row.cut > 0 for row in samples),
        one_a_row=one_a_row,
    )


def _empty_example(pad_token_id: int) -> dict[str, Any]:
    return {"input_ids": [pad_token_id], "labels": [IGNORE_INDEX], "images": torch.empty(0, dtype=torch.uint8)}


def _example(row: Row) -> dict[str, Any]:
    images = torch.empty(0, dtype=torch.uint8)
    if row.num_images:
        # A view, which nothing writes to: the batch is a copy.
        flat = pa.Array.from_buffers(pa.uint8(), len(row.images), [None, pa.py_buffer(row.images)])
        images = torch.from_dlpack(flat).view(row.num_images, 3, row.image_size, row.image_size)
    return {"input_ids": row.input_ids, "labels": row.labels, "images": images}


def _dropped(row: Row) -> DroppedSample:
    if row.reason not in REASONS:
        raise AssertionError(f"row {row.row} has the unknown reason {row.reason!r}")
    return DroppedSample(row.row, row.sample, row.reason, row.detail)


@dataclass(frozen=True)
class Counts:
    """What several micro-batches count together."""

    supervised: int
    tokens: int
    cells: int
    seen: int
    truncated: int
    dropped: dict[str, int]
    votes: tuple[int, int] = (0, 0)
    """Of the workers about a preemption notice (`pipelines.recovery.preemption`)."""

    @classmethod
    def of(cls, batches: Sequence[MicroBatch], votes: tuple[int, int] = (0, 0)) -> "Counts":
        """The counts of `batches`."""
        reasons = [sample.reason for batch in batches for sample in batch.dropped]
        return cls(
            sum(batch.supervised for batch in batches),
            sum(batch.tokens for batch in batches),
            sum(batch.cells for batch in batches),
            sum(batch.seen for batch in batches),
            sum(batch.truncated for batch in batches),
            {reason: reasons.count(reason) for reason in REASONS},
            votes,
        )

    def summed_over_workers(self, device: torch.device) -> "Counts":
        """The sum over all workers, in one all-reduce; every worker must call it."""
        numbers = [self.supervised, self.tokens, self.cells, self.seen, self.truncated, *self.votes]
        numbers += [self.dropped[reason] for reason in REASONS]
        total = torch.tensor(numbers, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(total)
        supervised, tokens, cells, seen, truncated, signalled, due, *dropped = total.tolist()
        by_reason = dict(zip(REASONS, dropped, strict=True))
        return Counts(supervised, tokens, cells, seen, truncated, by_reason, (signalled, due))
