"""Bytes of a file that holds a table, by ranges: whatever a foreign file says of itself is asked for here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyarrow as pa

from pipelines.data.tar_format import ShardError

MAX_HEAD_BYTES = 2**25
"""Of what describes a file's row groups: a Parquet footer, an Arrow schema. Parsed, it takes a few times as much."""
MAX_GROUP_BYTES = 2**30
"""Of the columns of one row group that are read, in the file as well as decoded."""
MAX_GROUP_ROWS = 2**20
"""Of one row group: as many as pyarrow writes."""
MAX_GROUP_VALUES = 2**24
"""Of one column of a row group, those in lists counted one by one: values take memory where they take no bytes."""

Extent = tuple[int, int]
"""First byte and number of bytes."""


@dataclass(frozen=True)
class RangeFile:
    """A file of `size` bytes at the address `name`, of which `read` gives `count` bytes from `start` on."""

    name: str
    size: int
    read: Callable[[int, int], bytes]

    def get(self, extent: Extent) -> bytes:
        """These bytes. Raises ShardError("truncated") where the file has not all of them."""
        start, count = extent
        if start < 0 or count < 0 or start + count > self.size:
            raise self.damaged(f"it says that {count} bytes lie at byte {start}")
        data = self.read(start, count)
        if len(data) != count:
            raise self.damaged(f"it ended at byte {start + len(data)} while it was read")
        return data

    def damaged(self, what: str) -> ShardError:
        """The error of a file that is cut or damaged."""
        return ShardError(self.name, "truncated", f"the file of {self.size} bytes breaks off or is damaged: {what}")


def joined(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """The extents in ascending order, those that touch as one."""
    found: list[Extent] = []
    for start, count in sorted(extents):
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + count)
        else:
            found.append((start, count))
    return tuple(found)


def check_size(shard: str, what: str, number: int, limit: int) -> None:
    """Raise ShardError("too_large") for a number above a limit."""
    if number > limit:
        detail = f"{number} {what}, the limit is {limit}; write the file anew with smaller row groups"
        raise ShardError(shard, "too_large", detail)


def check_values(table: pa.RecordBatch, shard: str) -> None:
    """Raise ShardError("too_large") for a column, or a part of one, of too many values."""
    for column in table.columns:
        check_size(shard, "values of a column", _most_values(column), MAX_GROUP_VALUES)


def _most_values(array: pa.Array) -> int:
    if pa.types.is_struct(array.type):
        return max([len(array), *(_most_values(array.field(place)) for place in range(array.type.num_fields))])
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type) or pa.types.is_fixed_size_list(array.type):
        return max(len(array), _most_values(array.values))
    return len(array)
