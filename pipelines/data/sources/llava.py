"""Source `llava`: a LLaVA-format file (JSON list or JSON lines) and a folder of images, what users already have.

Everything that can be wrong with a record is found before the first shard is written, and named by record and file.
Image bytes are copied as they are; they are decoded, and judged, when they are read for training.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import NonNegativeInt

from meteor_model.foreign import SHOWN_DETAIL, JsonError, described, parse_json, quoted, shown
from pipelines.data.schema import IMAGE_EXTENSIONS, SampleError, build_members, check_placeholders, parse_turns
from pipelines.data.sources import SPLITS, Packed, SourceError, split_of
from pipelines.data.unread import refused_field, unread_fields
from pipelines.io import storage
from pipelines.io.fingerprint import sha256
from pipelines.io.validation import ShareBelowOne, settings_class

GENERATOR_VERSION = 2  # of 1 the split was drawn by the id alone
_SHOWN = 5  # faults listed in an error


@settings_class(error=SourceError)
class LlavaSettings:
    """Your own conversations about images, in LLaVA's format."""

    records: str
    """The JSON list or JSON lines file (a path or s3:// URL); each record has id, conversations and maybe image."""
    images: str
    """The folder (a path or s3:// URL) that the records' image paths are relative to."""
    heldout_share: ShareBelowOne = 0.02
    """Share of records that is never trained on, chosen by a hash of the first image's path, or of the id of a text."""
    follow_links: bool = False
    """Whether symbolic links in the image folder may lead out of it."""
    limit: NonNegativeInt = 0
    """Take the first so many records only; 0 takes all."""
    faults: Literal["stop", "skip"] = "stop"
    """A faulty record stops the job before anything is written, or is left out and counted."""
    duplicate_ids: Literal["stop", "rename"] = "stop"
    """A second record with an id that was there is a fault, or gets a number appended (both fall in one split)."""


@dataclass(frozen=True)
class Record:
    """A checked record: its shard key, its split, its images' paths below the folder, and what is stored as JSON."""

    key: str
    split: str
    images: tuple[str, ...]
    stored: dict[str, Any]


def key_of(identity: str) -> str:
    """A shard key for an id: the id itself where it can be one, otherwise its safe characters and a hash of it."""
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", identity)[:48]
    if safe == identity and not safe.startswith("__"):
        return safe
    return f"r{safe}-{sha256(identity.encode(errors='surrogatepass'))[:12]}"


def safe_path(path: Any) -> str:
    """An image path of a record as a clean relative path. Raises SampleError when it would leave the image folder."""
    if not isinstance(path, str) or not path.strip():
        raise SampleError("bad_conversation", f"'image' holds {quoted(path)}; expected a path below the image folder")
    parts = PurePosixPath(path.replace("\\", "/")).parts
    if "://" in path or path.startswith(("/", "\\", "~")) or re.match(r"^[A-Za-z]:", path) or ".." in parts:
        raise SampleError("bad_conversation", f"the image path {quoted(path)} leaves the image folder; refused")
    return "/".join(parts)


def _extension(path: str) -> str:
    extension = path.rpartition(".")[2].lower()
    if extension not in IMAGE_EXTENSIONS:
        detail = f"the image {quoted(path)} is not one of {', '.join(IMAGE_EXTENSIONS)} by its name"
        raise SampleError("undecodable_image", detail)
    return extension


def _listed_images(row: dict[str, Any]) -> list[Any]:
    """What `image`, or `images`, of a record holds. Raises SampleError where both do, and differ."""
    image, images = row.get("image"), row.get("images")
    if image is not None and images and images not in (image, [image]):
        raise SampleError("unread_content", "'image' and 'images' name other images; keep one of the two")
    image = images or None if image is None else image
    return [] if image is None else image if isinstance(image, list) else [image]


def _parse_lines(text: str, url: str) -> list[Any]:
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(parse_json(line))
            except JsonError as error:
                raise SourceError(f"{url}: line {number} is not JSON: {error}") from error
    return records


def parse_records(data: bytes, url: str) -> list[Any]:
    """The records of a JSON list or of JSON lines. Raises SourceError naming the file, and the line if there is one."""
    try:
        text = data.decode("utf-8-sig")
        records = parse_json(text, None) if text.lstrip().startswith("[") else _parse_lines(text, url)
    except UnicodeDecodeError as error:
        raise SourceError(f"{url}: not UTF-8 text: {error}") from error
    except JsonError as error:
        raise SourceError(f"{url}: not JSON: {error}") from error
    if not records:
        raise SourceError(f"{url}: holds no records; expected a JSON list or one JSON object a line")
    assert isinstance(records, list)
    return records


class Llava:
    """The source; see LlavaSettings. Reads and checks all records at once; SourceError names the faulty ones."""

    splits: tuple[str, ...] = SPLITS

    def __init__(self, settings: LlavaSettings) -> None:
        self.settings = settings
        self._skipped: Counter[str] = Counter()
        self._faults: list[str] = []
        self._seen: Counter[str] = Counter()
        self._not_read: Counter[str] = Counter()
        data = storage.read_bytes(settings.records)
        self._sha256 = sha256(data)
        self._root = None if storage.is_s3(settings.images) else Path(settings.images).expanduser().resolve()
        if self._root is not None and not self._root.is_dir():
            raise SourceError(f"images={settings.images!r} is not a folder")
        # One listing of the folder says which are missing before anything is written.
        self._stored = None if self._root is not None else frozenset(storage.list_files(settings.images))
        rows = parse_records(data, settings.records)
        if settings.limit and len(rows) > settings.limit:
            self._skipped["past_limit"] = len(rows) - settings.limit
            rows = rows[: settings.limit]
        checked = [self._checked(number, row) for number, row in enumerate(rows)]
        self.records = tuple(record for record in checked if record is not None)
        if self._faults and (settings.faults == "stop" or not self.records):
            raise SourceError(self._fault_summary(len(rows)))

    def _fault_summary(self, total: int) -> str:
        more = len(self._faults) - _SHOWN
        lines = [f"{self.settings.records}: {len(self._faults)} of {total} records cannot be used:"]
        lines += [f"  {fault}" for fault in self._faults[:_SHOWN]]
        if more > 0:
            lines.append(f"  ... and {more} more")
        hint = " (for ids that repeat: --duplicate-ids rename)" if self._skipped["duplicate_id"] else ""
        lines.append(f"correct them, or leave them out with --faults skip{hint}")
        return "\n".join(lines)

    def _fault(self, number: int, identity: object, reason: str, detail: str) -> None:
        self._skipped[reason] += 1
        self._faults.append(f"record {number} (id {quoted(identity)}): {shown(detail, SHOWN_DETAIL)}")

    def _checked(self, number: int, row: Any) -> Record | None:
        """The record of one row, or None after its fault has been noted."""
        if not isinstance(row, dict):
            self._fault(number, None, "bad_json", f"is a {type(row).__name__}, not an object")
            return None
        raw_id = row.get("id")
        if isinstance(raw_id, bool) or not isinstance(raw_id, str | int) or raw_id == "":
            self._fault(number, raw_id, "no_id", "has no 'id' (text or a whole number)")
            return None
        identity = str(raw_id)
        try:
            identity.encode()
            if field := refused_field(row):
                raise SampleError("unread_content", field)
            paths = tuple(safe_path(path) for path in _listed_images(row))
            check_placeholders(parse_turns(row), len(paths))
            for path in paths:
                _extension(path)
                self._require_there(path)
        except SampleError as error:
            self._fault(number, identity, error.reason, error.detail)
            return None
        except UnicodeEncodeError:
            self._fault(number, identity, "no_id", "has an 'id' that is not valid Unicode")
            return None
        repeats = self._seen[identity]
        self._seen[identity] += 1
        if repeats and self.settings.duplicate_ids == "stop":
            self._fault(number, identity, "duplicate_id", "another record has this id")
            return None
        unique = f"{identity}#{repeats}" if repeats else identity
        stored = {"id": unique, "conversations": row["conversations"]}
        self._not_read.update(name for name in unread_fields(row) if not name.startswith("turn."))  # those are kept
        split = split_of(paths[0] if paths else identity, self.settings.heldout_share)
        return Record(key_of(unique), split, paths, stored)

    def _require_there(self, path: str) -> None:
        """The image must be there; of a local folder a file that can be read, and below it if links are followed."""
        if self._stored is not None:
            if path not in self._stored:
                found = quoted(storage.join(self.settings.images, path))
                raise SampleError("undecodable_image", f"the image {found} is missing")
            return
        assert self._root is not None
        file = self._root / path
        try:
            missing = not (file.is_file() and os.access(file, os.R_OK))
        except (OSError, ValueError) as error:  # a name that is too long, or that no file can have
            raise SampleError("undecodable_image", f"the image {quoted(path)}: {described(error)}") from error
        if missing:
            detail = f"the image {quoted(str(file))} is missing, or may not be read"
            raise SampleError("undecodable_image", detail)
        if not self.settings.follow_links and not file.resolve().is_relative_to(self._root):
            detail = f"the image path {quoted(path)} leaves the image folder by a link; allow it with --follow-links"
            raise SampleError("bad_conversation", detail)

    def spec(self) -> dict[str, Any]:
        """Name, every setting, and the checksum of the records file. The images' content is not part of it."""
        settings = asdict(self.settings)
        return {"name": "llava", "version": GENERATOR_VERSION, "records_sha256": self._sha256, "settings": settings}

    def report(self) -> dict[str, int]:
        """Records left out, by reason."""
        return dict(sorted(self._skipped.items()))

    def not_read(self) -> dict[str, int]:
        """Fields of the records that are not stored, by name."""
        return dict(sorted(self._not_read.items()))

    def samples(self, split: str) -> Iterator[Packed]:
        """The records of a split in the order of the file.

        An image that went missing since the records were checked is a SourceError, or leaves its record out; an
        unknown split is one as well.
        """
        if split not in SPLITS:
            raise SourceError(f"llava has no split {split!r}; it has {', '.join(SPLITS)}")
        for record in self.records:
            if record.split != split:
                continue
            try:
                images = [(_extension(path), self._read(record, path)) for path in record.images]
            except SourceError:
                if self.settings.faults == "stop":
                    raise
                self._skipped["undecodable_image"] += 1
                continue
            yield record.key, build_members(record.stored, images)

    def _read(self, record: Record, path: str) -> bytes:
        try:
            return storage.read_bytes(storage.join(self.settings.images, path))
        except storage.ObjectMissingError as error:
            raise SourceError(
                f"record {quoted(record.stored['id'])}: its image is missing: {error}; give the same command again "
                "when it is back, or leave such records out with --faults skip"
            ) from error
