"""How deep the columns of a Parquet file are nested, found before pyarrow is given its footer.

pyarrow (25) builds the schema by recursion without a limit: a footer of 80 kB that says 10,000 columns within one
another ends the process. The layout is Thrift's compact protocol, https://github.com/apache/thrift/blob/master/doc/
specs/thrift-compact-protocol.md, of the struct FileMetaData of https://parquet.apache.org/docs/file-format/metadata.
"""

from __future__ import annotations

from collections.abc import Iterator

MAX_NESTING = 64
"""Levels of columns within columns: what Arrow's own format may have."""

_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_WIDTHS = {_TRUE: 1, _FALSE: 1, _BYTE: 1, _DOUBLE: 8}
_SCHEMA, _NUM_CHILDREN = 2, 5  # fields of FileMetaData and of SchemaElement
_MOST_STRUCTS = 64  # within one another, as in Thrift's own reader


def check_nesting(footer: bytes) -> None:
    """Raise ValueError for a footer that is none, or one whose columns are nested deeper than MAX_NESTING."""
    reader = _Reader(footer)
    for field, kind in reader.fields():
        if (field, kind) == (_SCHEMA, _LIST):
            _check_schema(reader)
        else:
            reader.skip(kind)


def _check_schema(reader: _Reader) -> None:
    """Walk the elements, each in front of its children."""
    count, kind = reader.list_head()
    if kind != _STRUCT:
        raise ValueError("a schema of other than structs")
    open_groups: list[int] = []  # children that are still to come, by level
    for _ in range(count):
        children = _children(reader)
        if open_groups:
            open_groups[-1] -= 1
        if children > 0:
            open_groups.append(children)
        if len(open_groups) > MAX_NESTING:
            raise ValueError(f"columns nested more than {MAX_NESTING} levels deep")
        while open_groups and not open_groups[-1]:
            open_groups.pop()


def _children(reader: _Reader) -> int:
    found = 0
    for field, kind in reader.fields():
        if (field, kind) == (_NUM_CHILDREN, _I32):
            found = _signed(reader.varint() & 0xFFFFFFFF)
        else:
            reader.skip(kind)
    return found


def _signed(zigzag: int) -> int:
    return (zigzag >> 1) ^ -(zigzag & 1)


class _Reader:
    """A place in bytes of the compact protocol. Whatever does not fit them raises IndexError or ValueError."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of the fields of a struct; who is given one takes its value before the next."""
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else _signed(self.varint() & 0xFFFF)
            yield number, head & 15

    def list_head(self) -> tuple[int, int]:
        """Number and type of the elements of a list or a set."""
        head = self._byte()
        count = self.varint() if head >> 4 == 15 else head >> 4
        return self._within(count), head & 15

    def varint(self) -> int:
        """An unsigned number of at most 64 bits."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number of more than ten bytes")

    def skip(self, kind: int, inside: int = 0) -> None:
        """Pass over the value of a field."""
        if kind not in (_TRUE, _FALSE):  # whose type is their value
            self._skip_element(kind, inside)

    def _skip_element(self, kind: int, inside: int) -> None:
        if inside > _MOST_STRUCTS:
            raise ValueError(f"values nested more than {_MOST_STRUCTS} levels deep")
        if kind in _WIDTHS:
            self._at += _WIDTHS[kind]
        elif kind in (_I16, _I32, _I64):
            self.varint()
        elif kind == _BINARY:
            length = self._within(self.varint())
            self._at += length
        elif kind in (_LIST, _SET):
            count, of = self.list_head()
            for _ in range(count):
                self._skip_element(of, inside + 1)
        elif kind == _MAP:
            self._skip_map(inside)
        elif kind == _STRUCT:
            for _, of in self.fields():
                self.skip(of, inside + 1)
        else:
            raise ValueError(f"a value of type {kind}")

    def _skip_map(self, inside: int) -> None:
        if count := self._within(self.varint()):
            kinds = self._byte()
            for _ in range(count):
                self._skip_element(kinds >> 4, inside + 1)
                self._skip_element(kinds & 15, inside + 1)

    def _byte(self) -> int:
        value = self._data[self._at]
        self._at += 1
        return value

    def _within(self, count: int) -> int:
        """A count of what takes a byte or more each. Raises ValueError where so many are not there."""
        if count > len(self._data) - self._at:
            raise ValueError(f"{count} values or bytes, where {len(self._data) - self._at} are left")
        return count
