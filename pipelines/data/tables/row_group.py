"""What the manifest keeps of a row group, and how it is read again: its byte ranges, compared, and then decoded.

The head of a file (Parquet's footer, Arrow's schema) says how to decode all of its row groups. A process keeps those of
the files that it read last; each is compared with its own checksum when it is fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from meteor_model.foreign import quoted
from pipelines.data.tables import arrow, parquet
from pipelines.data.tables.columns import Columns
from pipelines.data.tables.files import MAX_GROUP_BYTES, MAX_HEAD_BYTES, Extent
from pipelines.data.tar_format import Members, ShardError
from pipelines.io import storage
from pipelines.io.fingerprint import sha256

Format = Literal["parquet", "arrow"]
Head: TypeAlias = pq.FileMetaData | pa.Schema
"""Parquet's footer or Arrow's schema, parsed."""
HEADS_KEPT = 16


@dataclass(frozen=True)
class RowGroup:
    """Where a row group lies in its file, and which columns of it make samples.

    Attributes:
        format: of the file.
        head: where the file's footer or schema lies.
        head_sha256: of those bytes.
        extents: where the columns that are read lie; of Arrow the whole record batch.
        columns: what they are.

    Raises:
        ValueError: extents that are none, or above the limits.
    """

    format: Format
    head: Extent
    head_sha256: str
    extents: tuple[Extent, ...]
    columns: Columns

    def __post_init__(self) -> None:
        if min(number for extent in (self.head, *self.extents) for number in extent) < 0:
            raise ValueError("a row group at a negative byte")
        if self.head[1] > MAX_HEAD_BYTES or self.bytes > MAX_GROUP_BYTES:
            raise ValueError(f"a row group of {self.head[1]} + {self.bytes} bytes is above the limits")

    @property
    def bytes(self) -> int:
        """That are read, the head's left out."""
        return sum(count for _, count in self.extents)


def split_path(path: str) -> tuple[str, int]:
    """File and number of a row group from the path of its row in the manifest, `FILE#NUMBER`. Raises ValueError."""
    found = re.fullmatch(r"(.+)#([0-9]{1,9})", path, re.DOTALL)
    if found is None:
        raise ValueError(f"{quoted(path)} names no row group; expected FILE#NUMBER")
    return found.group(1), int(found.group(2))


def read(url: str, group: RowGroup, retry_s: float) -> tuple[Head, bytes]:
    """The head of the file `url`, and the bytes of a row group, fewer where the file ends before.

    Raises ShardError for a head that is not that of the manifest, StorageError.
    """
    head = _head(url, group.format, group.head, group.head_sha256, retry_s)
    return head, b"".join(storage.read_range(url, *extent, retry_s) for extent in group.extents)


def decode(path: str, group: RowGroup, head: Head, data: bytes, shard: str) -> list[tuple[str, Members]]:
    """The samples of a row group; `path` is that of its row in the manifest. Raises ShardError naming `shard`."""
    first = 0
    found: list[tuple[str, Members]] = []
    for table in _tables(head, split_path(path)[1], group, data, shard):
        found += group.columns.samples(table, path, first)
        first += table.num_rows
    _require_unique(found, shard)
    return found


def _tables(head: Head, number: int, group: RowGroup, data: bytes, shard: str) -> Iterator[pa.RecordBatch]:
    if isinstance(head, pa.Schema):
        yield arrow.group_table(head, group.columns.read_from(head, shard), data, shard)
        return
    names = group.columns.read_from(parquet.schema_of(head, shard), shard)
    yield from parquet.group_tables(head, number, names, group.extents, data, shard)


def _require_unique(samples: list[tuple[str, Members]], shard: str) -> None:
    """Raise ShardError("duplicate_key") for a key that is there twice."""
    seen: set[str] = set()
    for key, _ in samples:
        if key in seen:
            detail = f"the key {quoted(key)} is there twice; name another --key-column, or none"
            raise ShardError(shard, "duplicate_key", detail)
        seen.add(key)


def parse_head(kind: Format, data: bytes, shard: str) -> Head:
    """The head of a file from its bytes. Raises ShardError."""
    return parquet.parse_footer(data, shard) if kind == "parquet" else arrow.parse_schema(data, shard)


@lru_cache(maxsize=HEADS_KEPT)
def _head(url: str, kind: Format, extent: Extent, digest: str, retry_s: float) -> Head:
    data = storage.read_range(url, *extent, retry_s)
    if sha256(data) != digest:
        detail = "replaced after the manifest was written: its footer or schema is another one; restore the file, or"
        again = "give the command of jobs/make_shards.py that made this manifest again, with --overwrite"
        raise ShardError(url, "replaced", f"{detail} {again}")
    return parse_head(kind, data, url)
