"""What a sample holds beyond what is read: refused by name where it changes the meaning, else counted by name.

A record of a film whose `video` is passed over would train an answer without what it is about. A URL or a width that
is passed over changes nothing. So the first makes the sample a faulty one, and the second is counted when the shards
are made or indexed.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_MODALITY = r"(video|audio|speech|sound|music|voice|frame|depth|point_?cloud|lidar|thermal)"
_REFUSED_FIELD = re.compile(
    rf"^({_MODALITY}s?(_?(path|file|url|uri|name|list|map|token|data))?s?"
    r"|image_?(\d+|list)|system(_?(prompt|message))?|tools?|functions?|messages|chosen|rejected)$",
    re.IGNORECASE,
)
_REFUSED_OF_TURN = re.compile(
    rf"^({_MODALITY}s?(_?(path|file|url))?s?|images?(_?(path|file|url))?s?|tool_?calls?)$", re.I
)
_WEIGHT_OF_TURN = re.compile(r"^(loss|train|trainable|learn|weight|loss_?(weight|mask))$", re.IGNORECASE)
_PLACEHOLDER_LINE = re.compile(rf"^\s*<{_MODALITY}s?>\s*$", re.IGNORECASE | re.MULTILINE)
_FILMS_AND_SOUNDS = "mp4 webm avi mov mkv m4v mpg mpeg wav mp3 flac ogg oga opus m4a aac wma"
_OTHER_IMAGES = "bmp tif tiff avif heic heif jp2 jxl svg ppm pgm pbm pnm ico tga dng jfif exr"
_REFUSED_MEMBERS = frozenset(f"{_FILMS_AND_SOUNDS} {_OTHER_IMAGES}".split())
_READ_FIELDS = frozenset({"id", "conversations", "image", "images", "group", "asked"})
_READ_OF_TURN = frozenset({"from", "value", "tags"})
_READ_OF_CAPTION = frozenset({"caption", "status", "group"})


def changes_meaning(name: str) -> bool:
    """Whether a field of this name is never passed over, unless it is empty."""
    return bool(_REFUSED_FIELD.match(name))


def read_beside(captioned: bool) -> frozenset[str]:
    """The fields of a record that are read beside its text and images."""
    return (_READ_OF_CAPTION if captioned else _READ_FIELDS) - {"id", "caption", "conversations", "image", "images"}


def refused_field(record: Mapping[str, Any]) -> str | None:
    """What of a record is not read although it changes the meaning, for people; None where there is nothing."""
    for name, value in record.items():
        if changes_meaning(name) and value:
            return f"the field {name!r} is not read; take it out, or leave the sample out"
    turns = record.get("conversations")
    for position, turn in enumerate(turns if isinstance(turns, list) else ()):
        if not isinstance(turn, Mapping):
            continue
        for name, value in turn.items():
            weighted = _WEIGHT_OF_TURN.match(name) and value not in (None, True, 1)
            if weighted or (_REFUSED_OF_TURN.match(name) and value):
                return f"the field {name!r} of turn {position} is not read; take it out, or leave the sample out"
        text = turn.get("value")
        if turn.get("from") == "human" and isinstance(text, str) and (found := _PLACEHOLDER_LINE.search(text)):
            return f"turn {position} holds {found.group().strip()}, which is not read"
    return None


def named_images(record: Mapping[str, Any]) -> int:
    """How many images the record itself names."""
    counts = [0]
    for name in ("image", "images"):
        value = record.get(name)
        counts.append(sum(map(bool, value)) if isinstance(value, list) else int(bool(value)))
    return max(counts)


def refused_member(extensions: Mapping[str, Any]) -> str | None:
    """A member with a film, a sound, or an image of a format that is not read; None where there is none."""
    return next((name for name in extensions if name.lower().rpartition(".")[2] in _REFUSED_MEMBERS), None)


def unread_fields(record: Mapping[str, Any]) -> Iterator[str]:
    """Names of the fields that are passed over; those of turns, each once, with `turn.` in front."""
    captioned = "conversations" not in record
    yield from (name for name in record if name not in (_READ_OF_CAPTION if captioned else _READ_FIELDS))
    turns = record.get("conversations")
    names = {name for turn in turns if isinstance(turn, Mapping) for name in turn} if isinstance(turns, list) else set()
    yield from sorted(f"turn.{name}" for name in names - _READ_OF_TURN)
