"""The order of a training over several datasets: their streams merged into one, as pure index arithmetic.

1. A dataset of n samples and weight w gives round(n * w * epochs) samples, the head of its own stream (`StreamPlan`,
   with a seed of its own). Its epochs are passes of its own: a sample comes back only when all others have been there.
2. The streams are merged evenly: sample i of the m that a dataset gives has the key (2i + 1) / 2m; rows are sorted by
   it, ties by dataset.
3. Blocks of `BLOCK` rows are permuted, keyed by (seed, block), in which dataset each row comes from. The samples of one
   dataset stay in the order of its stream. So no dataset falls into step with the number of a worker.
4. After the last sample VOID rows fill the stream up to a whole optimizer step.

The share of a dataset in the first r rows differs from its share in the whole stream by at most
`BLOCK / 4 + datasets / 2 + 1` samples. Where row r lies in its dataset's stream follows from r by exact integers:
nothing behind it is visited.

Reading: a work item holds rows of all datasets, and fetches a dataset's window when its first row is due. A window
that an item's border cuts is fetched by both neighbours. An item is as long as `ITEM_WINDOWS` times a window of every
dataset together, so at most 1 / ITEM_WINDOWS of the samples are fetched twice (`read_amplification`). The windows of
all datasets last about equally many rows: one that is asked for rarely has smaller windows, of one shard at least.

Length legend: R rows asked for, D datasets.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import inf

import numpy as np
from numpy.typing import NDArray

from pipelines.data.ledger import Ledger
from pipelines.data.order import (
    StreamPlan,
    WholeSteps,
    WorkItem,
    permutation,
    require_range,
    require_rows,
    void_item,
)
from pipelines.data.sample_id import Int64s, SampleIds
from pipelines.io.fingerprint import sha256_bytes

BLOCK = 1024
ITEM_WINDOWS = 8
_BLOCKS = 2**64 - 1
"""In place of an epoch in the key of a permutation, so that no epoch's is the same."""
_MERGED_BLOCKS = 256
"""Blocks that are merged at a time: what is sorted stays small."""


@dataclass(frozen=True)
class Merge:
    """Which dataset each row comes from: steps 2 and 3.

    For datasets that give `quotas` samples and blocks of `block_rows`.
    """

    seed: int
    quotas: tuple[int, ...]
    block_rows: int

    @property
    def total(self) -> int:
        """Rows, without void ones."""
        return sum(self.quotas)

    def evenly(self, row: int) -> list[int]:
        """How many samples of each dataset are among the first `row` rows before blocks are permuted."""
        # A dataset's number of keys below x is within 1/2 of x * quota. So below the lower x there are fewer than `row`
        # keys of all, below the upper one more (or all keys), and O(D) lie between.
        margin = len(self.quotas) + 2
        counts, upper = self._below(2 * row - margin), self._below(2 * row + margin)
        between = [
            (self._key(sample, quota), dataset)
            for dataset, (quota, first, last) in enumerate(zip(self.quotas, counts, upper, strict=True))
            for sample in range(first, last)
        ]
        for _, dataset in sorted(between)[: row - sum(counts)]:
            counts[dataset] += 1
        return counts

    def _below(self, half_rows: int) -> list[int]:
        """Keys of each dataset below half_rows / (2 * total)."""
        return [min(quota, -(-max(0, half_rows) * quota // self.total) // 2) for quota in self.quotas]

    def _key(self, sample: int, quota: int) -> int:
        """The key (2i + 1) / 2m of a sample as an integer that compares like it."""
        return ((2 * sample + 1) << self._key_bits) // (2 * quota)

    @cached_property
    def _key_bits(self) -> int:
        """Two keys that differ do so by at least 1 / (4 m m'): with so many bits their integers differ as well."""
        return 2 * max(self.quotas).bit_length() + 2

    def _merged(self, first: Sequence[int], last: Sequence[int]) -> Int64s:
        """The dataset of each row between two borders that `evenly` gave, in even order, (R,)."""
        lengths = np.subtract(last, first)
        datasets = np.repeat(np.arange(len(lengths)), lengths)
        samples = np.arange(len(datasets)) + np.repeat(np.asarray(first) - np.cumsum(lengths) + lengths, lengths)
        above, below = 2 * samples + 1, 2 * np.asarray(self.quotas)[datasets]
        keys = above / below
        order = np.argsort(keys, kind="stable")  # a float is never out of order; equal keys stay in that of datasets
        # Of fractions that are one and the same float, the difference of the products is far below 2**63: it is right
        # although the products may not be.
        keys, above, below = keys[order], above[order], below[order]
        same = keys[1:] == keys[:-1]
        unequal = same & (above[1:] * below[:-1] != above[:-1] * below[1:])
        if unequal.any():
            runs = np.concatenate([[0], np.cumsum(~same)])
            for run in np.unique(runs[1:][unequal]):
                part = slice(*np.searchsorted(runs, [run, run + 1]))
                exact = map(Fraction, above[part].tolist(), below[part].tolist())
                order[part] = [at for _, at in sorted(zip(exact, order[part].tolist(), strict=True))]
        return datasets[order]

    def block(self, number: int) -> tuple[list[int], Int64s]:
        """Samples of each dataset before a block, and the dataset of each row in it."""
        first = self.evenly(number * self.block_rows)
        last = self.evenly(min(self.total, (number + 1) * self.block_rows))
        datasets = np.repeat(np.arange(len(self.quotas)), np.subtract(last, first))
        return first, datasets[permutation(self.seed, _BLOCKS, number, len(datasets))]

    def _blocks(self, number: int, stop: int) -> Int64s:
        """The dataset of each row of the blocks [number, stop), (R,)."""
        borders = (min(self.total, block * self.block_rows) for block in (number, stop))
        datasets = self._merged(*map(self.evenly, borders))
        for block, start in enumerate(range(0, len(datasets), self.block_rows), start=number):
            inside = np.sort(datasets[start : start + self.block_rows])
            datasets[start : start + self.block_rows] = inside[permutation(self.seed, _BLOCKS, block, len(inside))]
        return datasets

    def positions(self, row: int) -> list[int]:
        """How many samples of each dataset are among the first `row` rows."""
        number, inside = divmod(row, self.block_rows)
        if not inside or row == self.total:
            return self.evenly(row)
        first, datasets = self.block(number)
        return np.add(first, np.bincount(datasets[:inside], minlength=len(first))).tolist()

    def datasets(self, first_row: int, rows: int) -> Iterator[Int64s]:
        """The dataset of each of `rows` consecutive rows, some blocks at a time: the first rows are there at once."""
        row, end = first_row, first_row + rows
        while row < end:
            number, inside = divmod(row, self.block_rows)
            stop = min(number + _MERGED_BLOCKS, -(-end // self.block_rows))
            piece = self._blocks(number, stop)[inside : end - number * self.block_rows]
            yield piece
            row += len(piece)


@dataclass(frozen=True, slots=True)
class MixedItem:
    """Rows [first_row, first_row + rows) of a mixture.

    `parts` are the windows that they come from, by dataset and in the order of its stream; the first rows of the parts
    count in that stream. It needs nothing else to be read.
    """

    merge: Merge
    first_row: int
    rows: int
    parts: tuple[WorkItem, ...]

    @property
    def is_void(self) -> bool:
        """Whether these rows only fill up the last step."""
        return False

    def datasets(self) -> Iterator[Int64s]:
        """Dataset of every row in order, in pieces (n,)."""
        return self.merge.datasets(self.first_row, self.rows)

    def sample_ids(self) -> SampleIds:
        """Dataset, epoch, shard and index of every row of the item, in order."""
        found = SampleIds.void(self.rows)
        parts = [part.sample_ids() for part in self.parts]
        narrow = np.min_scalar_type(len(self.merge.quotas))  # NumPy sorts 8 and 16 bits in linear time
        datasets = np.concatenate([piece.astype(narrow) for piece in self.datasets()])
        order = np.argsort(datasets, kind="stable")  # by dataset, as the parts are
        for target, *sources in zip(found.columns, *(part.columns for part in parts), strict=True):
            target[order] = np.concatenate(sources)
        return found


@dataclass(frozen=True, init=False, eq=False)
class MixturePlan(WholeSteps):
    """The order over the splits of several datasets, from the samples of their shards, in manifest order.

    `weights` are passes of each dataset in one of the `epochs`: 2 takes every sample twice, 0.5 half of them, the other
    half in the next epoch. `window_shards` is what the dataset gets whose shards are used up fastest; the others get
    fewer. With one dataset of weight 1 the rows are those of StreamPlan.

    Raises ValueError naming the setting when one is out of range, or the dataset that would give no sample.
    """

    sizes: tuple[Int64s, ...]
    weights: tuple[float, ...]
    seed: int
    epochs: int
    global_batch: int
    streams: tuple[StreamPlan, ...]
    merge: Merge
    item_rows: int

    def __init__(
        self,
        sizes: Sequence[Sequence[int] | Int64s],
        weights: Sequence[float],
        seed: int,
        epochs: int,
        global_batch: int,
        window_shards: int,
    ) -> None:
        if not sizes or len(sizes) != len(weights):
            raise ValueError(f"{len(sizes)} datasets have {len(weights)} weights")
        # One stream of one epoch each: it checks the settings and says how many samples there are.
        ones = [StreamPlan(of_dataset, seed, epochs, global_batch, window_shards) for of_dataset in sizes]
        samples = [one.epoch_samples for one in ones]
        quotas = [_quota(number, samples[number], weight, epochs) for number, weight in enumerate(weights)]
        filled = [int((one.shard_samples > 0).sum()) for one in ones]
        rates = [Fraction(quota * shards, n) for quota, shards, n in zip(quotas, filled, samples, strict=True)]
        windows = [max(1, round(window_shards * rate / max(rates))) for rate in rates]
        streams = [
            StreamPlan(ones[d].shard_samples, _seed(seed, d), -(-quotas[d] // samples[d]), 1, windows[d], dataset=d)
            for d in range(len(ones))
        ]
        largest = sum(
            int(np.sort(one.shard_samples)[-window:].sum()) for one, window in zip(ones, windows, strict=True)
        )
        values = (
            tuple(one.shard_samples for one in ones),
            tuple(weights),
            seed,
            epochs,
            global_batch,
            tuple(streams),
            Merge(seed, tuple(quotas), BLOCK),
            -(-ITEM_WINDOWS * largest // BLOCK) * BLOCK,
        )
        for name, value in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, name, value)

    @property
    def quotas(self) -> tuple[int, ...]:
        """Samples that each dataset gives, over all epochs."""
        return self.merge.quotas

    @property
    def total_samples(self) -> int:
        """Samples of all epochs together; also the first void row."""
        return self.merge.total

    def locate(self, rows: NDArray[np.integer]) -> SampleIds:
        """Where any rows (R,) come from, in any order. Cost: one permutation per block and window touched.

        Raises ValueError naming the first row outside [0, total_rows).
        """
        rows = require_rows(rows, self.total_rows)
        found = SampleIds.void(len(rows))
        datasets, positions = np.full(len(rows), -1), np.zeros(len(rows), dtype=np.int64)
        block_rows = self.merge.block_rows
        blocks = np.where(rows < self.total_samples, rows // block_rows, -1)
        for number in np.unique(blocks[blocks >= 0]).tolist():
            first, of_row = self.merge.block(number)
            order = np.argsort(of_row, kind="stable")
            starts = np.searchsorted(of_row[order], np.arange(len(first)))
            position = np.empty(len(of_row), dtype=np.int64)
            position[order] = np.arange(len(of_row)) + (np.asarray(first) - starts)[of_row[order]]
            where = np.flatnonzero(blocks == number)
            inside = rows[where] - number * block_rows
            datasets[where], positions[where] = of_row[inside], position[inside]
        for stream in self.streams:
            where = np.flatnonzero(datasets == stream.dataset)
            of_stream = stream.locate(positions[where])
            for target, source in zip(found.columns, of_stream.columns, strict=True):
                target[where] = source
        return found

    def work(self, start_row: int, stop_row: int | None = None) -> Iterator["Item"]:
        """The items that hold rows [start_row, stop_row) in order, then the void tail.

        Starts at once, whatever lies before `start_row`; items end at fixed rows. Raises ValueError for rows outside
        the stream.
        """
        stop = self.total_rows if stop_row is None else stop_row
        require_range(start_row, stop, self.total_rows)
        return self._work(start_row, stop)

    def _work(self, start: int, stop: int) -> Iterator["Item"]:
        row, last = start, min(stop, self.total_samples)
        if len(self.streams) == 1 and row < last:  # no other dataset cuts its windows
            yield from self.streams[0].work(row, last)
            row = last
        positions = self.merge.positions(min(row, last))
        while row < last:
            border = min(last, (row // self.item_rows + 1) * self.item_rows)
            following = self.merge.positions(border)
            cuts = zip(self.streams, positions, following, strict=True)
            parts = tuple(part for stream, lo, hi in cuts for part in stream.work(lo, hi))
            yield MixedItem(self.merge, row, border - row, parts)
            row, positions = border, following
        if row < stop:
            yield void_item(stop - row, row)

    def consumed(self, rows: int) -> Ledger:
        """The samples of the first `rows` rows, at a cost that grows with the shards alone.

        Raises ValueError for rows outside the stream.
        """
        require_range(0, rows, self.total_rows)
        ledger = Ledger(self.sizes)
        positions = self.merge.positions(min(rows, self.total_samples))
        for stream, samples in zip(self.streams, positions, strict=True):
            stream.add_consumed(ledger, samples)
        return ledger


Plan = StreamPlan | MixturePlan
"""An order of rows, and what can be asked of it."""
Item = WorkItem | MixedItem
"""Consecutive rows that one task reads."""


def make_plan(
    sizes: Sequence[Sequence[int] | Int64s],
    weights: Sequence[float],
    seed: int,
    epochs: int,
    global_batch: int,
    window_shards: int,
) -> Plan:
    """The order over datasets whose shards have `sizes[dataset][shard]` samples.

    Raises ValueError naming the setting that is out of range.
    """
    if len(sizes) == 1 and list(weights) == [1.0]:
        return StreamPlan(sizes[0], seed, epochs, global_batch, window_shards)
    return MixturePlan(sizes, weights, seed, epochs, global_batch, window_shards)


def read_amplification(items: Iterable[Item]) -> float:
    """Samples that are fetched for these items over samples that they hold: 1 if none is fetched twice or in vain."""
    fetched, used = 0, 0
    for item in items:
        fetched += sum(sum(part.samples) for part in item.parts)
        used += 0 if item.is_void else item.rows
    return fetched / used


def _quota(dataset: int, samples: int, weight: float, epochs: int) -> int:
    if not 0 < weight < inf:
        raise ValueError(f"the weight of dataset {dataset} is {weight}; it must be above 0")
    quota = round(Fraction(str(weight)) * samples * epochs)  # the decimal number that was written, not its float
    if not quota:
        raise ValueError(
            f"dataset {dataset} gives no sample: {samples} samples * weight {weight} * {epochs} epochs rounds to 0; "
            "raise its weight or leave it out"
        )
    return quota


def _seed(seed: int, dataset: int) -> int:
    """The seed of a dataset's stream: that of the mixture for the first one."""
    if not dataset:
        return seed
    return int.from_bytes(sha256_bytes(f"{seed}/{dataset}".encode())[:8], "little") >> 1
