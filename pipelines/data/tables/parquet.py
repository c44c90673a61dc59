"""Parquet: the footer says where the column chunks of a row group lie; those of the needed columns alone are read.

The layout is that of https://parquet.apache.org/docs/file-format: magic, row groups, footer, the footer's length in
four bytes, magic. pyarrow parses them; this module says which bytes it may have.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from meteor_model.foreign import foreign
from pipelines.data.tables.files import (
    MAX_GROUP_BYTES,
    MAX_GROUP_ROWS,
    MAX_GROUP_VALUES,
    MAX_HEAD_BYTES,
    Extent,
    RangeFile,
    check_size,
    check_values,
    joined,
)
from pipelines.data.tables.footer import check_nesting
from pipelines.data.tar_format import ShardError
from pipelines.io.seekable import SeekableFile

MAGIC = b"PAR1"
_TAIL = 8  # length of the footer, and magic
_ROWS = 8  # decoded at a time, so that a chunk whose values repeat is seen before it fills the memory


def footer_extent(file: RangeFile) -> Extent:
    """Where the footer lies, its length and the magic behind it included. Raises ShardError."""
    tail = file.get((file.size - _TAIL, _TAIL)) if file.size >= _TAIL + len(MAGIC) else b""
    if tail[4:] != MAGIC:
        raise file.damaged(f"it begins as Parquet, but ends in {tail[4:]!r}")
    count = int.from_bytes(tail[:4], "little") + _TAIL
    check_size(file.name, "bytes of footer", count, MAX_HEAD_BYTES)
    return file.size - count, count


def check_footer(data: bytes, shard: str) -> None:
    """Raise ShardError for a footer that pyarrow must not be given.

    It takes 0.3 s a megabyte, so it is done when a file is indexed: later its footer is compared with that one.
    """
    with foreign(lambda what: ShardError(shard, "truncated", f"its footer is damaged: {what}")):
        check_nesting(data)


def parse_footer(data: bytes, shard: str) -> pq.FileMetaData:
    """The footer with what is behind it. Raises ShardError."""
    with foreign(lambda what: ShardError(shard, "truncated", f"its footer is damaged: {what}")):
        return pq.read_metadata(io.BytesIO(MAGIC + data))


def schema_of(footer: pq.FileMetaData, shard: str) -> pa.Schema:
    """The columns. Raises ShardError."""
    with foreign(lambda what: ShardError(shard, "truncated", f"its schema is damaged: {what}")):
        return footer.schema.to_arrow_schema()


def group_extents(footer: pq.FileMetaData, number: int, names: Collection[str], shard: str) -> tuple[Extent, ...]:
    """Where the chunks of some columns of a row group lie. Raises ShardError, also for one above the limits."""
    with foreign(lambda what: ShardError(shard, "truncated", f"its footer is damaged: {what}"), keep=(ShardError,)):
        group = footer.row_group(number)
        check_size(shard, "rows", group.num_rows, MAX_GROUP_ROWS)
        chunks = [group.column(place) for place in range(group.num_columns)]
        needed = [chunk for chunk in chunks if any(_is_of(chunk.path_in_schema, name) for name in names)]
        extents = [(_first_byte(chunk), chunk.total_compressed_size) for chunk in needed]
        if any(start < 0 or count < 0 for start, count in extents):
            raise ValueError("a column chunk of negative size")
        check_size(shard, "values of a column", max([chunk.num_values for chunk in needed]), MAX_GROUP_VALUES)
        check_size(shard, "bytes to read", sum(count for _, count in extents), MAX_GROUP_BYTES)
        check_size(shard, "bytes unpacked", sum(chunk.total_uncompressed_size for chunk in needed), MAX_GROUP_BYTES)
        return joined(extents)


def group_tables(
    footer: pq.FileMetaData, number: int, names: Sequence[str], extents: Sequence[Extent], data: bytes, shard: str
) -> Iterator[pa.RecordBatch]:
    """Some columns of a row group from the bytes at `extents`, some rows at a time.

    Raises ShardError, also where there are other rows than the footer says.
    """
    unpacked = rows = 0
    with foreign(lambda what: ShardError(shard, "truncated", f"its pages are damaged: {what}"), keep=(ShardError,)):
        file = pq.ParquetFile(_Extents(extents, data), metadata=footer, pre_buffer=False)
        for table in file.iter_batches(_ROWS, row_groups=[number], columns=list(names), use_threads=False):
            unpacked += table.nbytes
            check_size(shard, "bytes unpacked", unpacked, MAX_GROUP_BYTES)
            check_values(table, shard)
            rows += table.num_rows
            yield table.select(list(names))
        if rows != (stated := footer.row_group(number).num_rows):
            raise ValueError(f"they hold {rows} rows, the footer says {stated}")


def _is_of(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


def _first_byte(chunk: Any) -> int:
    pages = int(chunk.data_page_offset)
    dictionary = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    return min(pages, int(dictionary)) if dictionary else pages


class _Extents(SeekableFile):
    """A file of which some extents are there; reading anything else is an error."""

    def __init__(self, extents: Sequence[Extent], data: bytes) -> None:
        super().__init__(max(map(sum, extents)))
        self._extents = extents
        self._data = pa.py_buffer(data)

    def read_buffer(self, count: int) -> pa.Buffer:
        """The next bytes without a copy; pyarrow asks for this where a file has it."""
        before = 0
        for start, length in self._extents:
            inside = self._at - start
            if inside >= 0 and inside + count <= length:
                self._at += count
                return self._data.slice(before + inside, count)
            before += length
        raise ValueError(f"bytes {self._at} to {self._at + count} are no part of the columns that are read")

    def read(self, count: int = -1) -> bytes:
        return bytes(self.read_buffer(count).to_pybytes())
