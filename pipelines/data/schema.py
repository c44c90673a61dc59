"""What one training sample is, and the strict parser from the members of a shard to it.

A sample is `KEY.json` (a LLaVA record: {"id", "conversations": [{"from": "human"|"gpt"|"system", "value"}]}) plus its
images: `KEY.jpg` for one, `KEY.0.jpg, KEY.1.jpg, ...` for several, none for text. Each image is one `<image>` in a
human turn; the images are taken in the order of their placeholders. Or it is one image and its caption, as img2dataset
writes them: `KEY.txt`, or `caption` in a `KEY.json` without conversations.

A reply may carry `tags` (a list of texts), by which scores are broken down, and a record may say `"asked": "apart"`:
its replies are questions on their own, and a score asks each by its own turn and the images, without the turns before.

`Row` is what a sample becomes on the way from the data tasks to the workers; `ROW_SCHEMA` is its form in Arrow.

Shape legend: n images of one sample, S their size (the processor's travelling size).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa

from meteor_model.chat import IMAGE_PLACEHOLDER
from meteor_model.foreign import SHOWN_DETAIL, JsonError, parse_json, quoted, shown
from pipelines.data.sample_id import SampleId
from pipelines.data.unread import named_images, refused_field, refused_member, unread_fields
from pipelines.io.fingerprint import canonical_json

VOID = "void"  # the reason of a row that only fills up the last step
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif")
RECORD_EXTENSION = "json"
CAPTION_EXTENSION = "txt"
CAPTION_QUESTION = f"{IMAGE_PLACEHOLDER}\nDescribe the image."
"""What an image with a caption is asked; the caption is the reply."""

APART = "apart"
"""`asked` of a record whose replies are questions on their own."""

Role = Literal["user", "assistant", "system"]
Reason = Literal[
    "missing_json",
    "bad_json",
    "bad_conversation",
    "missing_caption",
    "missing_image",
    "unread_content",
    "placeholder_missing",
    "placeholder_excess",
    "undecodable_image",
    "image_too_large",
    "too_long",
    "bad_shard",
]
REASONS: tuple[str, ...] = get_args(Reason)

# Begins a member that no tar can hold (extensions have no slash): the rest of its name is why there is no sample.
_FAULT_MEMBER = "FAULT/"

_ROLE_OF_SPEAKER: dict[str, Role] = {"human": "user", "gpt": "assistant", "system": "system"}
_IMAGE_MEMBER = re.compile(rf"^(?:(\d{{1,6}})\.)?({'|'.join(IMAGE_EXTENSIONS)})$", re.IGNORECASE)


class SampleError(ValueError):
    """One sample cannot be used. `reason` is one of REASONS (what is counted), `detail` says what is wrong with it.

    The detail is bounded: it holds words of the sample, travels in rows and is filed.
    """

    def __init__(self, reason: str, detail: str) -> None:
        if reason not in REASONS:
            raise AssertionError(f"unknown reason {reason!r}; REASONS lists them")
        detail = shown(detail, SHOWN_DETAIL)
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)  # survives the way between Ray processes


@dataclass(frozen=True)
class Turn:
    """One utterance; a user turn holds one `<image>` for each of its images, a reply what it is about (`tags`)."""

    role: Role
    text: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class RawSample:
    """A parsed sample.

    Attributes:
        key: of it.
        images: encoded, in the order of their placeholders.
        turns: that alternate user, assistant.
        groups: names that its record gives under `group`: samples that share one are no independent draws.
        apart: its replies are questions on their own, whatever stands before them.
    """

    key: str
    images: tuple[bytes, ...]
    turns: tuple[Turn, ...]
    groups: tuple[str, ...] = ()
    apart: bool = False

    @property
    def conversation(self) -> list[tuple[str, str]]:
        """(role, text) pairs, as `MeteorProcessor.encode` takes them."""
        return [(turn.role, turn.text) for turn in self.turns]


def image_members(extensions: Sequence[str]) -> tuple[str, ...]:
    """The image members of one sample in order (`jpg`, or `0.jpg, 1.png, ...`); members of other kinds are left out.

    Raises SampleError("bad_conversation") when the order is not given: several images without numbers, a number twice
    or a gap in the numbers.
    """
    numbered: dict[int, str] = {}
    plain: list[str] = []
    for extension in sorted(extensions):
        match = _IMAGE_MEMBER.match(extension)
        if match is None:
            continue
        if match.group(1) is None:
            plain.append(extension)
        elif int(match.group(1)) in numbered:
            raise SampleError("bad_conversation", f"image number {int(match.group(1))} is there twice")
        else:
            numbered[int(match.group(1))] = extension
    if plain and (numbered or len(plain) > 1):
        names = ", ".join([*plain, *numbered.values()])
        raise SampleError("bad_conversation", f"several images must be numbered 0, 1, ...; found {names}")
    if plain:
        return tuple(plain)
    order = sorted(numbered)
    if order != list(range(len(order))):
        raise SampleError("bad_conversation", f"images must be numbered 0 to {len(order) - 1}; found {order}")
    return tuple(numbered[number] for number in order)


def _parse_record(data: bytes) -> dict[str, Any]:
    try:
        record = parse_json(data)
    except JsonError as error:
        raise SampleError("bad_json", str(error)) from error
    if not isinstance(record, dict):
        raise SampleError("bad_json", f"the record is a {type(record).__name__}, not an object")
    return record


def _parse_turn(position: int, turn: Any) -> Turn:
    if not isinstance(turn, dict):
        raise SampleError("bad_conversation", f"turn {position} is a {type(turn).__name__}, not an object")
    speaker, text = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _ROLE_OF_SPEAKER:
        raise SampleError(
            "bad_conversation", f"turn {position} is from {quoted(speaker)}; expected human, gpt or system"
        )
    if not isinstance(text, str):
        raise SampleError("bad_conversation", f"turn {position} has no text in 'value'")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise SampleError("bad_conversation", f"turn {position} is not valid Unicode: {error.reason}") from error
    if speaker != "human" and IMAGE_PLACEHOLDER in text:
        raise SampleError("bad_conversation", f"turn {position} ({speaker}) holds {IMAGE_PLACEHOLDER}; only human may")
    return Turn(_ROLE_OF_SPEAKER[speaker], text, _texts(turn.get("tags")) if speaker == "gpt" else ())


def parse_turns(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The turns of a LLaVA record: an optional system turn, then human and gpt in alternation, gpt last.

    Raises SampleError("bad_conversation") naming the turn (counted from 0) that breaks the form.
    """
    conversation = record.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise SampleError("bad_conversation", "'conversations' must be a list with at least one human and one gpt turn")
    turns = tuple(_parse_turn(position, turn) for position, turn in enumerate(conversation))
    first = 1 if turns[0].role == "system" else 0
    for position, turn in enumerate(turns[first:], start=first):
        expected = "user" if (position - first) % 2 == 0 else "assistant"
        if turn.role != expected:
            raise SampleError("bad_conversation", f"turn {position} is from the {turn.role}, expected the {expected}")
    if turns[-1].role != "assistant":
        raise SampleError("bad_conversation", "the last turn must be from gpt: there is nothing to learn after it")
    return turns


def check_placeholders(turns: Sequence[Turn], num_images: int) -> None:
    """Raise SampleError unless the turns hold exactly one `<image>` for each of the images."""
    placeholders = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders < num_images:
        detail = f"{num_images} images but {placeholders} {IMAGE_PLACEHOLDER} in the conversation"
        raise SampleError("placeholder_missing", detail)
    if placeholders > num_images:
        detail = f"{placeholders} {IMAGE_PLACEHOLDER} in the conversation but {num_images} images"
        raise SampleError("placeholder_excess", detail)


def faulty_members(reason: str, detail: str) -> dict[str, bytes]:
    """Members that stand for a sample which could not be read: `parse_sample` raises SampleError of the reason."""
    return {f"{_FAULT_MEMBER}{reason}": shown(detail, SHOWN_DETAIL).encode()}


def parse_sample(key: str, members: Mapping[str, bytes]) -> RawSample:
    """The sample of one key from its members by extension.

    Members and fields that change nothing are passed over (`unread` names them). Raises SampleError with one of the
    reasons missing_json, bad_json, bad_conversation, missing_caption, missing_image, unread_content,
    placeholder_missing, placeholder_excess, or that of `faulty_members`. Images are not decoded here.
    """
    for name, detail in members.items():
        if name.startswith(_FAULT_MEMBER):
            raise SampleError(name.removeprefix(_FAULT_MEMBER), detail.decode())
    members = {name.lower(): data for name, data in members.items()}
    record = _record_of(key, members)
    if member := refused_member(members):
        raise SampleError("unread_content", f"the member .{shown(member)} is not read; leave the sample out")
    if field := refused_field(record):
        raise SampleError("unread_content", field)
    images = image_members(tuple(members))
    if "conversations" in record or not (CAPTION_EXTENSION in members or "caption" in record):
        turns = parse_turns(record)
        if (named := named_images(record)) > len(images):
            raise SampleError("unread_content", f"the record names {named} images, the sample holds {len(images)}")
    else:
        turns = _caption_turns(record, members, len(images))
    check_placeholders(turns, len(images))
    encoded, apart = tuple(members[name] for name in images), record.get("asked") == APART
    return RawSample(key, encoded, turns, _texts(record.get("group")), apart)


def _texts(value: Any) -> tuple[str, ...]:
    """A text, or the texts of a list, that are not empty. Other values are other people's fields."""
    value = [value] if isinstance(value, str) else value
    whole = isinstance(value, list) and all(isinstance(text, str) for text in value)
    return tuple(text for text in value if text) if whole and value else ()


def unread(members: Mapping[str, bytes]) -> list[str]:
    """What of a good sample is passed over: fields by name, members as `.EXTENSION`."""
    record = _record_of("", members)
    captioned = "conversations" not in record
    known = {RECORD_EXTENSION, *image_members(tuple(members)), *([CAPTION_EXTENSION] if captioned else [])}
    return [*unread_fields(record), *(f".{name}" for name in members if name not in known)]


def _record_of(key: str, members: Mapping[str, bytes]) -> dict[str, Any]:
    """The record; empty where a caption needs none, or its metadata are no JSON (img2dataset writes NaN)."""
    captioned = CAPTION_EXTENSION in members
    if RECORD_EXTENSION not in members:
        if captioned:
            return {}
        raise SampleError("missing_json", f"no {shown(key)}.json; members: {', '.join(sorted(members)) or 'none'}")
    data = members[RECORD_EXTENSION]
    try:
        return _parse_record(data)
    except SampleError:
        if captioned and b'"conversations"' not in data:
            return {}
        raise


def _caption_turns(record: Mapping[str, Any], members: Mapping[str, bytes], num_images: int) -> tuple[Turn, ...]:
    """Question and caption of an image."""
    if (status := record.get("status")) not in (None, "success"):
        raise SampleError("missing_caption", f"img2dataset's status of the sample is {quoted(status)}")
    if not num_images:
        raise SampleError("missing_image", "a caption without a conversation needs one image; found 0")
    if num_images > 1:
        raise SampleError("missing_caption", f"a caption without a conversation needs one image; found {num_images}")
    caption: Any = record.get("caption")
    if CAPTION_EXTENSION in members:
        try:
            caption = members[CAPTION_EXTENSION].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SampleError("missing_caption", f"the caption is not UTF-8: {error.reason}") from error
    if not isinstance(caption, str) or not caption.strip():
        raise SampleError("missing_caption", f"the caption is {quoted(caption)}; expected text")
    turns = [{"from": "human", "value": CAPTION_QUESTION}, {"from": "gpt", "value": caption.strip()}]
    return parse_turns({"conversations": turns})


def build_members(record: Mapping[str, Any], images: Sequence[tuple[str, bytes]]) -> dict[str, bytes]:
    """The members of a shard for a record and its (extension, bytes) images: the inverse of parse_sample.

    The JSON is canonical (sorted keys, no spaces), so equal records give equal bytes.
    """
    text = canonical_json(record)
    members = {RECORD_EXTENSION: text.encode()}
    for position, (extension, data) in enumerate(images):
        members[extension if len(images) == 1 else f"{position}.{extension}"] = data
    return members


# ---------------------------------------------------------------------------------------------------------------- rows

PLACE_FIELDS = (
    ("row", pa.int64()),
    ("dataset", pa.int32()),
    ("epoch", pa.int32()),
    ("shard", pa.int32()),
    ("index", pa.int32()),
    ("key", pa.string()),
)
"""Where a row is in the plan, and its sample."""
ROW_SCHEMA = pa.schema(
    [
        *PLACE_FIELDS,
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("images", pa.large_binary()),
        ("num_images", pa.int32()),
        ("image_size", pa.int32()),
        ("cut", pa.int32()),
    ]
)


def place_columns(row: int, sample: SampleId) -> dict[str, Any]:
    """The columns of PLACE_FIELDS."""
    place = {"dataset": sample.dataset, "epoch": sample.epoch, "shard": sample.shard, "index": sample.index}
    return {"row": row, **place, "key": sample.key}


def sample_of(columns: Mapping[str, Any]) -> SampleId:
    """The sample in the columns of PLACE_FIELDS."""
    return SampleId(columns["dataset"], columns["epoch"], columns["shard"], columns["index"], columns["key"])


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a stream: a sample that is ready to be batched, or the reason why there is none.

    Attributes:
        row: of the plan.
        sample: which one; `NO_SAMPLE` of a void row.
        reason: "" for a sample to train on, one of REASONS for a faulty one, VOID for a row that fills up a step.
        detail: what is wrong, for people.
        input_ids: tokens; one padding token where there is no sample.
        labels: as many; the targets.
        images: uint8 (n, 3, S, S) in C order.
        num_images: n.
        image_size: S; 0 where there are no images.
        cut: tokens that were left out because the sample is too long (`pipelines.data.length`); 0 of a whole one.
    """

    row: int
    sample: SampleId
    reason: str
    detail: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    images: bytes | memoryview = b""
    num_images: int = 0
    image_size: int = 0
    cut: int = 0

    @property
    def usable(self) -> bool:
        """Whether it holds a sample to train on."""
        return not self.reason

    @property
    def void(self) -> bool:
        """Whether it only fills up the last step."""
        return self.reason == VOID

    def to_columns(self) -> dict[str, Any]:
        """The values of ROW_SCHEMA."""
        rest = {name: getattr(self, name) for name in ROW_SCHEMA.names[len(PLACE_FIELDS) :]}
        return {**place_columns(self.row, self.sample), **rest}

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> "Row":
        """The row that `to_columns` gave."""
        rest = {name: columns[name] for name in ROW_SCHEMA.names[len(PLACE_FIELDS) :]}
        return cls(columns["row"], sample_of(columns), **rest)
