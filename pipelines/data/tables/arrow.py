"""Arrow's streaming format, as the library `datasets` writes it: a schema, and record batches one after another.

A file of Arrow's file format is such a stream behind eight bytes of magic, with a footer that is not needed. The layout
is that of https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc: a
message is ff ff ff ff, the length of its metadata (int32), the metadata (a flatbuffer), and its body. The headers alone
are read here to find the messages; pyarrow decodes them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from meteor_model.foreign import foreign
from pipelines.data.tables.files import (
    MAX_GROUP_BYTES,
    MAX_GROUP_ROWS,
    MAX_HEAD_BYTES,
    Extent,
    RangeFile,
    check_size,
    check_values,
)
from pipelines.data.tar_format import ShardError

CONTINUATION = b"\xff\xff\xff\xff"
FILE_MAGIC = b"ARROW1\0\0"
_PREFIX = 8
_SCHEMA, _RECORD_BATCH = 1, 3  # members of the union MessageHeader
_HEADER_TYPE, _HEADER, _BODY_LENGTH = 1, 2, 3  # fields of the table Message
_COMPRESSION = 3  # field of the table RecordBatch


class _Message(NamedTuple):
    extent: Extent
    kind: int
    compressed: bool


def messages(file: RangeFile) -> Iterator[Extent]:
    """Where the schema lies, and then every record batch. Raises ShardError."""
    at = len(FILE_MAGIC) if file.get((0, min(file.size, len(FILE_MAGIC)))) == FILE_MAGIC else 0
    found, wanted = 0, _SCHEMA
    while (message := _message_at(file, at)) is not None:
        if message.kind != wanted:
            detail = f"message {found} is of kind {message.kind}; a schema and record batches are read, no dictionaries"
            raise ShardError(file.name, "not_a_table", f"{detail}: save the table without dictionary encoding")
        if message.compressed:
            detail = f"the record batch {found - 1} is compressed, which is not read: save the table uncompressed"
            raise ShardError(file.name, "not_a_table", detail)
        yield message.extent
        found, wanted, at = found + 1, _RECORD_BATCH, sum(message.extent)
    if not found:
        raise file.damaged("it has no schema")


def _message_at(file: RangeFile, at: int) -> _Message | None:
    """The message at a byte; None at the end-of-stream mark, without which the last batches may be missing."""
    if at == file.size:
        raise file.damaged("it ends without an end-of-stream mark")
    prefix = file.get((at, _PREFIX))
    length = int.from_bytes(prefix[4:], "little", signed=True)
    if prefix[:4] != CONTINUATION:
        raise file.damaged(f"no message at byte {at}")
    if not length:
        return None
    if length < 0:
        raise file.damaged(f"the message at byte {at} has {length} bytes of metadata")
    check_size(file.name, "bytes of metadata of a message", length, MAX_HEAD_BYTES)
    metadata = file.get((at + _PREFIX, length))
    with foreign(lambda what: file.damaged(f"the message at byte {at}: {what}")):
        root = _at("<I", metadata, 0)
        kind = _field("<B", metadata, root, _HEADER_TYPE)
        body = _field("<q", metadata, root, _BODY_LENGTH)
        header_at = _place(metadata, root, _HEADER)
        header = header_at + _at("<I", metadata, header_at)
        compressed = kind == _RECORD_BATCH and bool(_place(metadata, header, _COMPRESSION))
    if body < 0 or at + _PREFIX + length + body > file.size:
        raise file.damaged(f"the message at byte {at} has a body of {body} bytes")
    return _Message((at, _PREFIX + length + body), kind, compressed)


def _at(form: str, data: bytes, place: int) -> int:
    value: int = struct.unpack_from(form, data, place)[0]
    return value


def _place(data: bytes, table: int, field: int) -> int:
    """Where a field of a flatbuffer's table lies; 0 of one that has its default."""
    vtable = table - _at("<i", data, table)
    entry = 4 + 2 * field
    if vtable < 0 or entry >= _at("<H", data, vtable):
        return 0
    offset = _at("<H", data, vtable + entry)
    return table + offset if offset else 0


def _field(form: str, data: bytes, table: int, field: int) -> int:
    place = _place(data, table, field)
    return _at(form, data, place) if place else 0


def check_message(extent: Extent, shard: str) -> None:
    """Raise ShardError("too_large") for a record batch above the limit of what is read."""
    check_size(shard, "bytes to read", extent[1], MAX_GROUP_BYTES)


def parse_schema(data: bytes, shard: str) -> pa.Schema:
    """The schema's message. Raises ShardError."""
    with foreign(lambda what: ShardError(shard, "truncated", f"its schema is damaged: {what}")):
        return pa.ipc.read_schema(pa.py_buffer(data))


def group_table(schema: pa.Schema, names: Sequence[str], data: bytes, shard: str) -> pa.RecordBatch:
    """Some columns of a record batch from its message; views of it. Raises ShardError, also above the limits."""
    with foreign(lambda what: ShardError(shard, "truncated", f"it is damaged: {what}"), keep=(ShardError,)):
        table = pa.ipc.read_record_batch(pa.py_buffer(data), schema)
        check_size(shard, "rows", table.num_rows, MAX_GROUP_ROWS)
        table = table.select(list(names))
        table.validate(full=True)  # offsets and texts are what the file says
        check_values(table, shard)
        return table
