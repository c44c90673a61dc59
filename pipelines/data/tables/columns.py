"""From a row of a table to a sample: which columns are read, of which types, and the members that a tar would hold.

A column of images holds the bytes of a file, or a struct of `bytes` and `path` (the feature Image of `datasets`), or a
list of either; null is no image. The text is a caption, or a conversation in LLaVA's form: a list of structs, or the
same as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from meteor_model.foreign import MAX_JSON_VALUES, JsonError, foreign, parse_json, quoted
from pipelines.data.schema import SampleError, build_members, faulty_members
from pipelines.data.tar_format import MAX_NAME, Members, ShardError
from pipelines.data.unread import changes_meaning, read_beside
from pipelines.io.validation import settings_class

_BEGINNINGS = ((b"\x89PNG", "png"), (b"RIFF", "webp"), (b"GIF8", "gif"))


@settings_class()
class Columns:
    """Which columns make a sample."""

    image_column: str = "image"
    """Images: bytes, the feature Image of `datasets`, or a list of either; null is none. Empty: all rows are text."""
    caption_column: str = ""
    """The caption of the image."""
    conversations_column: str = ""
    """Instead of a caption, the conversation: a list of {from, value}, or the same as JSON text."""
    key_column: str = ""
    """Text or whole numbers that name the samples; empty: they are named by file, row group and row."""

    def __post_init__(self) -> None:
        if bool(self.caption_column) == bool(self.conversations_column):
            raise ValueError("name the column of the text by one of --caption-column and --conversations-column")
        if self.caption_column and not self.image_column:
            raise ValueError(
                f"--caption-column {self.caption_column!r} needs an --image-column: a caption is of an image"
            )
        if len(set(self.chosen)) != len(self.chosen):
            raise ValueError(f"a column is named twice: {', '.join(self.chosen)}")

    @property
    def chosen(self) -> tuple[str, ...]:
        """Those that are named."""
        return tuple(name for name in asdict(self).values() if name)

    def read_from(self, schema: pa.Schema, shard: str) -> tuple[str, ...]:
        """The columns that are read of a table: the chosen ones, and those that training reads, or refuses, by name.

        Raises ShardError("wrong_columns") for one that is not there, is there twice, or has an unfit type.
        """
        for name, (fits, wanted) in self._kinds().items():
            if (count := schema.names.count(name)) != 1:
                there = quoted(", ".join(schema.names))
                detail = (
                    f"it has {count or 'no'} columns {name!r}, but {there}; name the right ones, or leave the file out"
                )
                raise ShardError(shard, "wrong_columns", detail)
            if not fits(found := schema.field(name).type):
                detail = f"the column {name!r} holds {quoted(str(found))}; expected {wanted}"
                raise ShardError(shard, "wrong_columns", detail)
        others = (name for name in dict.fromkeys(schema.names) if name not in self.chosen)
        return *self.chosen, *(name for name in others if self._is_read(name) or self._is_refused(name))

    def _kinds(self) -> dict[str, tuple[Any, str]]:
        return {
            name: kind
            for name, kind in (
                (self.image_column, (_holds_images, "binary, a struct of bytes and path, or a list of them")),
                (self.caption_column, (_holds_text, "text")),
                (self.conversations_column, (_holds_turns, "a list of structs, or JSON as text")),
                (self.key_column, (_holds_keys, "text or whole numbers")),
            )
            if name
        }

    def _is_read(self, name: str) -> bool:
        return name in read_beside(captioned=bool(self.caption_column))

    def _is_refused(self, name: str) -> bool:
        return name in ("image", "images") or changes_meaning(name)

    def samples(self, table: pa.RecordBatch, names: str, first: int = 0) -> Iterator[tuple[str, Members]]:
        """Key and members of every row of a table of the columns `read_from`.

        `names` is what keys begin with where there is no column of them, `first` the number of the first row. A row
        that cannot be read gets members that `parse_sample` refuses with the reason.
        """
        columns = {name: table.column(name) for name in table.schema.names}
        for index in range(table.num_rows):
            cells = _Cells(columns, index)
            key = f"{names}[{first + index}]"
            try:
                key = self._key(cells) or key
                yield key, self.members(cells)
            except SampleError as fault:
                yield key, faulty_members(fault.reason, fault.detail)

    def _key(self, cells: _Cells) -> str:
        """The key that the row gives itself; empty where it has none. Raises SampleError."""
        value = cells.get(self.key_column, "bad_json") if self.key_column else None
        key = "" if value is None else str(value)
        if len(key) > MAX_NAME:
            raise SampleError("bad_json", f"the key {quoted(key)} has {len(key)} characters; the limit is {MAX_NAME}")
        return key

    def members(self, cells: _Cells) -> Members:
        """The members of a row. Raises SampleError."""
        record: dict[str, Any] = {}
        for name in cells.columns:
            if name in self.chosen:
                continue
            value = cells.get(name, "bad_json")
            if self._is_read(name):
                record |= {} if value is None else {name: value}
            elif value:
                raise SampleError("unread_content", f"the column {name!r} is not read; leave the sample out")
        if self.caption_column:
            record["caption"] = cells.get(self.caption_column, "missing_caption")
        else:
            record["conversations"] = _turns(cells.get(self.conversations_column, "bad_conversation"))
        images = image_files(cells.get(self.image_column, "missing_image")) if self.image_column else []
        with foreign(lambda what: SampleError("bad_json", what)):
            return build_members(record, [(_extension(image), image) for image in images])


class _Cells:
    """One row of a table."""

    def __init__(self, columns: Mapping[str, pa.Array], index: int) -> None:
        self.columns = columns
        self._index = index

    def get(self, name: str, reason: str) -> Any:
        """A value. Raises SampleError with the reason for one that is none, such as text that is not UTF-8."""
        with foreign(lambda what: SampleError(reason, f"the column {name!r}: {what}")):
            cell = self.columns[name][self._index]
            if _is_list(cell.type) and cell.is_valid and len(cell) > MAX_JSON_VALUES:
                raise ValueError(f"a list of {len(cell)} values, the limit is {MAX_JSON_VALUES}")
            return cell.as_py()


def image_files(value: Any) -> list[bytes]:
    """The image files in a value of the image column. Raises SampleError("missing_image") for one without bytes."""
    if isinstance(value, list):
        found = [image_files(one) for one in value]
        if empty := [position for position, one in enumerate(found) if not one]:
            raise SampleError("missing_image", f"image {empty[0]} of {len(found)} is null")
        return [image for one in found for image in one]
    if isinstance(value, dict):
        if value["bytes"] is None and value.get("path"):
            detail = f"the image is the file {quoted(value['path'])}, whose bytes are not in the table"
            raise SampleError("missing_image", detail)
        value = value["bytes"]
    return [] if value is None else [value]


def _turns(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except JsonError as error:
        raise SampleError("bad_json", f"the conversation: {error}") from error


def _extension(image: bytes) -> str:
    """By its first bytes; of what no decoder knows it does not matter."""
    return next((name for beginning, name in _BEGINNINGS if image.startswith(beginning)), "jpg")


# --------------------------------------------------------------------------------------------------------------- types


def _holds_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _holds_keys(kind: pa.DataType) -> bool:
    return _holds_text(kind) or bool(pa.types.is_integer(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _holds_turns(kind: pa.DataType) -> bool:
    return _holds_text(kind) or (_is_list(kind) and bool(pa.types.is_struct(kind.value_type)))


def _holds_images(kind: pa.DataType) -> bool:
    kind = kind.value_type if _is_list(kind) else kind
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else pa.null()
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
