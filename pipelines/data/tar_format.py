"""Tar bytes to samples and back: the only code that opens or makes a tar.

A shard is a WebDataset tar: members of one sample are neighbours and share the key, which ends at the first dot of the
base name. Parsing is strict, because Python's tarfile ends silently at damage between two members: a shard that breaks
off anywhere is an error, and nothing of a shard ever touches the disk or is unpickled.
"""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipelines.io.errors import TransientError

ShardFault = Literal[
    "missing", "unreadable", "truncated", "not_a_tar", "replaced", "wrong_count", "duplicate_key", "refused_member"
]

_TAR_BLOCK = 512
# Suffixes that some reader would unpickle: refused by name, whatever decoder stands behind.
_PICKLE_SUFFIXES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "ckpt"})
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # the key ends at the first dot of the base name
_WRITABLE_KEY = re.compile(r"^[A-Za-z0-9_-]{1,80}$")
_WRITABLE_EXTENSION = re.compile(r"^[a-z0-9]+(\.[a-z0-9]+)?$")

Members = dict[str, bytes]
"""Members of one sample by extension."""


class ShardError(ValueError):
    """A shard or manifest cannot be trusted. `shard` is its address, `fault` the kind, the message says what to do."""

    def __init__(self, shard: str, fault: ShardFault, detail: str) -> None:
        super().__init__(f"{shard}: {detail}")
        self.shard = shard
        self.fault: ShardFault = fault
        self.detail = detail

    def __reduce__(self) -> tuple[type["ShardError"], tuple[str, ShardFault, str]]:
        return type(self), (self.shard, self.fault, self.detail)  # survives the way between Ray processes


class ShardUnreadableError(ShardError, TransientError):
    """Storage did not deliver a shard, however often it was asked: no fault of the data."""


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


def pack_shard(samples: Sequence[tuple[str, Mapping[str, bytes]]]) -> bytes:
    """A tar of the samples in their order: the inverse of parse_shard. Equal samples give equal bytes.

    Members are sorted by extension; times, owners and modes are fixed. Raises ValueError naming the key for a key or an
    extension that could not be read back.
    """
    import webdataset  # it pulls torch in, which readers need not wait for

    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, user="", group="", mode=0o444, compress=False, encoder=False, mtime=0) as writer:
        for key, members in samples:
            if not _WRITABLE_KEY.match(key) or (key.startswith("__") and key.endswith("__")):
                raise ValueError(f"the key {key!r} cannot be written; use 1 to 80 of the characters A-Z a-z 0-9 _ -")
            for extension in members:
                if not _WRITABLE_EXTENSION.match(extension) or extension.rpartition(".")[2] in _PICKLE_SUFFIXES:
                    raise ValueError(f"the key {key!r} has a member {extension!r} that cannot be written to a shard")
            writer.write({"__key__": key, **members})
    return buffer.getvalue()
