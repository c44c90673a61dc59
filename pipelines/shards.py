"""WebDataset shards and their manifest: what a dataset in storage is, and how it is read without silent loss.

A dataset is a prefix with tar shards (`train-000000.tar`, ...) and `manifest.parquet`, one row a shard: path, split,
samples, bytes, sha256, members (extension -> count). The manifest is written last, so it is the commit mark: a prefix
without one is unfinished. Every read checks length, checksum and sample count against it.
"""

import hashlib
import io
import json
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage

MANIFEST_NAME = "manifest.parquet"
FORMAT_VERSION = 1
SPEC_KEY = b"meteor.spec"
READ_ATTEMPTS = 4
BACKOFF_S = 0.25

ShardFault = Literal[
    "missing", "unreadable", "truncated", "not_a_tar", "replaced", "wrong_count", "duplicate_key", "refused_member"
]

_TAR_BLOCK = 512
# Member suffixes that a reader of the wild would unpickle: never opened, whatever decoder stands behind.
_PICKLE_SUFFIXES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "ckpt"})
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # the key ends at the first dot of the base name

MANIFEST_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("split", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("members", pa.map_(pa.string(), pa.int64())),
    ]
)


class ShardError(ValueError):
    """A shard or manifest cannot be trusted. `shard` is its address, `fault` the kind, the message says what to do."""

    def __init__(self, shard: str, fault: ShardFault, detail: str) -> None:
        super().__init__(f"{shard}: {detail}")
        self.shard = shard
        self.fault: ShardFault = fault
        self.detail = detail

    def __reduce__(self) -> tuple[type["ShardError"], tuple[str, ShardFault, str]]:
        return type(self), (self.shard, self.fault, self.detail)  # survives the way between Ray processes


# ------------------------------------------------------------------------------------------------------------ manifest


@dataclass(frozen=True)
class ShardInfo:
    """One row of the manifest; `path` is relative to the manifest's folder, `members` counts extensions."""

    path: str
    split: str
    samples: int
    bytes: int
    sha256: str
    members: dict[str, int]


@dataclass(frozen=True)
class Manifest:
    """All shards of a dataset in their order, and `spec`: the settings it was made with (format, source, ...)."""

    url: str
    shards: tuple[ShardInfo, ...]
    spec: dict[str, Any]

    @cached_property
    def sha256(self) -> str:
        """Identity of the data: hash of the spec and of all rows (not of the parquet file, whose bytes may vary)."""
        rows = [asdict(shard) for shard in self.shards]
        return hashlib.sha256(canonical_json({"spec": self.spec, "shards": rows}).encode()).hexdigest()

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


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def manifest_url(url: str) -> str:
    """Address of the manifest for a dataset prefix (or the manifest's own address, unchanged)."""
    return url if url.endswith(".parquet") else storage.join(url, MANIFEST_NAME)


def dataset_url(url: str) -> str:
    """Address of the folder that the manifest lies in."""
    return manifest_url(url).rpartition("/")[0] or "."


def shard_url(manifest: str, info: ShardInfo) -> str:
    """Address of a shard. Raises ShardError when the manifest's path would leave the dataset's folder."""
    if info.path.startswith("/") or "\\" in info.path or ".." in info.path.split("/"):
        raise ShardError(info.path, "refused_member", f"the path leaves the folder of {manifest_url(manifest)}")
    return storage.join(dataset_url(manifest), info.path)


def save_manifest(url: str, shards: Iterable[ShardInfo], spec: Mapping[str, Any]) -> Manifest:
    """Write `manifest.parquet` for the shards, the last act of making a dataset. Raises StorageError."""
    manifest = Manifest(manifest_url(url), tuple(shards), dict(spec))
    rows = [{**asdict(shard), "members": sorted(shard.members.items())} for shard in manifest.shards]
    schema = MANIFEST_SCHEMA.with_metadata({SPEC_KEY: canonical_json(manifest.spec).encode()})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, compression="zstd")
    storage.write_bytes(manifest.url, buffer.getvalue())
    return manifest


def load_manifest(url: str) -> Manifest:
    """Read the manifest of a dataset prefix (or at the address of the manifest itself).

    Raises ShardError when there is none or it is not one of ours, StorageError when storage cannot be used.
    """
    address = manifest_url(url)
    try:
        data = storage.read_bytes(address)
    except storage.ObjectMissingError as error:
        detail = (
            "there is no manifest here: the prefix is empty or its shards are unfinished; make them with "
            "jobs/make_shards.py (its `webdataset` command indexes existing shards)"
        )
        raise ShardError(address, "missing", detail) from error
    try:
        table = pq.read_table(io.BytesIO(data))
        spec = json.loads((table.schema.metadata or {})[SPEC_KEY])
        rows = table.select(MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA).to_pylist()
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise ShardError(
            address, "replaced", f"not a manifest of this format ({error}); make the shards anew"
        ) from error
    shards = tuple(ShardInfo(**{**row, "members": dict(row["members"])}) for row in rows)
    return Manifest(address, shards, spec)


# ---------------------------------------------------------------------------------------------------------------- tars


@dataclass(frozen=True)
class ShardContents:
    """Samples of a tar in order, and how many of its entries were ignored by reason (link, no_extension, ...)."""

    samples: list[tuple[str, dict[str, bytes]]]
    ignored: dict[str, int]

    def member_counts(self) -> dict[str, int]:
        """How often each member extension occurs."""
        return dict(sorted(Counter(ext for _, members in self.samples for ext in members).items()))


def looks_like_tar(data: bytes) -> bool:
    """Whether the first block carries a valid tar header checksum (or is the zero block of an empty tar)."""
    block = data[:_TAR_BLOCK]
    if len(block) < _TAR_BLOCK:
        return False
    if not any(block):
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _sort_entry(name: str, entry: tarfile.TarInfo, shard: str) -> tuple[str, str] | str:
    """(key, extension) of a tar entry, or the reason why it is ignored. Raises ShardError for a refused one."""
    if entry.isdir():
        return "directory"
    if not entry.isreg() or entry.issparse():
        return "link_or_device"
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        detail = f"the member {name!r} has a path that leaves the archive; refused, rebuild the shard without it"
        raise ShardError(shard, "refused_member", detail)
    name = name.removeprefix("./")
    base = name.rpartition("/")[2]
    if base.startswith("__") and base.endswith("__"):
        return "metadata"
    match = _KEY_AND_EXTENSION.match(name)
    if match is None:
        return "no_key_or_extension"
    extension = match.group(2).lower()
    if extension.rpartition(".")[2] in _PICKLE_SUFFIXES:
        detail = (
            f"the member {name!r} is pickled data, which can run code when read; refused, rebuild the shard without it"
        )
        raise ShardError(shard, "refused_member", detail)
    return match.group(1), extension


def parse_shard(data: bytes, shard: str) -> ShardContents:
    """Split the bytes of a tar into samples; members of one key must be neighbours. Nothing touches the disk.

    Extensions are lower-cased. Directories, links, devices, `__meta__` and names without a key or an extension are
    ignored and counted. Raises ShardError (not_a_tar, truncated, duplicate_key, refused_member) naming `shard`.
    """
    if not looks_like_tar(data):
        raise ShardError(shard, "not_a_tar", f"not an (uncompressed) tar: {len(data)} bytes that start {data[:16]!r}")
    samples: list[tuple[str, dict[str, bytes]]] = []
    seen: set[str] = set()
    ignored: Counter[str] = Counter()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for entry in archive:
                sorted_entry = _sort_entry(entry.name, entry, shard)
                if isinstance(sorted_entry, str):
                    ignored[sorted_entry] += 1
                    continue
                key, extension = sorted_entry
                if not samples or samples[-1][0] != key:
                    if key in seen:
                        detail = (
                            f"the key {key!r} is there twice, or its members are not neighbours; keys must be unique"
                        )
                        raise ShardError(shard, "duplicate_key", detail)
                    seen.add(key)
                    samples.append((key, {}))
                if extension in samples[-1][1]:
                    detail = f"the key {key!r} is there twice: two members {extension!r}; keys must be unique"
                    raise ShardError(shard, "duplicate_key", detail)
                # A slice, not extractfile: one copy, and a member cannot claim more bytes than the archive has.
                samples[-1][1][extension] = data[entry.offset_data : entry.offset_data + entry.size]
            end = archive.offset  # where the reader stopped: the zero blocks that end an archive, if it is whole
    except tarfile.TarError as error:
        raise ShardError(shard, "truncated", f"the tar breaks off or is damaged: {error}") from error
    marker = data[end : end + _TAR_BLOCK]
    if len(marker) < _TAR_BLOCK or any(marker):
        detail = f"the tar breaks off or is damaged at byte {end} of {len(data)}: no end-of-archive mark there"
        raise ShardError(shard, "truncated", detail)
    return ShardContents(samples, dict(sorted(ignored.items())))


# ------------------------------------------------------------------------------------------------------------- reading


def _body_fault(shard: str, data: bytes, info: ShardInfo) -> ShardError | None:
    """What is wrong with the bytes of a shard against its row of the manifest; None when they are the ones written."""
    again = "restore the shard, or make the manifest anew with jobs/make_shards.py"
    if len(data) == info.bytes and hashlib.sha256(data).hexdigest() == info.sha256:
        return None
    if not looks_like_tar(data):
        return ShardError(shard, "not_a_tar", f"not a tar ({len(data)} bytes that start {data[:16]!r}); {again}")
    if len(data) < info.bytes:
        return ShardError(shard, "truncated", f"truncated: {len(data)} of {info.bytes} bytes; {again}")
    detail = f"replaced after the manifest was written: length {len(data)} (manifest {info.bytes}) or checksum differ"
    return ShardError(shard, "replaced", f"{detail}; {again}")


def read_shard(
    manifest: str, info: ShardInfo, attempts: int = READ_ATTEMPTS, backoff_s: float = BACKOFF_S
) -> list[tuple[str, dict[str, bytes]]]:
    """The samples of one shard, in order: (key, members by lower-case extension).

    `manifest` is the manifest's URL or its prefix. The object is read whole and compared with the manifest; a transient
    fault or a wrong body is met by a full re-read, `attempts` times in all, pausing `backoff_s` seconds and doubling.
    Raises ShardError naming the shard and the fault; StorageError for a missing bucket or refused credentials.
    """
    url = shard_url(manifest, info)
    fault: ShardError | None = None
    for attempt in range(attempts):
        if attempt:
            time.sleep(backoff_s * 2 ** (attempt - 1))
        try:
            data = storage.read_bulk(url)
        except storage.ObjectMissingError as error:
            detail = (
                "missing, but the manifest lists it; restore it, or make the manifest anew with jobs/make_shards.py"
            )
            raise ShardError(url, "missing", detail) from error
        except storage.TransientStorageError as error:
            fault = ShardError(url, "unreadable", f"could not be read in {attempts} attempts: {error}")
            continue
        fault = _body_fault(url, data, info)
        if fault is None:
            samples = parse_shard(data, url).samples
            if len(samples) != info.samples:
                detail = f"{len(samples)} samples, but the manifest says {info.samples}; make the manifest anew"
                raise ShardError(url, "wrong_count", detail)
            return samples
    assert fault is not None, "attempts must be at least 1"
    raise fault
