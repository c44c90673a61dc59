"""The order of a training over one dataset as pure index arithmetic: which sample is row r of the stream.

All epochs are one finite stream of rows (`pipelines.data.mixture` merges the streams of several datasets into one):

1. epoch e permutes the shards, keyed by (seed, e);
2. the permuted shards are cut into windows of `window_shards`, the last one possibly shorter;
3. the samples of a window, all its shards together, are permuted, keyed by (seed, e, window);
4. after the last epoch VOID rows (epoch -1) fill the stream up to a whole optimizer step.

Optimizer step g is rows [g * global_batch, (g + 1) * global_batch), whatever the number of workers; inside it
micro-batch j goes to worker j % world. So a count of rows is the whole position of a training, and a resume computes
its first row directly: nothing behind it is visited.

The permutations are argsorts of raw Philox bits, which NumPy keeps stable over its versions (its `permutation` it does
not), on every platform. 64-bit keys collide once in 2**64 / n**2; a collision is resolved by index.

Length legend: S shards, W windows of an epoch, R rows asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from pipelines.data.ledger import Ledger
from pipelines.data.sample_id import VOID_EPOCH, Int64s, SampleIds


@dataclass(frozen=True, slots=True)
class WorkItem:
    """Rows [first_row, first_row + hi - lo) of the stream: positions [lo, hi) in the order of one window.

    It carries the seed and its shards' sizes, so a reader on another machine needs nothing else. The void tail is an
    item of its own: dataset, epoch and window -1, no shards.
    """

    dataset: int
    seed: int
    epoch: int
    window: int
    shards: tuple[int, ...]
    samples: tuple[int, ...]
    lo: int
    hi: int
    first_row: int

    @property
    def rows(self) -> int:
        """Number of rows of this item."""
        return self.hi - self.lo

    @property
    def is_void(self) -> bool:
        """Whether these rows only fill up the last step."""
        return self.epoch == VOID_EPOCH

    @property
    def parts(self) -> "tuple[WorkItem, ...]":
        """The windows to fetch, in the order in which rows need them."""
        return () if self.is_void else (self,)

    def datasets(self) -> Iterator[Int64s]:
        """Dataset of every row in order, in pieces (n,)."""
        yield np.full(self.rows, self.dataset, dtype=np.int64)

    def sample_ids(self) -> SampleIds:
        """Dataset, epoch, shard and index of every row of the item, in order."""
        if self.is_void:
            return SampleIds.void(self.rows)
        order = window_order(self.seed, self.epoch, self.window, sum(self.samples))[self.lo : self.hi]
        slots, indices = _split_positions(np.asarray(self.samples, dtype=np.int64), order)
        epochs = np.full(self.rows, self.epoch, dtype=np.int64)
        return SampleIds(
            np.full_like(epochs, self.dataset), epochs, np.asarray(self.shards, dtype=np.int64)[slots], indices
        )


def void_item(rows: int, first_row: int) -> WorkItem:
    """Rows that hold no sample."""
    return WorkItem(VOID_EPOCH, 0, VOID_EPOCH, VOID_EPOCH, (), (), 0, rows, first_row)


@dataclass(frozen=True, eq=False)
class _Epoch:
    """One epoch's shard order (S,) and the position in the epoch where each window starts (W + 1,)."""

    shards: Int64s
    starts: Int64s


class WholeSteps(ABC):
    """Samples of a stream, filled up with void rows to whole optimizer steps."""

    global_batch: int

    @property
    @abstractmethod
    def total_samples(self) -> int:
        """Samples of all epochs together; also the first void row."""

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one may hold void rows."""
        return -(-self.total_samples // self.global_batch)

    @property
    def total_rows(self) -> int:
        """Rows of the stream, void ones included: steps * global_batch."""
        return self.steps * self.global_batch


@dataclass(frozen=True, init=False, eq=False)
class StreamPlan(WholeSteps):
    """The order of all epochs over one split, from the samples of its shards, in manifest order.

    `dataset` is the number that its rows carry.

    Raises ValueError naming the setting when one is out of range, or when there is no sample at all.
    """

    shard_samples: Int64s
    seed: int
    epochs: int
    global_batch: int
    window_shards: int
    dataset: int

    def __init__(
        self,
        shard_samples: Sequence[int] | Int64s,
        seed: int,
        epochs: int,
        global_batch: int,
        window_shards: int,
        dataset: int = 0,
    ) -> None:
        sizes = np.array(shard_samples, dtype=np.int64)
        sizes.flags.writeable = False
        if sizes.ndim != 1 or (sizes < 0).any():
            raise ValueError("shard_samples must be a flat list of counts, none of them negative")
        if not sizes.sum():
            raise ValueError(f"{len(sizes)} shards without a single sample: there is nothing to train on")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**63")
        for name, value in (("epochs", epochs), ("global_batch", global_batch), ("window_shards", window_shards)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        values = (sizes, seed, epochs, global_batch, window_shards, dataset)
        for name, setting in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, name, setting)

    @property
    def sizes(self) -> tuple[Int64s, ...]:
        """Samples of every shard, by dataset."""
        return (self.shard_samples,)

    @property
    def epoch_samples(self) -> int:
        """Samples of one epoch."""
        return int(self.shard_samples.sum())

    @property
    def total_samples(self) -> int:
        """Samples of all epochs together; also the first void row."""
        return self.epoch_samples * self.epochs

    def locate(self, rows: NDArray[np.integer]) -> SampleIds:
        """Where any rows (R,) come from, in any order. Cost: one permutation per window touched.

        Raises ValueError naming the first row outside [0, total_rows).
        """
        rows = require_rows(rows, self.total_rows)
        found = SampleIds.void(len(rows))
        epochs, positions = np.divmod(rows, self.epoch_samples)
        for epoch in np.unique(epochs[rows < self.total_samples]).tolist():
            in_epoch = np.flatnonzero(epochs == epoch)
            starts = self._layout(epoch).starts
            windows = np.searchsorted(starts, positions[in_epoch], side="right") - 1
            for window in np.unique(windows).tolist():
                where = in_epoch[windows == window]
                item = self._item(epoch, window, 0, int(starts[window + 1] - starts[window]))
                chosen = positions[where] - starts[window]
                for target, source in zip(found.columns, item.sample_ids().columns, strict=True):
                    target[where] = source[chosen]
        return found

    def work(self, start_row: int, stop_row: int | None = None) -> Iterator[WorkItem]:
        """The items that hold rows [start_row, stop_row) in order: one a window, then the void tail.

        Starts at once, whatever lies before `start_row`. Raises ValueError for rows outside the stream.
        """
        stop = self.total_rows if stop_row is None else stop_row
        require_range(start_row, stop, self.total_rows)
        return self._work(start_row, stop)

    def consumed(self, rows: int) -> Ledger:
        """The samples of the first `rows` rows, at a cost that grows with the shards alone.

        Raises ValueError for rows outside the stream.
        """
        require_range(0, rows, self.total_rows)
        ledger = Ledger(self.sizes)
        self.add_consumed(ledger, min(rows, self.total_samples))
        return ledger

    def add_consumed(self, ledger: Ledger, samples: int) -> None:
        """Add the first `samples` samples of this order to a ledger in which this dataset has none yet."""
        epochs, position = divmod(samples, self.epoch_samples)
        for epoch in range(epochs):
            ledger.add_shards(self.dataset, epoch, np.arange(len(self.shard_samples)))
        if position:
            layout = self._layout(epochs)
            window = int(np.searchsorted(layout.starts, position, side="right")) - 1
            ledger.add_shards(self.dataset, epochs, layout.shards[: window * self.window_shards])
            item = self._item(epochs, window, 0, position - int(layout.starts[window]))
            ledger.add(item.sample_ids())

    def _work(self, start: int, stop: int) -> Iterator[WorkItem]:
        row, last_sample = start, min(stop, self.total_samples)
        while row < last_sample:
            epoch, position = divmod(row, self.epoch_samples)
            starts = self._layout(epoch).starts
            for window in range(int(np.searchsorted(starts, position, side="right")) - 1, len(starts) - 1):
                base = epoch * self.epoch_samples + int(starts[window])
                lo, hi = row - base, min(int(starts[window + 1] - starts[window]), last_sample - base)
                if lo < hi:
                    yield self._item(epoch, window, lo, hi)
                    row = base + hi
                if row == last_sample:
                    break
        if row < stop:
            yield void_item(stop - row, row)

    def _item(self, epoch: int, window: int, lo: int, hi: int) -> WorkItem:
        layout = self._layout(epoch)
        first = window * self.window_shards
        shards = layout.shards[first : first + self.window_shards]
        samples = self.shard_samples[shards]
        filled = samples > 0  # an empty shard has nothing to fetch
        first_row = epoch * self.epoch_samples + int(layout.starts[window]) + lo
        shard_list, sample_list = tuple(shards[filled].tolist()), tuple(samples[filled].tolist())
        return WorkItem(self.dataset, self.seed, epoch, window, shard_list, sample_list, lo, hi, first_row)

    def _layout(self, epoch: int) -> _Epoch:
        """Shard order and window starts of one epoch: O(S log S), kept for the two epochs last asked for."""
        kept = _LAYOUTS.setdefault(self, {})
        if epoch not in kept:
            while len(kept) > 1:
                del kept[next(iter(kept))]
            shards = permutation(self.seed, epoch, 0, len(self.shard_samples))
            sizes = np.add.reduceat(self.shard_samples[shards], np.arange(0, len(shards), self.window_shards))
            kept[epoch] = _Epoch(shards, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]))
        return kept[epoch]


# Beside the plans, not in them: a plan travels to the controller and to every worker.
_LAYOUTS: WeakKeyDictionary[StreamPlan, dict[int, _Epoch]] = WeakKeyDictionary()


def require_rows(rows: NDArray[np.integer], total_rows: int) -> Int64s:
    """The rows as int64. Raises ValueError naming the first one outside [0, total_rows)."""
    numbers: Int64s = np.asarray(rows, dtype=np.int64)
    outside = (numbers < 0) | (numbers >= total_rows)
    if outside.any():
        raise ValueError(f"row {numbers[outside][0]} is outside the stream of {total_rows} rows")
    return numbers


def require_range(start: int, stop: int, total_rows: int) -> None:
    """Raise ValueError unless [start, stop) lies in [0, total_rows)."""
    if not 0 <= start <= stop <= total_rows:
        raise ValueError(
            f"rows [{start}, {stop}) are no part of this stream of {total_rows} rows; if this is a resume, the data, "
            "epochs, weights or global batch are not those of the run that wrote the checkpoint"
        )


@lru_cache(maxsize=2)
def window_order(seed: int, epoch: int, window: int, samples: int) -> Int64s:
    """The permutation of a window's samples, counted through its shards in epoch order; (samples,), read-only."""
    order = permutation(seed, epoch, window + 1, samples)
    order.flags.writeable = False
    return order


def permutation(seed: int, epoch: int, part: int, length: int) -> Int64s:
    """Permutation of range(length): part 0 is the shards of an epoch, part w + 1 its window w.

    The part sits in a high word of Philox' 256-bit counter, so that the sequences of two parts never overlap.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=[0, 0, part, 0])
    return np.argsort(bits.random_raw(length), kind="stable")


def _split_positions(samples: Int64s, positions: Int64s) -> tuple[Int64s, Int64s]:
    """Positions in the concatenation of shards of these sizes -> which shard, and which sample inside it."""
    ends = np.cumsum(samples)
    slots = np.searchsorted(ends, positions, side="right")
    return slots, positions - (ends - samples)[slots]
