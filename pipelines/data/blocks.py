"""How rows travel between processes: pixels in one buffer that is written once, a micro-batch as a block of one row.

Ray cuts a block between rows where it is larger than a block should be, and joins it again by copying. A micro-batch is
asked for as a whole, so it is one row: the columns of ROW_SCHEMA as lists, and all pixels as one value. Who reads it
gets views of the memory that the object store keeps.

Legend: N rows, S image size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.data.schema import ROW_SCHEMA, Row

PIXELS = "images"
BLOCK_SCHEMA = pa.schema(
    [(field.name, field.type if field.name == PIXELS else pa.list_(field.type)) for field in ROW_SCHEMA]
)
"""One row: a micro-batch."""
_CHANNELS = 3


class PixelMemory:
    """Memory that the images of one table are written into, one behind the other.

    Args:
        images: that may come at most.
        size: S.
    """

    def __init__(self, images: int, size: int) -> None:
        self.size = size
        self._images_M3SS = np.empty((images, _CHANNELS, size, size), dtype=np.uint8)
        self._used = 0

    def take(self, images: int) -> NDArray[np.uint8]:
        """Room for the next images, uint8 (images, 3, S, S); what was taken before stays where it is."""
        begin, self._used = self._used, self._used + images
        assert self._used <= len(self._images_M3SS), "more images than were announced"
        return self._images_M3SS[begin : self._used]

    def give_back(self, images: int) -> None:
        """The last so many images are not there: their room is taken again."""
        self._used -= images


def rows_to_table(rows: Iterable[Row]) -> pa.Table:
    """Rows as a table of ROW_SCHEMA. Pixels are copied, but for those that already lie one behind the other."""
    columns = [row.to_columns() for row in rows]
    arrays = [
        _one_buffer([row[PIXELS] for row in columns])
        if field.name == PIXELS
        else pa.array([row[field.name] for row in columns], type=field.type)
        for field in ROW_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=ROW_SCHEMA)


def _one_buffer(values: Sequence[bytes | memoryview]) -> pa.Array:
    """Values of a column of large_binary, one behind the other."""
    flat = [np.frombuffer(value, dtype=np.uint8) for value in values]
    ends = np.cumsum([0, *map(len, flat)], dtype=np.int64)
    filled = [one for one in flat if len(one)]
    if filled and all(_follows(one, other) for one, other in pairwise(filled)):
        # The table keeps the whole memory alive, not its first piece alone.
        data = pa.foreign_buffer(filled[0].ctypes.data, int(ends[-1]), base=filled)
    else:
        data = pa.py_buffer(np.concatenate([np.empty(0, dtype=np.uint8), *flat]))
    return pa.Array.from_buffers(pa.large_binary(), len(flat), [None, pa.py_buffer(ends), data])


def _follows(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    return one.ctypes.data + one.nbytes == other.ctypes.data


def rows_from_table(table: pa.Table) -> list[Row]:
    """The rows of a table of ROW_SCHEMA. Tokens and pixels are views of the table's memory: not to be written to."""
    if not len(table):
        return []
    arrays = {name: _one_array(table[name]) for name in ROW_SCHEMA.names}
    views = {name: _views(arrays.pop(name)) for name in ("input_ids", "labels", PIXELS)}
    plain = pa.Table.from_arrays(list(arrays.values()), names=list(arrays)).to_pylist()
    return [
        Row.from_columns({**columns, **{name: view[number] for name, view in views.items()}})
        for number, columns in enumerate(plain)
    ]


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies even one chunk


def _views(values: pa.Array) -> list[NDArray[np.int32]] | list[memoryview]:
    """The values of an array of lists or bytes, without a copy."""
    kind = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    _, ends, *_ = values.buffers()
    bounds = np.frombuffer(ends, dtype=kind)[values.offset : values.offset + len(values) + 1].tolist()
    if pa.types.is_large_binary(values.type):
        data = memoryview(values.buffers()[2])
        return [data[begin:end] for begin, end in pairwise(bounds)]
    numbers = values.values.to_numpy(zero_copy_only=True)
    return [numbers[begin:end] for begin, end in pairwise(bounds)]


def block_of(table: pa.Table) -> pa.Table:
    """A table of ROW_SCHEMA (N rows) -> one of BLOCK_SCHEMA (one row), nothing copied where it is in one piece."""
    columns = []
    for name in ROW_SCHEMA.names:
        values = _one_array(table[name])
        if name == PIXELS:
            _, ends, data = values.buffers()
            bounds = np.frombuffer(ends, dtype=np.int64)[[values.offset, values.offset + len(values)]]
            columns.append(pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(bounds), data]))
        else:
            columns.append(pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values))
    return pa.Table.from_arrays(columns, schema=BLOCK_SCHEMA)


def table_of(block: pa.Table) -> pa.Table:
    """A table of BLOCK_SCHEMA (any rows) -> the table of ROW_SCHEMA that it holds, nothing copied where it is one."""
    return pa.concat_tables(map(_table_of_one, (block.slice(number, 1) for number in range(len(block)))))


def _table_of_one(block: pa.Table) -> pa.Table:
    arrays = {name: _one_array(block[name]) for name in ROW_SCHEMA.names}
    pixels = arrays.pop(PIXELS)
    flat = {name: values.flatten() for name, values in arrays.items()}
    images, sides = (flat[name].to_numpy().astype(np.int64) for name in ("num_images", "image_size"))
    sizes = images * _CHANNELS * sides**2
    first = np.frombuffer(pixels.buffers()[1], dtype=np.int64)[pixels.offset]
    ends = first + np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    data = pixels.buffers()[2]
    flat[PIXELS] = pa.Array.from_buffers(pa.large_binary(), len(sizes), [None, pa.py_buffer(ends), data])
    return pa.Table.from_arrays([flat[name] for name in ROW_SCHEMA.names], schema=ROW_SCHEMA)
