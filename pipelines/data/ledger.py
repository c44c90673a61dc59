"""The consumption ledger: exactly which samples of a training's data were trained, and which were dropped as faulty.

A sample is (dataset, epoch, shard, index). The ledger is filled from what went through a step, never from the plan, so
that the two can be compared (`consumed` of `pipelines.data.order` and `pipelines.data.mixture`). Per (dataset, epoch)
it holds

- one bit a shard: every sample of it is consumed;
- one bit a sample for the shards that are consumed in part (about the shards of the open windows);
- the dropped ones among the consumed samples, as sorted numbers.

Equal sets have equal bytes. Ray Train's controller and every worker import this module: it needs NumPy alone.

Length legend: N samples given, S shards of a dataset.
"""

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.data.sample_id import Int64s, SampleId, SampleIds
from pipelines.io.fingerprint import sha256_bytes

Bits = NDArray[np.bool_]

MAGIC, VERSION = b"METEORLG", 1
_HEADER = struct.Struct("<8sI32s32s")
"""Magic, version, SHA-256 of the data's sizes, SHA-256 of the body."""


class LedgerError(ValueError):
    """A ledger is damaged, belongs to other data, or disagrees; the message names the sample and what to do."""


@dataclass(frozen=True, slots=True)
class Consumption:
    """Numbers of samples."""

    trained: int
    dropped: int

    @property
    def consumed(self) -> int:
        """Trained and dropped together."""
        return self.trained + self.dropped


@dataclass(eq=False, slots=True)
class _Pass:
    """What one epoch of one dataset consumed."""

    whole: Bits  # (S,)
    partial: dict[int, Bits] = field(default_factory=dict)
    consumed: int = 0
    dropped: list[Int64s] = field(default_factory=list)  # numbers counted through all shards; parts in any order

    def bits(self, shard: int, samples: int) -> Bits:
        """Which samples of a shard are consumed, (samples,)."""
        if self.whole[shard]:
            return np.ones(samples, dtype=np.bool_)
        return self.partial.get(shard, np.zeros(samples, dtype=np.bool_))

    def dropped_numbers(self) -> Int64s:
        """All dropped samples, sorted."""
        if len(self.dropped) != 1:
            self.dropped = [np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *self.dropped]))]
        return self.dropped[0]

    def equals(self, other: "_Pass") -> bool:
        """Whether both consumed the same samples."""
        return (
            self.consumed == other.consumed
            and np.array_equal(self.whole, other.whole)
            and self.partial.keys() == other.partial.keys()
            and all(np.array_equal(bits, other.partial[shard]) for shard, bits in self.partial.items())
        )


@dataclass(frozen=True, slots=True)
class _Addition:
    """The samples that one `add` brings to one pass, sorted by their number."""

    key: tuple[int, int]
    numbers: Int64s
    indices: Int64s
    shards: Int64s  # the shards touched, each once
    cuts: Int64s  # where each of them begins in `numbers`, and the end


class Ledger:
    """The consumed samples of a training over datasets whose shards have `sizes[dataset][shard]` samples."""

    def __init__(self, sizes: Sequence[Sequence[int] | Int64s] = ()) -> None:
        self.sizes = tuple(np.asarray(of_dataset, dtype=np.int64) for of_dataset in sizes)
        self._offsets = tuple(np.cumsum(of_dataset) - of_dataset for of_dataset in self.sizes)
        self._passes: dict[tuple[int, int], _Pass] = {}

    # ---------------------------------------------------------------------------------------------------------- counts

    @property
    def counts(self) -> dict[tuple[int, int], Consumption]:
        """Trained and dropped samples of every (dataset, epoch) that has any."""
        found = {}
        for key, one in sorted(self._passes.items()):
            dropped = sum(map(len, one.dropped))
            found[key] = Consumption(one.consumed - dropped, dropped)
        return found

    @property
    def trained(self) -> int:
        """Samples that were trained, over all datasets and epochs."""
        return sum(count.trained for count in self.counts.values())

    @property
    def dropped(self) -> int:
        """Faulty samples that were passed over."""
        return sum(count.dropped for count in self.counts.values())

    @property
    def consumed(self) -> int:
        """Trained and dropped samples together."""
        return sum(one.consumed for one in self._passes.values())

    def dropped_samples(self) -> Iterator[SampleId]:
        """The dropped samples in ascending order."""
        for (dataset, epoch), one in sorted(self._passes.items()):
            numbers = one.dropped_numbers()
            shards = np.searchsorted(self._offsets[dataset] + self.sizes[dataset], numbers, side="right")
            indices = numbers - self._offsets[dataset][shards]
            yield from (
                SampleId(dataset, epoch, *place) for place in zip(shards.tolist(), indices.tolist(), strict=True)
            )

    # ------------------------------------------------------------------------------------------------------------- add

    def add(self, samples: SampleIds, *, dropped: bool = False) -> None:
        """Count samples as trained, or as dropped.

        Raises LedgerError naming the first sample that is outside the data or consumed already; then none is added.
        """
        self._require_inside(samples)
        additions, repeated = [], [np.zeros(0, dtype=np.int64)]
        codes = samples.dataset * (int(samples.epoch.max(initial=0)) + 1) + samples.epoch
        for code in np.unique(codes).tolist():
            where = np.flatnonzero(codes == code)
            addition, again = self._prepare(where, samples)
            additions.append(addition)
            repeated.append(again)
        if len(first := np.concatenate(repeated)):
            (sample,) = samples.take(slice(first.min(), first.min() + 1))
            raise LedgerError(
                f"sample ({sample}) is consumed already: it would count twice in its epoch. The rows do not continue "
                "the checkpoint that this ledger came from; start the same command again to go on from the checkpoint"
            )
        for addition in additions:
            self._apply(addition, dropped)

    def add_shards(self, dataset: int, epoch: int, shards: ArrayLike) -> None:
        """Count all samples of whole shards as trained; empty shards have nothing to count.

        Raises LedgerError naming the first shard that is outside the data or has a consumed sample.
        """
        numbers = np.asarray(shards, dtype=np.int64)
        if not 0 <= dataset < len(self.sizes) or epoch < 0:
            raise LedgerError(
                f"dataset {dataset}, epoch {epoch} is outside the {len(self.sizes)} datasets of this ledger"
            )
        sizes = self.sizes[dataset]
        outside = (numbers < 0) | (numbers >= len(sizes))
        if outside.any():
            raise LedgerError(f"shard {numbers[outside][0]} is outside dataset {dataset} of {len(sizes)} shards")
        numbers = numbers[sizes[numbers] > 0]
        if not len(numbers):
            return
        taken = np.ones(len(numbers), dtype=np.bool_)
        taken[np.unique(numbers, return_index=True)[1]] = False  # the first of equal ones
        if (there := self._passes.get((dataset, epoch))) is not None:
            taken |= there.whole[numbers] | np.isin(numbers, list(there.partial))
        if taken.any():
            raise LedgerError(f"shard {numbers[taken][0]} of dataset {dataset}, epoch {epoch} is consumed already")
        one = self._pass(dataset, epoch)
        one.whole[numbers] = True
        one.consumed += int(sizes[numbers].sum())

    def _pass(self, dataset: int, epoch: int) -> _Pass:
        if (dataset, epoch) not in self._passes:
            self._passes[dataset, epoch] = _Pass(np.zeros(len(self.sizes[dataset]), dtype=np.bool_))
        return self._passes[dataset, epoch]

    def _require_inside(self, samples: SampleIds) -> None:
        dataset, epoch, shard, index = samples.columns
        limit = np.zeros(len(dataset), dtype=np.int64)  # samples of the shard; none where there is no such shard
        for number, sizes in enumerate(self.sizes):
            where = np.flatnonzero((dataset == number) & (epoch >= 0) & (shard >= 0) & (shard < len(sizes)))
            limit[where] = sizes[shard[where]]
        outside = np.flatnonzero((index < 0) | (index >= limit))
        if len(outside):
            first = int(outside[0])
            (sample,) = samples.take(slice(first, first + 1))
            raise LedgerError(
                f"sample ({sample}) is outside the data: there are {len(self.sizes)} datasets with "
                f"{[len(sizes) for sizes in self.sizes]} shards, and this shard has {limit[first]} samples. The "
                "manifest changed since the run began; use the manifest that it began with"
            )

    def _prepare(self, where: Int64s, samples: SampleIds) -> tuple[_Addition, Int64s]:
        """The rows `where`, all of one pass, sorted; and those rows that repeat a sample."""
        dataset, epoch, shard, index = samples.columns
        key = (int(dataset[where[0]]), int(epoch[where[0]]))
        numbers = self._offsets[key[0]][shard[where]] + index[where]
        order = np.argsort(numbers, kind="stable")
        where, numbers = where[order], numbers[order]
        shards, indices = shard[where], index[where]
        repeated = np.zeros(len(where), dtype=np.bool_)
        repeated[1:] = numbers[1:] == numbers[:-1]
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        cuts = np.append(starts, len(where))
        if (one := self._passes.get(key)) is not None:
            repeated |= one.whole[shards]
            for at, number in enumerate(shards[starts].tolist()):
                if (bits := one.partial.get(number)) is not None:
                    part = slice(cuts[at], cuts[at + 1])
                    repeated[part] |= bits[indices[part]]
        return _Addition(key, numbers, indices, shards[starts], cuts), where[repeated]

    def _apply(self, addition: _Addition, dropped: bool) -> None:
        one, sizes = self._pass(*addition.key), self.sizes[addition.key[0]]
        shards, cuts = addition.shards, addition.cuts
        complete = np.diff(cuts) == sizes[shards]  # nothing of these was there before, or a sample would repeat
        one.whole[shards[complete]] = True
        for at in np.flatnonzero(~complete).tolist():
            shard = int(shards[at])
            bits = one.partial.setdefault(shard, np.zeros(sizes[shard], dtype=np.bool_))
            bits[addition.indices[cuts[at] : cuts[at + 1]]] = True
            if bits.all():
                one.whole[shard] = True
                del one.partial[shard]
        one.consumed += len(addition.numbers)
        if dropped:
            one.dropped.append(addition.numbers)

    # --------------------------------------------------------------------------------------------------------- compare

    def __eq__(self, other: object) -> bool:
        """Whether both consumed the same samples of the same data, whether trained or dropped."""
        if not isinstance(other, Ledger):
            return NotImplemented
        return (
            self._same_data(other)
            and self._passes.keys() == other._passes.keys()
            and all(one.equals(other._passes[key]) for key, one in self._passes.items())
        )

    __hash__ = None  # type: ignore[assignment]  # it changes

    def difference(self, other: "Ledger", limit: int = 3) -> tuple[list[SampleId], list[SampleId]]:
        """The first samples, at most `limit`, that only this ledger consumed, and those that only `other` did.

        Raises LedgerError where the two are about different data.
        """
        if not self._same_data(other):
            raise LedgerError("the two ledgers are about different data: their shards have other numbers of samples")
        mine: list[SampleId] = []
        theirs: list[SampleId] = []
        for key in sorted(self._passes.keys() | other._passes.keys()):
            sizes = self.sizes[key[0]]
            empty = _Pass(np.zeros(len(sizes), dtype=np.bool_))
            one, two = self._passes.get(key, empty), other._passes.get(key, empty)
            differing = set(np.flatnonzero(one.whole != two.whole).tolist()) | one.partial.keys() | two.partial.keys()
            for shard in sorted(differing):
                if len(mine) >= limit and len(theirs) >= limit:
                    return mine[:limit], theirs[:limit]
                here, there = one.bits(shard, int(sizes[shard])), two.bits(shard, int(sizes[shard]))
                mine += [SampleId(*key, shard, index) for index in np.flatnonzero(here & ~there)[:limit].tolist()]
                theirs += [SampleId(*key, shard, index) for index in np.flatnonzero(there & ~here)[:limit].tolist()]
        return mine[:limit], theirs[:limit]

    def require_equal(self, planned: "Ledger", where: str) -> None:
        """Raise LedgerError, naming the first samples that differ, unless this is what the plan says up to `where`."""
        if self == planned:
            return
        extra, missing = self.difference(planned)
        told = [f"consumed, but not planned: ({sample})" for sample in extra[:1]]
        told += [f"planned, but not consumed: ({sample})" for sample in missing[:1]]
        raise LedgerError(
            f"the ledger of {where} holds {self.consumed} samples, the plan says {planned.consumed}; "
            f"{'; '.join(told)}. Seed, epochs, weights, window or data are not those of the run; use the settings it "
            "began with, or another --run.name"
        )

    def _same_data(self, other: "Ledger") -> bool:
        return len(self.sizes) == len(other.sizes) and all(map(np.array_equal, self.sizes, other.sizes))

    # ----------------------------------------------------------------------------------------------------------- bytes

    def to_bytes(self) -> bytes:
        """The ledger as bytes, the same ones for the same content."""
        body = io.BytesIO()
        _write(body, np.array(sorted(self._passes), dtype=np.int64).reshape(-1, 2))
        for _, one in sorted(self._passes.items()):
            partial = sorted(one.partial)
            _write(body, np.packbits(one.whole))
            _write(body, np.array(partial, dtype=np.int64))
            _write(body, np.packbits(np.concatenate([np.zeros(0, dtype=np.bool_), *(one.partial[s] for s in partial)])))
            _write(body, np.diff(one.dropped_numbers(), prepend=0))  # gaps compress better than numbers
        packed = zlib.compress(body.getvalue(), 1)
        return _HEADER.pack(MAGIC, VERSION, self._data_digest(), sha256_bytes(packed)) + packed

    @classmethod
    def from_bytes(cls, data: bytes, sizes: Sequence[Sequence[int] | Int64s]) -> "Ledger":
        """The ledger that `to_bytes` made, for data of these sizes.

        Raises LedgerError if it is damaged, of another version, or about other data.
        """
        damaged = "; start again under another --run.name"
        if len(data) < _HEADER.size or not data.startswith(MAGIC):
            raise LedgerError(f"{len(data)} bytes that are no ledger, or not all of it{damaged}")
        _, version, data_digest, digest = _HEADER.unpack_from(data)
        if version != VERSION:
            raise LedgerError(
                f"the ledger has version {version}, this code reads {VERSION}; use the code that wrote it"
            )
        packed = data[_HEADER.size :]
        if sha256_bytes(packed) != digest:
            raise LedgerError(f"the ledger is damaged: its checksum does not fit its {len(data)} bytes{damaged}")
        ledger = cls(sizes)
        if data_digest != ledger._data_digest():
            raise LedgerError(
                f"the ledger is about other data than these {len(sizes)} datasets with {[len(one) for one in sizes]} "
                "shards: a manifest changed since the run began; use the manifests that it began with"
            )
        body = io.BytesIO(zlib.decompress(packed))
        for dataset, epoch in _read(body).tolist():
            ledger._passes[dataset, epoch] = _read_pass(body, ledger.sizes[dataset])
        return ledger

    def _data_digest(self) -> bytes:
        counted = (struct.pack("<q", len(sizes)) + sizes.astype("<i8").tobytes() for sizes in self.sizes)
        return sha256_bytes(b"".join(counted))


def _read_pass(body: io.BytesIO, sizes: Int64s) -> _Pass:
    one = _Pass(_read_bits(body, len(sizes)))
    partial = _read(body).astype(np.int64)
    bits = _read_bits(body, int(sizes[partial].sum()))
    parts = np.split(bits, np.cumsum(sizes[partial])[:-1]) if len(partial) else []
    one.partial = {shard: part.copy() for shard, part in zip(partial.tolist(), parts, strict=True)}
    one.consumed = int(sizes[one.whole].sum() + bits.sum())
    if len(dropped := np.cumsum(_read(body).astype(np.int64))):
        one.dropped = [dropped]
    return one


def _write(file: io.BytesIO, array: NDArray[Any]) -> None:
    """One array in NumPy's own format; numbers (none negative) in little-endian order and as narrow as they fit."""
    if array.dtype == np.int64:
        array = array.astype(np.min_scalar_type(int(array.max(initial=0))).newbyteorder("<"))
    np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)


def _read(file: io.BytesIO) -> NDArray[Any]:
    return np.lib.format.read_array(file, allow_pickle=False)


def _read_bits(file: io.BytesIO, count: int) -> Bits:
    return np.unpackbits(_read(file), count=count).astype(np.bool_)
