"""Bytes from outside: whatever they are, each reader raises the one error of its format, in bounded words."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meteor_model.foreign import SHOWN, SHOWN_DETAIL, JsonError, described, foreign, parse_json, quoted, shown
from meteor_model.weights.checkpoints import WeightsError, parse_source, read_checkpoint, read_config
from pipelines.checkpoint.state import CheckpointError, TrainState
from pipelines.compat.ray import parse_snapshot
from pipelines.data.blocks import rows_to_table
from pipelines.data.sample_id import NO_SAMPLE
from pipelines.data.schema import Row, SampleError, faulty_members, parse_sample
from pipelines.data.shards import MANIFEST_SCHEMA, SPEC_KEY, ShardError, load_manifest
from pipelines.data.sources import SourceError
from pipelines.data.sources.llava import Llava, LlavaSettings, parse_records
from pipelines.data.tar_format import parse_shard
from pipelines.io import storage

BAD_JSON = {
    "cut": b'{"a": ',
    "not_utf8": b'{"a": "\xff\xfe"}',
    "endless_integer": b'{"id": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 50_000,
    "deep_and_whole": b'{"a":' * 30_000 + b"1" + b"}" * 30_000,
    "nan": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "overflow": b'{"a": 1e999}',
    "key_twice": b'{"a": 1, "a": 2}',
    "key_twice_inside": b'{"c": [{"from": "human", "from": "gpt"}]}',
    "many_values": b"[" + b"[]," * 200_000 + b"[]]",
    "empty": b"",
    "zeros": bytes(100),
}
"""JSON that is none, or more than is read."""


# ---------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("text", ["x" * 5_000_000, "\x1b[2J\r\n\0" * 1000, "\udc80" * 300, "\U000e0001" * 400, "ok"])
def test_a_text_from_outside_is_shown_bounded_and_printable(text: str) -> None:
    for line in (shown(text), quoted(text), described(ValueError(text))):
        assert len(line) <= SHOWN + 2
        assert line.isprintable()
        line.encode()
    assert len(text) <= SHOWN or f"({len(text)} characters)" in shown(text)


def test_what_has_no_repr_is_quoted_by_its_type() -> None:
    nest: list[object] = []
    for _ in range(100_000):
        nest = [nest]
    assert quoted(nest) == "a list"
    assert quoted(10**5000) == "a int"
    while nest:  # freed one by one: the interpreter's own way down has an end
        nest = nest.pop()  # type: ignore[assignment]


@pytest.mark.parametrize("raised", [KeyError("k"), RecursionError(), OverflowError(), LookupError(), SyntaxError("s")])
def test_everything_becomes_the_error_of_the_format(raised: Exception) -> None:
    with pytest.raises(SourceError, match=type(raised).__name__), foreign(SourceError):
        raise raised


def test_a_lack_of_memory_is_no_fault_of_the_bytes() -> None:
    with pytest.raises(MemoryError), foreign(SourceError):
        raise MemoryError


# ----------------------------------------------------------------------------------------------------------------- json


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_that_is_refused(name: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse_json(BAD_JSON[name])
    assert len(str(caught.value)) <= SHOWN_DETAIL


def test_marks_within_texts_are_no_values() -> None:
    document = json.dumps({"prompt": '[{,:"\\' * 100_000}).encode()
    assert parse_json(document) == json.loads(document)


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_record_that_is_refused_has_a_reason(name: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_sample("k", {"json": BAD_JSON[name]})
    assert caught.value.reason == "bad_json"


LONG = "y" * 5_000_000
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]


@pytest.mark.parametrize(
    "members",
    [
        {"json": json.dumps({"conversations": [{"from": LONG, "value": ""}]}).encode()},
        {LONG: b""},
        {f"n{number}": b"" for number in range(100_000)},
        {"json": json.dumps({"conversations": TURNS}).encode(), **{f"{2 * n}.jpg": b"" for n in range(50_000)}},
        faulty_members("bad_shard", LONG),
        faulty_members("bad_shard", "\udc80\0"),
    ],
    ids=["speaker", "member", "members", "images", "shard", "surrogates"],
)
def test_the_detail_of_a_sample_is_bounded_and_fits_a_table(members: dict[str, bytes]) -> None:
    with pytest.raises(SampleError) as caught:
        parse_sample("k", members)
    assert len(caught.value.detail) <= SHOWN_DETAIL
    rows_to_table([Row(0, NO_SAMPLE, caught.value.reason, caught.value.detail, [0], [0])])


@pytest.mark.parametrize("name", sorted(BAD_JSON.keys() - {"many_values"}))
@pytest.mark.parametrize("lines", [False, True])
def test_a_records_file_that_is_refused_is_named(name: str, lines: bool) -> None:
    good = json.dumps({"id": "a", "conversations": TURNS}).encode()
    data = good + b"\n" + BAD_JSON[name] if lines else b"[" + BAD_JSON[name] + b"]"
    if lines and name in ("empty",):
        return
    with pytest.raises(SourceError, match=r"data\.json") as caught:
        parse_records(data, "data.json")
    assert len(str(caught.value)) <= SHOWN_DETAIL


@pytest.mark.parametrize(
    "record",
    [
        {"id": "\ud800", "conversations": TURNS},
        {"id": "a", "conversations": TURNS, "image": "x" * 5000 + ".jpg"},
        {"id": "a", "conversations": TURNS, "image": "\0.jpg"},
        {"id": "a", "conversations": TURNS, "image": "\ud800.jpg"},
        {"id": LONG, "conversations": []},
        {"id": {LONG: 1}, "conversations": []},
        {"id": "a", "conversations": TURNS, "image": [LONG, {}]},
    ],
    ids=["id_surrogate", "long_path", "zero_byte", "path_surrogate", "long_id", "odd_id", "odd_path"],
)
def test_a_faulty_record_is_listed_in_bounded_words(record: object, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([record]))
    with pytest.raises(SourceError, match="record 0") as caught:
        Llava(LlavaSettings(str(tmp_path / "data.json"), str(tmp_path)))
    assert len(str(caught.value)) < 2000


# ------------------------------------------------------------------------------------------------------------------ tar


def header(name: bytes, size: int = 0, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar header with a right checksum, whatever it says."""
    info = tarfile.TarInfo("placeholder")
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[:100] = name[:100].ljust(100, b"\0")
    block[124:136] = size_field(size)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def size_field(size: int) -> bytes:
    """Eleven octal digits, or base 256 as GNU tar writes what does not fit, negative numbers too."""
    if 0 <= size < 8**11:
        return b"%011o\0" % size
    return (b"\x80" if size >= 0 else b"\xff") + (size % 256**11).to_bytes(11, "big")


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return header(b"pax", len(records), kind) + padded(records)


def record_of(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(b"%d" % length) + len(key) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


END = bytes(1024)
MEMBER = header(b"a.json", 2) + padded(b"{}")
LONG_NAME = header(b"././@LongLink", 7, tarfile.GNUTYPE_LONGNAME) + padded(b"b.json\0")

BAD_TARS: dict[str, bytes] = {
    "negative_size": MEMBER + header(b"b.json", -512) + END,
    "negative_size_first": header(b"b.json", -512) + END,
    "negative_directory": MEMBER + header(b"d", -1024, tarfile.DIRTYPE) + header(b"c", -512, b"9") + END,
    "pax_negative_size": MEMBER + pax(record_of(b"size", b"-1024")) + header(b"b.json") + END,
    "pax_huge_size": MEMBER + pax(record_of(b"size", b"9" * 400)) + header(b"b.json") + END,
    "pax_endless_size": MEMBER + pax(record_of(b"size", b"9" * 5000)) + header(b"b.json") + END,
    "pax_endless_length": MEMBER + pax(b"9" * 5000 + b" size=1\n") + header(b"b.json") + END,
    "pax_bad_sparse": MEMBER + pax(record_of(b"GNU.sparse.map", b"a,b")) + header(b"b.json") + END,
    "pax_bad_charset": MEMBER + pax(record_of(b"hdrcharset", b"\xff") + record_of(b"path", b"\xff")) + header(b"b.j"),
    "pax_without_equals": MEMBER + pax(b"2 " * 2**19) + header(b"b.json") + END,
    "pax_chain": MEMBER + pax(record_of(b"comment", b"x"), tarfile.XGLTYPE) * 3000 + header(b"b.json") + END,
    "pax_digits": MEMBER + pax(record_of(b"comment", b"9" * 16_000)) * 3000 + header(b"b.json") + END,
    "pax_not_of_its_length": MEMBER + pax(b"9 a=b\n") + header(b"b.json") + END,
    "long_name_chain": MEMBER + LONG_NAME * 5000 + MEMBER + END,
    "long_name_of_5_mb": MEMBER
    + header(b"././@LongLink", 5_000_000, tarfile.GNUTYPE_LONGNAME)
    + padded(b"x" * 4_999_990 + b".json" + bytes(5))
    + header(b"y")
    + END,
    "huge_size": MEMBER + header(b"b.json", 2**60) + END,
    "size_overflow": MEMBER + header(b"b.json", 2**80) + END,
}


@pytest.mark.parametrize("name", BAD_TARS)
@pytest.mark.timeout(20)
def test_a_tar_that_cannot_be_read_is_named_in_bounded_words(name: str) -> None:
    with pytest.raises(ShardError, match=r"^shard\.tar: ") as caught:
        parse_shard(BAD_TARS[name], "shard.tar")
    assert len(str(caught.value)) <= 2 * SHOWN_DETAIL


@pytest.mark.parametrize("name", [b"\xff\xfe.json", b"caf\xe9.json"])
def test_a_name_that_is_not_utf8_is_written_with_escapes(name: bytes) -> None:
    ((key, members),) = parse_shard(header(name, 2) + padded(b"{}") + END, "shard.tar").samples
    assert key == name[:-5].decode("utf-8", "backslashreplace")
    assert members == {"json": b"{}"}
    pa.array([key, *members])  # as the stream's tables hold it


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_names_of_many_digits_are_read(kind: int) -> None:
    buffer = io.BytesIO()
    names = ["f" * 300, "caf\u00e9" * 60, "0123456789" * 6, "d/" * 1900 + "x"]
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(f"{name}.json"))
    assert [key for key, _ in parse_shard(buffer.getvalue(), "shard.tar").samples] == names


def test_names_that_differ_in_such_bytes_stay_apart() -> None:
    members = b"".join(header(name + b".json", 2) + padded(b"{}") for name in (b"\xe9", b"\xe8", b"xe9", b"\xc3\xa9"))
    assert len(parse_shard(members + END, "shard.tar").samples) == 4


# --------------------------------------------------------------------------------------------------------- stored files


def manifest_with(**changed: object) -> bytes:
    row = {"path": "a.tar", "split": "train", "samples": 1, "bytes": 1, "sha256": "", "members": [], "row_group": ""}
    row |= changed
    buffer = io.BytesIO()
    spec = str(row.pop("spec", "{}")).encode()
    pq.write_table(pa.Table.from_pylist([row], schema=MANIFEST_SCHEMA.with_metadata({SPEC_KEY: spec})), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PAR1" + bytes(100) + b"PAR1",
        manifest_with()[:-20] + bytes(20),
        manifest_with(members=None),
        manifest_with(path=None),
        manifest_with(samples=-1),
        manifest_with(row_group="{}"),
        manifest_with(row_group=None),
        manifest_with(spec="[" * 100_000),
        manifest_with(spec="7"),
        manifest_with(spec="9" * 5000),
    ],
    ids=[
        "empty", "marks", "cut", "no_members", "no_path", "negative", "odd_group", "no_group", "deep_spec", "odd_spec",
        "endless_spec",
    ],
)  # fmt: skip
def test_a_file_that_is_no_manifest_is_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.parquet").write_bytes(data)
    with pytest.raises(ShardError, match="not a manifest of this format") as caught:
        load_manifest(str(tmp_path))
    assert len(str(caught.value)) < SHOWN_DETAIL


STORED = ("cut", "not_utf8", "endless_integer", "deep", "deep_and_whole", "empty", "zeros")
"""Those of BAD_JSON that are no JSON of Python's either: files of the project itself may hold NaN."""


@pytest.mark.parametrize("data", [*(BAD_JSON[name] for name in STORED), b"[]", b"7", b'{"version": []}'])
def test_a_file_that_is_no_state_of_a_training_is_named(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json") as caught:
        TrainState.from_json(data, "state.json")
    assert len(str(caught.value)) < SHOWN_DETAIL
    with pytest.raises(ValueError, match="no snapshot"):
        parse_snapshot(data)


@pytest.mark.parametrize("name", STORED)
def test_a_json_in_storage_that_is_none_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(BAD_JSON[name])
    with pytest.raises(storage.StorageError, match=r"a\.json: not JSON"):
        storage.read_json(str(tmp_path / "a.json"))


def weights(name: str, data: bytes) -> Callable[[Path], int]:
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    "write",
    [
        weights("model.safetensors", b""),
        weights("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
        weights("model.safetensors", (100).to_bytes(8, "little") + b"[" * 100),
        weights("pytorch_model.bin", b"\x80\x02c"),
        weights("pytorch_model.bin", b"PK\3\4" + bytes(60)),
        weights("model.safetensors.index.json", b"[" * 100_000),
        weights("model.safetensors.index.json", b'{"weight_map": {"a": 7}}'),
        weights("model.safetensors.index.json", b'{"weight_map": {"a": "../../../etc/passwd"}}'),
    ],
)
def test_weights_that_are_none_are_named(write: Callable[[Path], int], tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(WeightsError, match=tmp_path.name):
        read_checkpoint(parse_source(str(tmp_path)))


@pytest.mark.parametrize("name", STORED)
def test_a_config_that_is_none_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(BAD_JSON[name])
    with pytest.raises(WeightsError, match=r"config\.json is damaged"):
        read_config(parse_source(str(tmp_path)))
