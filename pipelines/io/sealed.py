"""Folders whose every byte is known: a list of SHA-256, written with the files, checked by whoever reads them.

Each process that writes into a folder leaves one list, `checksums-00000-of-00002.json`: its files, and how many lists
there are. So nothing is gathered, and a file or a list that is missing is noticed. A list is stored before its files: a
folder whose list names files that are not there is an upload that was cut short, and says so itself. The exported
model's `checksums.json` (`pipelines.registry.folder`) is read, too. Folders of earlier versions have no list; they are
read as they are.

A body that is not the listed one may be a fault on the wire, so it is believed after `READS` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

from meteor_model.foreign import foreign
from pipelines.io import codec, storage
from pipelines.io.fingerprint import RunningSha256, canonical_json, sha256, sha256_of_file
from pipelines.io.local_disk import writing
from pipelines.io.retry import RETRY_S, retry
from pipelines.io.s3_config import s3_config

LIST_VERSION = 1
READS = 4
LIST_MISSING = "the list is missing"
READERS = 8  # files at once
EXPORT_LIST = "checksums.json"
_LIST = re.compile(r"checksums-(\d{5})-of-(\d{5})\.json")


class DamagedFileError(storage.StorageError):
    """A stored file is not the one that was written, however often it is read.

    Args:
        folder: address of the folder.
        name: of the file in it.
        detail: what is wrong.
    """

    def __init__(self, folder: str, name: str, detail: str) -> None:
        super().__init__(
            f"{storage.join(folder, name)} is damaged: {detail}. It was read {READS} times; restore it, or do without "
            "the folder"
        )
        self.folder, self.name, self.detail = folder, name, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.name, self.detail)


@dataclass(frozen=True)
class FileSum:
    """What a file was when it was written."""

    sha256: str
    bytes: int | None = None
    """Not said by the list of an exported model."""


@dataclass(frozen=True)
class _List:
    version: int
    files: dict[str, FileSum]
    sha256: str
    """Of the rest."""


# -------------------------------------------------------------------------------------------------------------- writing


def list_name(part: int = 0, parts: int = 1) -> str:
    """Name of the list of writer `part` of `parts`."""
    return f"checksums-{part:05d}-of-{parts:05d}.json"


def is_list(name: str) -> bool:
    """Whether a file of this name is a list."""
    return _LIST.fullmatch(name) is not None


def sums_of(folder: Path) -> dict[str, FileSum]:
    """The sums of all files of a local folder, lists left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not is_list(path.name))
    return {path.relative_to(folder).as_posix(): sum_of(path) for path in paths}


def sum_of(path: Path) -> FileSum:
    """The sum of one local file."""
    return FileSum(sha256_of_file(path), path.stat().st_size)


def encode_list(files: Mapping[str, FileSum]) -> bytes:
    """The list as it is stored."""
    plain = {name: asdict(one) for name, one in sorted(files.items())}
    body = {"version": LIST_VERSION, "files": plain}
    return (json.dumps({**body, "sha256": sha256(canonical_json(body))}, indent=1) + "\n").encode()


def write_list(url: str, files: Mapping[str, FileSum], part: int = 0, parts: int = 1, retry_s: float = RETRY_S) -> None:
    """Store the list of a folder. Raises StorageError."""
    storage.write_bytes(storage.join(url, list_name(part, parts)), encode_list(files), retry_s)


# -------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Folder:
    """A stored folder: what lies in it, and what its lists say."""

    url: str
    present: Mapping[str, int]
    """Bytes by path, as storage lists them, lists included."""
    sums: Mapping[str, FileSum] | None
    """By path; None for a folder without a list."""

    @property
    def missing(self) -> list[str]:
        """Listed files that are not there, or have another length."""
        return sorted(
            name
            for name, one in (self.sums or {}).items()
            if name not in self.present or one.bytes not in (None, self.present[name])
        )

    @property
    def identity(self) -> str:
        """Changes with the content (of a folder without a list: with names and sizes)."""
        store = s3_config().endpoint if storage.is_s3(self.url) else None
        known = None if self.sums is None else {name: one.sha256 for name, one in self.sums.items()}
        return sha256(canonical_json([self.url, store, known or dict(self.present)]))

    @property
    def wanted(self) -> list[str]:
        """The files that a copy has: the listed ones; all, where an exported model or an old folder is copied."""
        if self.sums is None or EXPORT_LIST in self.present:
            return sorted(self.present)
        return sorted(self.sums)


def open_folder(url: str, present: Mapping[str, int] | None = None) -> Folder:
    """Read the lists of a folder.

    Args:
        url: of the folder.
        present: bytes by path, where they are known already.

    Raises:
        DamagedFileError: a list that is damaged, or missing where the others count it.
        StorageError: if storage fails.
    """
    found = storage.list_sizes(url) if present is None else dict(present)
    names = [name for name in found if _LIST.fullmatch(name)]
    if not names:
        return Folder(url, found, _export_sums(url) if EXPORT_LIST in found else None)
    parts = {int(name[-10:-5]) for name in names}
    expected = [list_name(part, count) for count in sorted(parts)[-1:] for part in range(count)]
    for name in expected:
        if name not in found:
            raise DamagedFileError(url, name, LIST_MISSING)
    sums: dict[str, FileSum] = {}
    for name in expected:
        listed = _read_list(url, name)
        if not listed:
            raise DamagedFileError(url, name, f"it names no file: writer {int(name[10:15])} left none")
        sums |= listed
    return Folder(url, found, sums)


def read_file(url: str, name: str) -> bytes:
    """A small file of a folder, the one that was written.

    Raises:
        ObjectMissingError: there is no such file, and no list names it.
        DamagedFileError, StorageError: as `open_folder`.
    """
    lists = [item for item in storage.list_files(url) if _LIST.fullmatch(item)]
    if not lists:
        return storage.read_bytes(storage.join(url, name))
    first = lists[0]  # sorted: that of writer 0, who writes what all have in common
    if first[len("checksums-") :][:5] != "00000":
        raise DamagedFileError(url, list_name(0, int(first[-10:-5])), LIST_MISSING)
    wanted = _read_list(url, first).get(name)
    if wanted is None:
        raise storage.ObjectMissingError(f"{storage.join(url, name)}: no such file, says {first}")
    return _until_right(url, name, lambda: _checked(url, name, storage.read_bytes(storage.join(url, name)), wanted))


def fetch(folder: Folder, target: Path, names: list[str] | None = None) -> None:
    """Bring the files of a folder to this machine, each compared with its sum while it arrives.

    Raises:
        DamagedFileError: naming the file.
        LocalDiskError: the local disk has no room.
        StorageError: if storage fails.
    """
    chosen = folder.wanted if names is None else names
    need = sum(folder.present.get(name, 0) for name in chosen)
    with writing(target, need, f"the copy of {folder.url}"), ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda name: _fetch(folder, name, target / name), chosen):
            pass


def verify(folder: Folder) -> None:
    """Compare the files of a local folder with its lists, where they are. Raises as `fetch`."""
    for name, wanted in (folder.sums or {}).items():

        def check(name: str = name, wanted: FileSum = wanted) -> None:
            path = storage.local_path(folder.url) / name
            if not path.is_file():
                raise DamagedFileError(folder.url, name, "it is missing")
            _compare(folder.url, name, path.stat().st_size, sha256_of_file(path), wanted)

        _until_right(folder.url, name, check)


# --------------------------------------------------------------------------------------------------------- one document


def seal_document(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the SHA-256 of its content beside it."""
    body = {name: item for name, item in value.items() if name != "sha256"}
    return {**body, "sha256": sha256(canonical_json(json.loads(json.dumps(body))))}


def write_document(url: str, value: Mapping[str, Any], retry_s: float = RETRY_S) -> None:
    """Store a sealed JSON object. Raises StorageError."""
    storage.write_json(url, seal_document(value), retry_s)


def read_document(url: str) -> dict[str, Any]:
    """What `write_document` stored; one of an earlier version, which has no sum, as it is.

    Raises:
        DamagedFileError: content that is not what was written.
        StorageError: if storage fails; ObjectMissingError where there is none.
    """
    folder, _, name = url.rpartition("/")

    def read() -> dict[str, Any]:
        data = storage.read_bytes(url)
        with foreign(lambda what: DamagedFileError(folder, name, f"it is no JSON ({what})")):
            value = json.loads(data)
        if not isinstance(value, dict):
            raise DamagedFileError(folder, name, "it is no JSON object")
        if "sha256" in value and seal_document(value)["sha256"] != value["sha256"]:
            raise DamagedFileError(folder, name, "its content is not that of its SHA-256")
        return {key: item for key, item in value.items() if key != "sha256"}

    return _until_right(folder, name, read)


# -------------------------------------------------------------------------------------------------------------- helpers


def _until_right(url: str, name: str, call: Callable[[], Any]) -> Any:
    return retry(
        call,
        storage.join(url, name),
        retry_s=inf,
        transient=lambda error: isinstance(error, DamagedFileError),
        attempts=READS,
    )


def _compare(url: str, name: str, size: int, digest: str, wanted: FileSum) -> None:
    if wanted.bytes is not None and size != wanted.bytes:
        raise DamagedFileError(url, name, f"it has {size} bytes, {wanted.bytes} were written")
    if digest != wanted.sha256:
        raise DamagedFileError(
            url, name, f"its SHA-256 is {digest[:12]}, that of what was written {wanted.sha256[:12]}"
        )


def _checked(url: str, name: str, data: bytes, wanted: FileSum) -> bytes:
    _compare(url, name, len(data), sha256(data), wanted)
    return data


def _read_list(url: str, name: str) -> dict[str, FileSum]:
    def read() -> dict[str, FileSum]:
        data = storage.read_bytes(storage.join(url, name))
        with foreign(lambda what: DamagedFileError(url, name, what)):
            found = codec.decode(_List, data, name)
        if encode_list(found.files) != data:
            raise DamagedFileError(url, name, "the list is not what was written")
        return found.files

    listed: dict[str, FileSum] = _until_right(url, name, read)
    return listed


def _export_sums(url: str) -> dict[str, FileSum]:
    def read() -> dict[str, FileSum]:
        data = storage.read_bytes(storage.join(url, EXPORT_LIST))
        with foreign(lambda what: DamagedFileError(url, EXPORT_LIST, f"it is no list ({what})")):
            return {str(name): FileSum(str(digest)) for name, digest in json.loads(data).items()}

    listed: dict[str, FileSum] = _until_right(url, EXPORT_LIST, read)
    return listed


def _fetch(folder: Folder, name: str, target: Path) -> None:
    url = storage.join(folder.url, name)
    stated = folder.present.get(name)
    wanted = (folder.sums or {}).get(name)
    target.parent.mkdir(parents=True, exist_ok=True)

    def copy() -> tuple[int, str]:
        digest, size = RunningSha256(), 0
        with writing(target, stated, f"the copy of {url}"), target.open("wb") as sink:
            for piece in storage.pieces(url):
                digest.add(piece)
                size += sink.write(piece)
        return size, digest.hex()

    def attempt() -> None:
        try:
            size, digest = copy()
        except storage.ObjectMissingError as error:
            raise DamagedFileError(folder.url, name, "it is missing") from error
        if wanted is not None:
            _compare(folder.url, name, size, digest, wanted)
        elif size != stated:
            raise DamagedFileError(folder.url, name, f"{size} bytes arrived, storage states {stated}")

    _until_right(folder.url, name, attempt)
