"""The tables of a prefix as shards: which files are read, and a row of the manifest for each of their row groups."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from meteor_model.foreign import foreign
from pipelines.data.indexing import Found
from pipelines.data.shards import MANIFEST_NAME, shard_info
from pipelines.data.survey import DIGESTS_NAME
from pipelines.data.tables import arrow, parquet, row_group
from pipelines.data.tables.columns import Columns
from pipelines.data.tables.files import Extent, RangeFile
from pipelines.data.tables.row_group import Format, Head, RowGroup
from pipelines.data.tar_format import ShardError
from pipelines.io import storage
from pipelines.io.codec import encode
from pipelines.io.fingerprint import sha256

GLOBS = ("*.parquet", "*.arrow")
STATE_NAME = "state.json"
"""Beside the Arrow files of a folder that `datasets` saved: it names those that hold the data."""


@dataclass(frozen=True)
class Tables:
    """The files of a prefix that match one of the globs `globs`, and which columns of them make a sample."""

    columns: Columns
    globs: tuple[str, ...] = GLOBS
    name = "tables"

    def settings(self) -> dict[str, Any]:
        """What the manifest's identity says of them."""
        return {"patterns": list(self.globs), "columns": asdict(self.columns)}

    def files(self, root: str, listed: Mapping[str, int]) -> tuple[dict[str, int], Counter[str]]:
        """Bytes of the files that are read, by path; and how many other tables there are, by reason.

        Raises ShardError for a saved folder that is not whole, or needs another file to be read.
        """
        tables = {path: size for path, size in listed.items() if path.endswith((".parquet", ".arrow"))}
        own = {MANIFEST_NAME, DIGESTS_NAME}
        matched = {
            path: size
            for path, size in listed.items()
            if path not in own and any(fnmatch.fnmatchcase(path, pattern) for pattern in self.globs)
        }
        unsaved = _outside_the_state(root, matched, listed)
        left_out = Counter(table_outside_pattern=len(tables.keys() - matched.keys() - own))
        left_out["table_not_in_state"] = len(unsaved)
        return {path: size for path, size in matched.items() if path not in unsaved}, left_out

    def shards(self, root: str, path: str, split: str, listed: Mapping[str, int]) -> Iterator[Found]:
        """The row groups of a file, with how many values of columns are not read. Raises ShardError, StorageError."""
        url = storage.join(root, path)
        file = RangeFile(url, listed[path], partial(storage.read_range, url))
        for number, (group, head, data) in enumerate(row_groups(file, self.columns)):
            name = f"{path}#{number}"
            samples = row_group.decode(name, group, head, data, f"{url}#{number}")
            info = shard_info(name, split, data, samples, encode(group))
            schema = head if isinstance(head, pa.Schema) else parquet.schema_of(head, url)
            unread = set(schema.names) - set(self.columns.read_from(schema, url))
            yield Found(info, samples, {}, dict.fromkeys(sorted(unread), len(samples)))


def row_groups(file: RangeFile, columns: Columns) -> Iterator[tuple[RowGroup, Head, bytes]]:
    """The row groups of a file in order, each with the head of the file and its own bytes, which are not decoded.

    Raises ShardError for a file that is no table, lacks a column, is damaged, or holds a row group above the limits.
    """
    beginning = file.get((0, min(file.size, 4)))
    if beginning == parquet.MAGIC:
        yield from _parquet_groups(file, columns)
    elif beginning in (arrow.CONTINUATION, arrow.FILE_MAGIC[:4]):
        yield from _arrow_groups(file, columns)
    else:
        detail = f"neither Parquet nor Arrow's stream or file format: {file.size} bytes that start {beginning!r}"
        raise ShardError(file.name, "not_a_table", detail)


def _parquet_groups(file: RangeFile, columns: Columns) -> Iterator[tuple[RowGroup, Head, bytes]]:
    extent = parquet.footer_extent(file)
    head, digest = _head(file, "parquet", extent)
    names = columns.read_from(parquet.schema_of(head, file.name), file.name)
    for number in range(head.num_row_groups):
        extents = parquet.group_extents(head, number, names, f"{file.name}#{number}")
        group = RowGroup("parquet", extent, digest, extents, columns)
        yield group, head, b"".join(map(file.get, extents))


def _arrow_groups(file: RangeFile, columns: Columns) -> Iterator[tuple[RowGroup, Head, bytes]]:
    extents = arrow.messages(file)
    first = next(extents)
    head, digest = _head(file, "arrow", first)
    columns.read_from(head, file.name)
    for number, extent in enumerate(extents):
        arrow.check_message(extent, f"{file.name}#{number}")
        yield RowGroup("arrow", first, digest, (extent,), columns), head, file.get(extent)


def _head(file: RangeFile, kind: Format, extent: Extent) -> tuple[Any, str]:
    data = file.get(extent)
    if kind == "parquet":
        parquet.check_footer(data, file.name)
    return row_group.parse_head(kind, data, file.name), sha256(data)


def _outside_the_state(root: str, matched: Iterable[str], listed: Mapping[str, int]) -> set[str]:
    """Those Arrow files that lie in a saved folder and hold no data: caches of `map` and the like.

    Raises ShardError where a file of a saved folder is missing, or its rows are chosen by another one.
    """
    of_folder: dict[str, set[str]] = {}
    for path in matched:
        if path.endswith(".arrow"):
            of_folder.setdefault(path.rpartition("/")[0], set()).add(path)
    outside: set[str] = set()
    for folder, paths in of_folder.items():
        name = storage.join(folder, STATE_NAME) if folder else STATE_NAME
        if name in listed:
            files = _saved_files(storage.join(root, name))
            saved = {storage.join(folder, file) if folder else file for file in files}
            if missing := sorted(saved - listed.keys()):
                raise ShardError(storage.join(root, missing[0]), "missing", f"missing, but {name} names it")
            outside |= paths - saved
    return outside


def _saved_files(url: str) -> list[str]:
    """Names of the data files of a saved folder. Raises ShardError."""
    state = storage.read_json(url)
    with foreign(lambda what: ShardError(url, "not_a_table", f"not the state of a saved folder ({what})")):
        files = [str(one["filename"]) for one in state["_data_files"]]
        indices = state.get("_indices_data_files") or state.get("_indices_files")
    if indices:
        detail = "its rows are chosen by a table of indices, which is not read; save it again after flatten_indices()"
        raise ShardError(url, "not_a_table", detail)
    return files
