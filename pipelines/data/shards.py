"""Shards and their manifest: what a dataset in storage is, and how it is read without silent loss.

A dataset is a prefix with WebDataset tars (`train-000000.tar`, ...), or with tables whose row groups are its shards
(`pipelines.data.tables`), and `manifest.parquet`, one row a shard: path, split, samples, bytes, sha256, members
(extension -> count), row_group. The manifest is written last, so it is the commit mark: a prefix
without one is unfinished. Every read checks length, checksum and sample count against it.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import inf
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from meteor_model.foreign import foreign, quoted
from pipelines.data.schema import faulty_members
from pipelines.data.survey import Report
from pipelines.data.tables import row_group
from pipelines.data.tables.footer import check_nesting
from pipelines.data.tables.row_group import Head, RowGroup
from pipelines.data.tar_format import (
    Members,
    ShardError,
    ShardUnreadableError,
    looks_like_tar,
    pack_shard,
    parse_shard,
)
from pipelines.io import storage
from pipelines.io.codec import decode
from pipelines.io.fingerprint import canonical_json, sha256, sha256_of_json
from pipelines.io.retry import RETRY_S, Backoff, retry

MANIFEST_NAME = "manifest.parquet"
FORMAT_VERSION = 1
SPEC_KEY = b"meteor.spec"
REPORT_KEY = b"meteor.report"
AT_REST_READS = 4
MAKE_ANEW = "give the command of jobs/make_shards.py that made this manifest again, with --overwrite"
SAMPLES_PER_SHARD = 256
BadShards = Literal["fail", "drop"]
"""What becomes of a shard that is missing or damaged at rest."""
_SPLIT_NAME = re.compile(r"^[a-z][a-z0-9_]*$")

MANIFEST_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("split", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("members", pa.map_(pa.string(), pa.int64())),
        ("row_group", pa.string()),
    ]
)


# ------------------------------------------------------------------------------------------------------------ manifest


@dataclass(frozen=True)
class ShardInfo:
    """One row of the manifest; `path` is relative to the manifest's folder, `members` counts extensions.

    `row_group` is empty for a tar; else a RowGroup as `pipelines.io.codec` writes it, and `path` ends in its number.
    """

    path: str
    split: str
    samples: int
    bytes: int
    sha256: str
    members: dict[str, int]
    row_group: str = ""

    @property
    def file(self) -> str:
        """The object that it is, or that it lies in. Raises ValueError for a row group without a number."""
        return row_group.split_path(self.path)[0] if self.row_group else self.path

    def parsed_group(self) -> RowGroup | None:
        """The row group; None for a tar. Raises ValueError."""
        return decode(RowGroup, self.row_group, self.file) if self.row_group else None


@dataclass(frozen=True)
class Manifest:
    """All shards of a dataset in their order, and `spec`: the settings it was made with (format, source, ...).

    `report` counts what was left out and found faulty when it was made; it is no part of the identity.
    """

    url: str
    shards: tuple[ShardInfo, ...]
    spec: dict[str, Any]
    report: Report = field(default_factory=dict)

    @cached_property
    def sha256(self) -> str:
        """Identity of the data: hash of the spec and of all rows (not of the parquet file, whose bytes may vary)."""
        rows = [asdict(shard) for shard in self.shards]
        for row in rows:
            if not row["row_group"]:
                del row["row_group"]  # tars had an identity before there were others
        return sha256_of_json({"spec": self.spec, "shards": rows})

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, sorted."""
        return tuple(sorted({shard.split for shard in self.shards}))

    def split(self, name: str) -> tuple[ShardInfo, ...]:
        """The shards of one split in manifest order. Raises ValueError naming the splits there are."""
        found = tuple(shard for shard in self.shards if shard.split == name)
        if not found:
            raise ValueError(f"{self.url} has no split {name!r}; it has: {', '.join(self.splits) or 'no shards'}")
        return found

    def samples(self, name: str) -> int:
        """Number of samples of one split. Raises ValueError for an unknown split."""
        return sum(shard.samples for shard in self.split(name))


def manifest_url(url: str) -> str:
    """Address of the manifest for a dataset prefix (or the manifest's own address, unchanged)."""
    return url if url.endswith(".parquet") else storage.join(url, MANIFEST_NAME)


def dataset_url(url: str) -> str:
    """Address of the folder that the manifest lies in."""
    return manifest_url(url).rpartition("/")[0] or "."


def shard_url(manifest: str, info: ShardInfo) -> str:
    """Address of a shard. Raises ShardError when the manifest's path would leave the dataset's folder."""
    if info.file.startswith("/") or "\\" in info.file or ".." in info.file.split("/"):
        raise ShardError(info.path, "refused_member", f"the path leaves the folder of {manifest_url(manifest)}")
    return storage.join(dataset_url(manifest), info.file)


def save_manifest(
    url: str, shards: Iterable[ShardInfo], spec: Mapping[str, Any], report: Report | None = None
) -> Manifest:
    """Write `manifest.parquet` for the shards, the last act of making a dataset. Raises StorageError."""
    manifest = Manifest(manifest_url(url), tuple(shards), dict(spec), report or {})
    rows = [{**asdict(shard), "members": sorted(shard.members.items())} for shard in manifest.shards]
    metadata = {SPEC_KEY: canonical_json(manifest.spec).encode()}
    if report:
        metadata[REPORT_KEY] = canonical_json(report).encode()
    schema = MANIFEST_SCHEMA.with_metadata(metadata)
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    storage.write_bytes(manifest.url, buffer.getvalue())
    return manifest


def load_manifest(url: str, retry_s: float = RETRY_S) -> Manifest:
    """Read the manifest of a dataset prefix (or at the address of the manifest itself), retried for `retry_s` seconds.

    Raises ShardError when there is none or it is not one of ours, StorageError when storage cannot be used.
    """
    address = manifest_url(url)
    try:
        data = storage.read_bytes(address, retry_s)
    except storage.ObjectMissingError as error:
        detail = (
            "there is no manifest here: the prefix is empty or its shards are unfinished; make them with "
            "jobs/make_shards.py (its `webdataset` command indexes existing shards)"
        )
        raise ShardError(address, "missing", detail) from error
    with foreign(
        lambda what: ShardError(address, "replaced", f"not a manifest of this format ({what}); make the shards anew")
    ):
        check_nesting(data[-8 - int.from_bytes(data[-8:-4], "little") :])
        table = pq.read_table(io.BytesIO(data))
        spec = json.loads((table.schema.metadata or {})[SPEC_KEY])
        if "row_group" not in table.column_names:  # of a manifest that is older than they are
            table = table.append_column("row_group", pa.array([""] * len(table), pa.string()))
        rows = table.select(MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA).to_pylist()
        report = json.loads((table.schema.metadata or {}).get(REPORT_KEY, b"{}"))
        return Manifest(address, tuple(map(_shard_of_row, rows)), dict(spec), dict(report))


def _shard_of_row(row: dict[str, Any]) -> ShardInfo:
    if lacking := [name for name, value in row.items() if value is None]:
        raise ValueError(f"a shard without {lacking[0]}")
    if row["samples"] < 0 or row["bytes"] < 0:
        raise ValueError(f"the shard {quoted(row['path'])} has {row['samples']} samples and {row['bytes']} bytes")
    info = ShardInfo(**{**row, "members": dict(row["members"])})
    if (group := info.parsed_group()) is not None and group.bytes != info.bytes:
        raise ValueError(f"the row group {quoted(info.path)} has {group.bytes} bytes, not {info.bytes}")
    return info


# ------------------------------------------------------------------------------------------------------------- reading


def _body_fault(shard: str, data: bytes, info: ShardInfo) -> ShardError | None:
    """What is wrong with the bytes of a shard against its row of the manifest; None when they are the ones written."""
    again = f"restore the shard, or {MAKE_ANEW}"
    if len(data) == info.bytes and sha256(data) == info.sha256:
        return None
    if not info.row_group and not looks_like_tar(data):
        return ShardError(shard, "not_a_tar", f"not a tar ({len(data)} bytes that start {data[:16]!r}); {again}")
    if len(data) < info.bytes:
        return ShardError(shard, "truncated", f"truncated: {len(data)} of {info.bytes} bytes; {again}")
    detail = f"replaced after the manifest was written: length {len(data)} (manifest {info.bytes}) or checksum differ"
    return ShardError(shard, "replaced", f"{detail}; {again}")


def check_shards(manifest: Manifest) -> list[str]:
    """What is wrong with the shards of a manifest, a line for each, after reading all of them; [] where nothing is."""
    found = []
    for info in manifest.shards:
        try:
            _verified_body(shard_url(manifest.url, info), info, RETRY_S)
        except ShardUnreadableError:
            raise
        except ShardError as error:
            found.append(str(error))
    return found


def read_shard(
    manifest: str, info: ShardInfo, retry_s: float = RETRY_S, backoff: Backoff | None = None
) -> list[tuple[str, Members]]:
    """The samples of one shard, in order: (key, members by lower-case extension).

    `manifest` is the manifest's URL or its prefix. What is read (a tar whole, of a table the columns of one row group)
    is compared with the manifest. A fault of storage is met by full re-reads until `retry_s` after the first one. A
    wrong body, and a missing object, may be a fault on the wire or of a server that just starts: they are believed
    after AT_REST_READS reads, with the pauses of `backoff` (None: the usual ones).

    Raises ShardError naming the shard and the fault, ShardUnreadableError where storage failed for longer than
    `retry_s`; StorageError for a missing bucket or refused credentials.
    """
    url = shard_url(manifest, info)
    body = retry(
        lambda: _verified_body(url, info, retry_s),
        url,
        retry_s=inf,
        transient=lambda error: isinstance(error, ShardError) and not isinstance(error, ShardUnreadableError),
        backoff=backoff,
        attempts=AT_REST_READS,
    )
    if body.group is None:
        samples = parse_shard(body.data, url).samples
    else:
        samples = row_group.decode(info.path, *body.group, body.data, storage.join(dataset_url(manifest), info.path))
    if len(samples) != info.samples:
        detail = f"{len(samples)} samples, but the manifest says {info.samples}; {MAKE_ANEW}"
        raise ShardError(url, "wrong_count", detail)
    return samples


class _Body(NamedTuple):
    """The bytes of a shard; of a row group also what it is, and the head of its file."""

    data: bytes
    group: tuple[RowGroup, Head] | None = None


def _verified_body(url: str, info: ShardInfo, retry_s: float) -> _Body:
    """The bytes of a shard, the ones that the manifest was written of. Raises ShardError, StorageError."""
    try:
        body = _body(url, info.parsed_group(), retry_s)
    except storage.ObjectMissingError as error:
        detail = f"missing, but the manifest lists it; restore it, or {MAKE_ANEW}"
        raise ShardError(url, "missing", detail) from error
    except storage.TransientStorageError as error:
        detail = (
            f"could not be read, though it was tried again for {retry_s:.0f} s (data.read_patience_s); start "
            f"the same command again when storage answers: {error}"
        )
        raise ShardUnreadableError(url, "unreadable", detail) from error
    if fault := _body_fault(url, body.data, info):
        raise fault
    return body


def _body(url: str, group: RowGroup | None, retry_s: float) -> _Body:
    if group is None:
        return _Body(storage.read_bulk(url, retry_s))
    head, data = row_group.read(url, group, retry_s)
    return _Body(data, (group, head))


def fetch_shard(
    manifest: str, info: ShardInfo, retry_s: float = RETRY_S, bad_shards: BadShards = "fail"
) -> list[tuple[str, Members]]:
    """What a stream trains on: `read_shard`, and what becomes of a shard that is wrong at rest.

    "fail" raises its ShardError. "drop" gives `info.samples` samples in its place that `parse_sample` refuses with the
    reason `bad_shard`: they keep their rows, are counted and listed, and fall under the ceiling of faulty samples. A
    shard that storage does not deliver (`unreadable`) is never dropped. Raises ShardError, StorageError.
    """
    try:
        return read_shard(manifest, info, retry_s)
    except ShardError as error:
        if bad_shards == "fail" or isinstance(error, ShardUnreadableError):
            raise
        return [(f"{info.path}[{index}]", faulty_members("bad_shard", str(error))) for index in range(info.samples)]


# ------------------------------------------------------------------------------------------------------------- writing


def shard_info(
    path: str, split: str, data: bytes, samples: Sequence[tuple[str, Members]], group: str = ""
) -> ShardInfo:
    """The row of the manifest for the bytes of a shard and its samples; `group` is its `row_group`."""
    members = Counter(extension for _, members in samples for extension in members)
    return ShardInfo(path, split, len(samples), len(data), sha256(data), dict(sorted(members.items())), group)


def write_shards(
    samples: Iterable[tuple[str, Mapping[str, bytes]]],
    url: str,
    split: str,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    on_shard: Callable[[ShardInfo], None] = lambda info: None,
) -> tuple[ShardInfo, ...]:
    """Write samples as `{split}-000000.tar`, ... under the prefix `url`; the manifest is the caller's last act.

    A shard is packed in memory and written as one object, so a reader sees a whole shard or none. The same samples in
    the same order give the same bytes. `on_shard` hears of every shard written.
    Raises ValueError for a bad split name, shard size, key or member, and for a key that occurs twice; StorageError.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
    if not _SPLIT_NAME.fullmatch(split):
        raise ValueError(f"the split name {split!r} cannot be a file name; use lower-case letters, digits and _")
    infos: list[ShardInfo] = []
    seen: set[str] = set()
    batch: list[tuple[str, Members]] = []

    def flush() -> None:
        path = f"{split}-{len(infos):06d}.tar"
        data = pack_shard(batch)
        storage.write_bytes(storage.join(url, path), data)
        infos.append(shard_info(path, split, data, batch))
        batch.clear()
        on_shard(infos[-1])

    for key, members in samples:
        if key in seen:
            raise ValueError(f"the key {key!r} occurs twice in the split {split!r}; keys must be unique")
        seen.add(key)
        batch.append((key, dict(members)))
        if len(batch) == samples_per_shard:
            flush()
    if batch:
        flush()
    return tuple(infos)
