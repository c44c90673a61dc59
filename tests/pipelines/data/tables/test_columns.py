"""A row becomes the members that a tar would hold, or a fault with its reason; a column that is none is named."""

import json
from typing import Any

import pyarrow as pa
import pytest

from pipelines.data.schema import SampleError, Turn, parse_sample
from pipelines.data.tables import columns
from pipelines.data.tables.columns import Columns
from pipelines.data.tar_format import ShardError
from tests.pipelines.data.tables.made import IMAGE, TURN, turns

CAPTION = Columns(caption_column="caption")
TALK = Columns(conversations_column="conversations")


def row(made: Columns, types: dict[str, pa.DataType], **values: Any) -> dict[str, bytes]:
    """The members of one row."""
    fields = {name: kind for name, kind in types.items() if name in values}
    batch = pa.RecordBatch.from_pylist([values], schema=pa.schema(list(fields.items())))
    ((_, members),) = made.samples(batch.select(list(made.read_from(batch.schema, "x"))), "x#0")
    return members


CAPTION_TYPES = {
    "image": IMAGE,
    "caption": pa.string(),
    "status": pa.string(),
    "group": pa.list_(pa.string()),
    "width": pa.int64(),
    "audio": IMAGE,
    "images": pa.list_(IMAGE),
    "system": pa.string(),
}
JPG = {"bytes": b"\xff\xd8\xff", "path": "a.jpg"}


def test_a_caption() -> None:
    members = row(CAPTION, CAPTION_TYPES, image=JPG, caption=" caf\u00e9\n", width=3, audio=None, system="", images=[])
    assert set(members) == {"json", "jpg"}
    sample = parse_sample("k", members)
    assert sample.images == (b"\xff\xd8\xff",)
    assert sample.turns[1] == Turn("assistant", "caf\u00e9")


@pytest.mark.parametrize(
    ("values", "reason", "detail"),
    [
        ({"image": None}, "missing_image", "found 0"),
        ({"image": {"bytes": None, "path": "a/b.jpg"}}, "missing_image", "the file 'a/b.jpg', whose bytes are not"),
        ({"image": {"bytes": None, "path": None}}, "missing_image", "found 0"),
        ({"caption": None}, "missing_caption", "the caption is None"),
        ({"caption": " "}, "missing_caption", "the caption is ' '"),
        ({"status": "failed_to_download"}, "missing_caption", "'failed_to_download'"),
        ({"audio": {"bytes": b"1", "path": None}}, "unread_content", "the column 'audio' is not read"),
        ({"images": [JPG]}, "unread_content", "the column 'images' is not read"),
        ({"system": "Be brief."}, "unread_content", "the column 'system' is not read"),
    ],
)
def test_a_row_that_is_no_captioned_image_is_named(values: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(SampleError, match=detail) as caught:
        parse_sample("k", row(CAPTION, CAPTION_TYPES, **{"image": JPG, "caption": "c", **values}))
    assert caught.value.reason == reason


def test_conversations_as_structs_and_as_json() -> None:
    spoken = turns("<image>what?", "red")
    types = {"conversations": pa.list_(TURN), "image": pa.large_binary(), "group": pa.list_(pa.string())}
    as_structs = row(TALK, types, conversations=spoken, image=b"GIF89a", group=["page 1"])
    as_json = row(
        TALK,
        {**types, "conversations": pa.string()},
        conversations=json.dumps(spoken),
        image=b"GIF89a",
        group=["page 1"],
    )
    assert as_structs == as_json
    assert set(as_structs) == {"json", "gif"}
    assert parse_sample("k", as_structs).groups == ("page 1",)


@pytest.mark.parametrize(
    ("image", "members"),
    [
        ([b"\x89PNG1", b"RIFF2"], {"0.png", "1.webp", "json"}),
        ([b"no image"], {"jpg", "json"}),
        ([], {"json"}),
        (None, {"json"}),
    ],
)
def test_several_images_are_numbered(image: Any, members: set[str]) -> None:
    types = {"conversations": pa.string(), "image": pa.list_(pa.binary())}
    assert set(row(TALK, types, conversations="[]", image=image)) == members


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        ("[", "bad_json", "the conversation: "),
        ("3", "bad_conversation", "must be a list"),
        (None, "bad_conversation", "must be a list"),
        ('[{"from": "human", "value": "<image>"}]', "missing_image", "image 1 of 2 is null"),
    ],
)
def test_a_row_that_is_no_conversation_is_named(value: Any, reason: str, detail: str) -> None:
    types = {"conversations": pa.string(), "image": pa.list_(pa.binary())}
    images = [b"1", None] if reason == "missing_image" else []
    with pytest.raises(SampleError, match=detail) as caught:
        parse_sample("k", row(TALK, types, conversations=value, image=images))
    assert caught.value.reason == reason


def test_text_that_is_not_utf_8_and_lists_without_end_are_faults_of_their_row() -> None:
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xffa")]
    )
    batch = pa.RecordBatch.from_arrays([text, pa.array([b"1", b"2"])], ["caption", "image"])
    reasons = []
    for key, members in CAPTION.samples(batch, "x#0"):
        try:
            reasons.append(parse_sample(key, members).key)
        except SampleError as fault:
            reasons.append(fault.reason)
    assert reasons == ["missing_caption", "x#0[1]"]
    endless = row(TALK, {"conversations": pa.list_(TURN), "image": pa.binary()}, conversations=[{}] * 2**18, image=None)
    with pytest.raises(SampleError, match="a list of 262144 values"):
        parse_sample("k", endless)


def test_keys_come_from_a_column_or_from_the_place() -> None:
    batch = pa.RecordBatch.from_pylist(
        [{"caption": "a", "image": b"1", "n": 7}, {"caption": "b", "image": b"2", "n": None}]
    )
    texts = pa.RecordBatch.from_pylist([{"caption": "a", "image": b"1", "n": n} for n in ("k" * 4096, "", "k" * 4097)])
    named = Columns(caption_column="caption", key_column="n")
    assert [key for key, _ in named.samples(batch, "f#2", 64)] == ["7", "f#2[65]"]
    assert [key for key, _ in named.samples(texts, "f#2")] == ["k" * 4096, "f#2[1]", "f#2[2]"]
    with pytest.raises(SampleError, match="has 4097 characters; the limit is 4096"):
        parse_sample("f#2[2]", list(named.samples(texts, "f#2"))[2][1])
    assert [key for key, _ in CAPTION.samples(batch.select(["caption", "image"]), "f#2", 64)] == ["f#2[64]", "f#2[65]"]


@pytest.mark.parametrize(
    ("made", "fields", "detail"),
    [
        (CAPTION, [("image", IMAGE)], "it has no columns 'caption', but 'image'"),
        (CAPTION, [("image", IMAGE), ("caption", pa.string()), ("caption", pa.string())], "2 columns 'caption'"),
        (CAPTION, [("image", pa.string()), ("caption", pa.string())], "'image' holds 'string'; expected binary"),
        (CAPTION, [("image", pa.struct([("path", pa.string())])), ("caption", pa.string())], "'image' holds"),
        (CAPTION, [("image", pa.list_(pa.list_(IMAGE))), ("caption", pa.string())], "'image' holds"),
        (CAPTION, [("image", IMAGE), ("caption", pa.list_(pa.string()))], "expected text"),
        (TALK, [("image", IMAGE), ("conversations", pa.list_(pa.string()))], "expected a list of structs, or JSON"),
        (
            Columns(caption_column="c", key_column="k"),
            [("image", IMAGE), ("c", pa.string()), ("k", IMAGE)],
            "whole numbers",
        ),
    ],
)
def test_a_column_that_does_not_fit_is_named(made: Columns, fields: list[Any], detail: str) -> None:
    with pytest.raises(ShardError, match=f"^f.parquet: .*{detail}") as caught:
        made.read_from(pa.schema(fields), "f.parquet")
    assert caught.value.fault == "wrong_columns"


@pytest.mark.parametrize(
    ("settings", "detail"),
    [
        ({}, "by one of --caption-column and --conversations-column"),
        ({"caption_column": "a", "conversations_column": "b"}, "by one of"),
        ({"caption_column": "a", "image_column": ""}, "a caption is of an image"),
        ({"caption_column": "image"}, "named twice: image, image"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, str], detail: str) -> None:
    with pytest.raises(ValueError, match=detail):
        Columns(**settings)


def test_what_stands_beside_is_read_where_training_reads_it() -> None:
    schema = pa.schema([(name, pa.string()) for name in ("group", "asked", "status", "video", "url", "conversations")])
    assert columns.Columns(image_column="", conversations_column="conversations").read_from(schema, "x") == (
        "conversations", "group", "asked", "video",
    )  # fmt: skip
