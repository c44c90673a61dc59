"""Tar bytes to samples and back: the only code that opens or makes a tar.

A shard is a WebDataset tar: members of one sample are neighbours and share the key, which ends at the first dot of the
base name. Parsing is strict, because Python's tarfile ends silently at the first header that it cannot read, and at the
first end-of-archive mark: here every byte is accounted for. Archives that were appended to each other are read on; any
other byte behind an end, and a shard that breaks off anywhere, is an error. Nothing of a shard ever touches the disk or
is unpickled.
"""

import io
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from meteor_model.foreign import foreign, quoted
from pipelines.data.schema import CAPTION_EXTENSION, IMAGE_EXTENSIONS, RECORD_EXTENSION
from pipelines.io.errors import TransientError

ShardFault = Literal[
    "missing",
    "unreadable",
    "truncated",
    "not_a_tar",
    "replaced",
    "wrong_count",
    "duplicate_key",
    "dotted_key",
    "refused_member",
    "not_a_table",
    "wrong_columns",
    "too_large",
]

MAX_NAME = 4096
"""Characters of a key, or of a member's name: the longest path of Linux."""
_TAR_BLOCK = 512
_MAX_HEADER_BYTES = 2**14  # of a long name or a pax header: a name of MAX_NAME, and room to spare
_MAX_HEADERS = 16  # of one member: long name, long link, pax headers
_MAX_DIGITS = 64  # in a row in a pax header; tarfile's time goes by their square
_HEADER_TYPES = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
# Suffixes that some reader would unpickle: refused by name, whatever decoder stands behind.
_PICKLE_SUFFIXES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "ckpt"})
_PAX_RECORD = re.compile(rb"([0-9]{1,5}) [^=\n]{1,256}=")
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


def looks_like_tar(data: bytes) -> bool:
    """Whether the first block carries a valid tar header checksum (or is the zero block of an empty tar)."""
    block = data[:_TAR_BLOCK]
    if len(block) < _TAR_BLOCK:
        return False
    if not any(block):
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except Exception:  # whatever it is, it is no header
        return False
    return True


def _sort_entry(entry: tarfile.TarInfo, shard: str) -> tuple[str, str] | str:
    r"""(key, extension) of a tar entry, or the reason why it is ignored. Raises ShardError for a refused one.

    Bytes of a name that are no UTF-8 become `\xNN`: keys and extensions go into tables of text.
    """
    name = entry.name
    if len(name) > MAX_NAME:
        detail = f"the member {quoted(name)} has a name of {len(name)} characters; the limit is {MAX_NAME}"
        raise ShardError(shard, "refused_member", detail)
    if entry.isdir():
        return "directory"
    if not entry.isreg() or entry.issparse():
        return "link_or_device"
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        detail = f"the member {quoted(name)} has a path that leaves the archive; refused, rebuild the shard without it"
        raise ShardError(shard, "refused_member", detail)
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").removeprefix("./")
    base = name.rpartition("/")[2]
    if base.startswith("__") and base.endswith("__"):
        return "metadata"
    match = _KEY_AND_EXTENSION.match(name)
    if match is None:
        return "no_key_or_extension"
    extension = match.group(2).lower()
    if extension.rpartition(".")[2] in _PICKLE_SUFFIXES:
        detail = f"the member {quoted(name)} is pickled data, which can run code when read"
        detail += "; refused, rebuild the shard without it"
        raise ShardError(shard, "refused_member", detail)
    return match.group(1), extension


def _damaged(data: bytes, shard: str, offset: int, what: str) -> ShardError:
    return ShardError(shard, "truncated", f"the tar breaks off or is damaged at byte {offset} of {len(data)}: {what}")


def _end_of_zeros(data: bytes, shard: str, start: int) -> int:
    """Where the zero blocks that begin at `start` end: at the first block of another archive, or with the data.

    Raises ShardError for less than one block, and for a lone one in front of something: no archive ends so; the file
    was cut, or a member's header wiped.
    """
    if len(data) - start < _TAR_BLOCK:
        raise _damaged(data, shard, start, "it ends within its end-of-archive mark")
    offset = start
    while offset < len(data) and not any(data[offset : offset + _TAR_BLOCK]):
        offset += _TAR_BLOCK
    if offset >= len(data):
        return len(data)
    if offset - start == _TAR_BLOCK:
        raise _damaged(data, shard, start, "a lone zero block where a member's header should be")
    return offset


def _check_extensions(data: bytes, offset: int) -> None:
    """Raise an error unless the extended headers of a member, if any, are few, short and of their form.

    tarfile believes what they say, and its time can go by the square of their length.
    """
    for _ in range(_MAX_HEADERS + 1):
        header = tarfile.TarInfo.frombuf(data[offset : offset + _TAR_BLOCK], "utf-8", "surrogateescape")
        if header.type not in _HEADER_TYPES:
            return
        if not 0 <= header.size <= _MAX_HEADER_BYTES:
            raise ValueError(f"an extended header of {header.size} bytes; the limit is {_MAX_HEADER_BYTES}")
        start = offset + _TAR_BLOCK
        if header.type not in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            _check_pax(data[start : start + header.size])
        offset = start + -(-header.size // _TAR_BLOCK) * _TAR_BLOCK
    raise ValueError(f"a member of more than {_MAX_HEADERS} extended headers")


def _check_pax(body: bytes) -> None:
    if run := re.search(rb"[0-9]{%d}" % (_MAX_DIGITS + 1), body):
        raise ValueError(f"a pax header with more than {_MAX_DIGITS} digits in a row at byte {run.start()}")
    position = 0
    while position < len(body) and body[position]:
        record = _PAX_RECORD.match(body, position)
        end = position + int(record.group(1)) if record else 0
        if record is None or not record.end() < end <= len(body) or body[end - 1] != ord("\n"):
            raise ValueError(f"a pax header without a record at byte {position}")
        position = end


def _entry_at(archive: tarfile.TarFile, data: bytes, shard: str, offset: int) -> tarfile.TarInfo:
    """The entry whose header begins at `offset`; `archive.offset` is then behind its content. Raises ShardError."""
    stream = archive.fileobj
    assert stream is not None
    stream.seek(offset)
    with foreign(lambda what: _damaged(data, shard, offset, f"no header of a member there ({what})")):
        _check_extensions(data, offset)
        entry = tarfile.TarInfo.fromtarfile(archive)
        if not re.fullmatch("[0-9]{1,19}", entry.pax_headers.get("size", "0")):  # tarfile takes it for 0
            raise ValueError(f"a pax header gives the size {quoted(entry.pax_headers['size'])}")
    if entry.size < 0 or archive.offset <= offset:
        raise _damaged(data, shard, offset, f"the header of {quoted(entry.name)} gives it {entry.size} bytes")
    if archive.offset > len(data):
        detail = f"the member {quoted(entry.name)} needs {archive.offset - entry.offset_data} bytes from byte "
        raise _damaged(data, shard, offset, f"{detail}{entry.offset_data} on")
    return entry


def _entries(data: bytes, shard: str) -> Iterator[tarfile.TarInfo]:
    """Every entry of a tar, and of the tars that were appended to it; `parse_shard` says what is raised.

    Each entry is followed by another, or by zero blocks; zero blocks by the first entry of the next archive, or by
    nothing. So no byte is passed over unread.
    """
    offset, ended = 0, False
    with tarfile.TarFile(fileobj=io.BytesIO(b"\0" * 2 * _TAR_BLOCK)) as archive:
        archive.fileobj = io.BytesIO(data)  # given here: the constructor would read the first entry by itself
        while offset < len(data):
            if not any(data[offset : offset + _TAR_BLOCK]):
                offset, ended = _end_of_zeros(data, shard, offset), True
                continue
            entry = _entry_at(archive, data, shard, offset)
            yield entry
            offset, ended = archive.offset, False
    if not ended:
        raise _damaged(data, shard, min(offset, len(data)), "it ends without an end-of-archive mark")


def _dotted(members: Mapping[str, bytes]) -> str | None:
    """An extension that is the end of a key with a dot in it, and a real extension; None where there is none.

    `a.v1.json, a.v1.jpg, a.v2.json, a.v2.jpg` are one sample `a` by WebDataset's rule, and no sample to train on.
    """
    plain = RECORD_EXTENSION in members or CAPTION_EXTENSION in members
    for extension in members:
        stem, _, kind = extension.rpartition(".")
        if not stem or kind not in (RECORD_EXTENSION, CAPTION_EXTENSION):
            continue
        paired = any(f"{stem}.{image}" in members for image in IMAGE_EXTENSIONS)
        if paired or not plain or b'"conversations"' in members[extension]:
            return extension
    return None


def parse_shard(data: bytes, shard: str) -> ShardContents:
    """Split the bytes of a tar into samples; members of one key must be neighbours. Nothing touches the disk.

    Extensions are lower-cased. Directories, links, devices, `__meta__` and names without a key or an extension are
    ignored and counted. Raises ShardError (not_a_tar, truncated, duplicate_key, dotted_key, refused_member) naming
    `shard`, and the byte where it is damaged.
    """
    if not looks_like_tar(data):
        raise ShardError(shard, "not_a_tar", f"not an (uncompressed) tar: {len(data)} bytes that start {data[:16]!r}")
    samples: list[tuple[str, dict[str, bytes]]] = []
    seen: set[str] = set()
    ignored: Counter[str] = Counter()
    for entry in _entries(data, shard):
        sorted_entry = _sort_entry(entry, shard)
        if isinstance(sorted_entry, str):
            ignored[sorted_entry] += 1
            continue
        key, extension = sorted_entry
        if not samples or samples[-1][0] != key:
            if key in seen:
                detail = f"the key {quoted(key)} is there twice, or its members are not neighbours"
                raise ShardError(shard, "duplicate_key", f"{detail}; keys must be unique")
            seen.add(key)
            samples.append((key, {}))
        if extension in samples[-1][1]:
            detail = f"the key {quoted(key)} is there twice: two members {quoted(extension)}; keys must be unique"
            raise ShardError(shard, "duplicate_key", detail)
        # A slice, not extractfile: one copy, and a member cannot claim more bytes than the archive has.
        samples[-1][1][extension] = data[entry.offset_data : entry.offset_data + entry.size]
    for key, members in samples:
        if (dotted := _dotted(members)) is not None:
            detail = (
                f"the key of {quoted(f'{key}.{dotted}')} has a dot in it: a key ends at the first dot of the base "
                f"name, so all files of {quoted(key)} are one sample; rename them, with _ for the dot, and rebuild the "
                "shard"
            )
            raise ShardError(shard, "dotted_key", detail)
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
            if (dotted := _dotted(members)) is not None:
                raise ValueError(f"the key {key!r} has a member {dotted!r} that is no sample's when written to a shard")
            writer.write({"__key__": key, **members})
    return buffer.getvalue()
