"""Samples: what is accepted, and the reason and detail of everything that is not."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.data.blocks import BLOCK_SCHEMA, PixelMemory, block_of, rows_from_table, rows_to_table, table_of
from pipelines.data.sample_id import NO_SAMPLE, SampleId, SampleIds
from pipelines.data.schema import (
    REASONS,
    ROW_SCHEMA,
    VOID,
    RawSample,
    Row,
    SampleError,
    Turn,
    build_members,
    image_members,
    parse_sample,
)

HUMAN, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}


def record(*turns: object) -> bytes:
    return json.dumps({"id": "a", "conversations": list(turns)}).encode()


def test_one_image() -> None:
    sample = parse_sample("a", {"json": record(HUMAN, GPT), "jpg": b"J"})
    assert sample == RawSample("a", (b"J",), (Turn("user", "<image>\nWhat?"), Turn("assistant", "red")))


def test_text_only_with_system_turn_and_foreign_members() -> None:
    turns = ({"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": ""})
    sample = parse_sample("a", {"json": b"\xef\xbb\xbf" + record(*turns), "txt": b"x", "cls": b"1"})
    assert sample.images == ()
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant"]


def test_many_images_are_ordered_by_number_not_by_text() -> None:
    members = {f"{number}.{'png' if number % 2 else 'jpeg'}": b"%d" % number for number in range(12)}
    asked = {"from": "human", "value": "<image>" * 12}
    sample = parse_sample("a", {**members, "JSON": record(asked, GPT)})
    assert sample.images == tuple(b"%d" % number for number in range(12))


def test_upper_case_suffix() -> None:
    assert parse_sample("a", {"json": record(HUMAN, GPT), "JPEG": b"J"}).images == (b"J",)


@pytest.mark.parametrize(
    ("members", "reason", "detail"),
    [
        ({"jpg": b"J"}, "missing_json", r"no k\.json; members: jpg"),
        ({}, "missing_json", "members: none"),
        ({"json": b"{"}, "bad_json", "JSONDecodeError"),
        ({"json": b"\xff\xfe"}, "bad_json", "UnicodeDecodeError"),
        ({"json": b"[" * 100_000}, "bad_json", "RecursionError"),
        ({"json": b"[1]"}, "bad_json", "is a list, not an object"),
        ({"json": b"{}"}, "bad_conversation", "'conversations' must be a list"),
        ({"json": record()}, "bad_conversation", "at least one human and one gpt"),
        ({"json": record("hello")}, "bad_conversation", "turn 0 is a str"),
        ({"json": record({"from": "robot", "value": "x"})}, "bad_conversation", "turn 0 is from 'robot'"),
        ({"json": record({"from": ["human"], "value": "x"})}, "bad_conversation", "turn 0 is from"),
        ({"json": record({"from": "human", "value": 3})}, "bad_conversation", "turn 0 has no text"),
        (
            {"json": record({"from": "human", "value": "\ud800"}, GPT)},
            "bad_conversation",
            "turn 0 is not valid Unicode",
        ),
        ({"json": record(GPT)}, "bad_conversation", "turn 0 is from the assistant, expected the user"),
        ({"json": record(HUMAN, GPT, GPT)}, "bad_conversation", "turn 2 is from the assistant, expected the user"),
        ({"json": record(HUMAN)}, "bad_conversation", "the last turn must be from gpt"),
        ({"json": record(HUMAN, {"from": "gpt", "value": "<image>"})}, "bad_conversation", "only human may"),
        ({"json": record(HUMAN, GPT)}, "placeholder_excess", "1 <image> in the conversation but 0 images"),
        ({"json": record(HUMAN, GPT), "0.jpg": b"", "1.jpg": b""}, "placeholder_missing", "2 images but 1 <image>"),
        ({"json": record({"from": "human", "value": "Hi"}, GPT), "gif": b""}, "placeholder_missing", "1 images but 0"),
        ({"json": record(HUMAN, GPT), "jpg": b"", "png": b""}, "bad_conversation", "must be numbered 0, 1"),
        ({"json": record(HUMAN, GPT), "jpg": b"", "0.png": b""}, "bad_conversation", "must be numbered 0, 1"),
        ({"json": record(HUMAN, GPT), "1.jpg": b""}, "bad_conversation", r"numbered 0 to 0; found \[1\]"),
        ({"json": record(HUMAN, GPT), "0.jpg": b"", "00.png": b""}, "bad_conversation", "number 0 is there twice"),
    ],
)
def test_faults_have_a_reason_and_a_detail(members: dict[str, bytes], reason: str, detail: str) -> None:
    with pytest.raises(SampleError, match=detail) as caught:
        parse_sample("k", members)
    assert caught.value.reason == reason
    assert reason in REASONS


def test_error_survives_pickling_and_knows_its_reasons() -> None:
    error = pickle.loads(pickle.dumps(SampleError("too_long", "9 of 8 tokens")))
    assert (error.reason, error.detail, str(error)) == ("too_long", "9 of 8 tokens", "too_long: 9 of 8 tokens")
    with pytest.raises(AssertionError, match="unknown reason"):
        SampleError("typo", "x")


@given(
    images=st.lists(
        st.tuples(st.sampled_from(["jpg", "jpeg", "png", "webp", "gif"]), st.binary(max_size=9)), max_size=12
    ),
    answers=st.lists(st.text(st.characters(codec="utf-8"), max_size=9), min_size=1, max_size=4),
)
def test_parse_inverts_build(images: list[tuple[str, bytes]], answers: list[str]) -> None:
    turns = []
    for position, answer in enumerate(answers):
        turns += [{"from": "human", "value": "<image>" * len(images) * (position == 0) + "?"}]
        turns += [{"from": "gpt", "value": answer.replace("<image>", "")}]
    sample = parse_sample("k", build_members({"id": "k", "conversations": turns}, images))
    assert sample.images == tuple(data for _, data in images)
    assert [turn.text for turn in sample.turns] == [turn["value"] for turn in turns]
    assert len(image_members([extension for extension, _ in images][:1])) == min(1, len(images))


def test_rows_travel_as_tables() -> None:
    rows = [
        Row(7, SampleId(1, 0, 2, 3, "k"), "", "", [5, 6], [-100, 6], bytes(range(12)) * 2, 2, 2),
        Row(8, SampleId(1, 0, 2, 4, "l"), "too_long", "600 tokens", [0], [-100]),
        Row(9, NO_SAMPLE, VOID, "fills up the last step", [0], [-100]),
    ]
    table = rows_to_table(rows)
    assert table.schema.equals(ROW_SCHEMA)
    assert table.to_pylist() == [row.to_columns() for row in rows]
    block = block_of(table)
    assert (block.schema.equals(BLOCK_SCHEMA), len(block)) == (True, 1)
    assert table_of(block).equals(table)
    twice = pa.concat_tables([block, block_of(table.slice(1, 2))])
    assert table_of(twice).to_pylist() == table.to_pylist() + table.slice(1, 2).to_pylist()
    for found, row in zip(rows_from_table(table), rows, strict=True):
        columns = found.to_columns()
        assert {name: list(columns.pop(name)) for name in ("input_ids", "labels")} == {
            "input_ids": row.input_ids,
            "labels": row.labels,
        }
        assert {**columns, "input_ids": row.input_ids, "labels": row.labels} == row.to_columns()
    assert [row.sample.key for row in rows_from_table(table)] == ["k", "l", ""]
    assert [(row.usable, row.void) for row in rows] == [(True, False), (False, False), (False, True)]


def test_sample_ids_are_samples_in_columns() -> None:
    samples = [SampleId(0, 1, 2, 3, "a"), SampleId(1, 0, 5, 4, "b"), NO_SAMPLE]
    ids = SampleIds.of(samples)
    assert list(ids) == samples  # keys do not say which sample it is
    assert list(ids.take(slice(1, 2))) == [samples[1]]
    assert [len(ids), len(SampleIds.of([])), len(SampleIds.void(4))] == [3, 0, 4]
    assert list(SampleIds.void(1)) == [NO_SAMPLE]


def test_pixels_that_lie_one_behind_the_other_are_not_copied() -> None:
    memory = PixelMemory(5, 2)
    made = []
    for row, count in enumerate((2, 0, 1)):
        room = memory.take(count)
        room[:] = row + 1
        if row == 0:
            memory.take(2)
            memory.give_back(2)  # a faulty sample between them
        images = room.reshape(-1).data if count else b""
        made.append(Row(row, SampleId(0, 0, 0, row, "k"), "", "", [1], [1], images, count, 2 if count else 0))
    first = np.frombuffer(made[0].images, dtype=np.uint8)
    table = block_of(rows_to_table(made))
    assert table["images"].chunk(0).buffers()[2].address == first.ctypes.data
    assert [bytes(row.images) for row in rows_from_table(table_of(table))] == [b"\1" * 24, b"", b"\3" * 12]
    apart = rows_to_table([made[2], made[0]])
    assert apart["images"].to_pylist() == [b"\3" * 12, b"\1" * 24]
