"""Indexing tables: what becomes a shard, what is counted, and what of a file is noticed when it is read again."""

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.make_shards import JOB
from pipelines.data import survey
from pipelines.data.build import DatasetConflictError
from pipelines.data.indexing import index_shards
from pipelines.data.schema import SampleError, parse_sample
from pipelines.data.shards import Manifest, ShardError, fetch_shard, load_manifest, read_shard, save_manifest
from pipelines.data.sources import HELDOUT, TRAIN
from pipelines.data.tables import arrow, files, parquet, row_group
from pipelines.data.tables.columns import Columns
from pipelines.data.tables.index import Tables
from pipelines.io import storage
from pipelines.io.fingerprint import sha256_of_json
from pipelines.io.retry import Backoff
from tests.pipelines.data.tables import made
from tests.pipelines.s3_fixture import BUCKET, S3Server

CAPTIONS = Tables(Columns(caption_column="caption"))
AT_ONCE = Backoff(0.0, 0.0)


def table(first: int, rows: int, **others: Any) -> pa.Table:
    samples = [(str(n), f"image {n}", [made.jpeg(n)]) for n in range(first, first + rows)]
    return made.table(samples, made.CAPTION, **others)


def hub(folder: str) -> None:
    """A folder as the hub has it."""
    for name, first, rows in (("train-00000-of-00002", 0, 7), ("train-00001-of-00002", 7, 4), ("validation", 11, 3)):
        storage.write_bytes(f"{folder}/data/{name}.parquet", made.parquet_bytes(table(first, rows), 3))
    storage.write_bytes(f"{folder}/README.md", b"---\nconfigs: []\n---\n")


def texts(manifest: Manifest, split: str) -> list[str]:
    return [
        parse_sample(key, members).turns[1].text
        for info in manifest.split(split)
        for key, members in read_shard(manifest.url, info)
    ]


def test_a_folder_of_the_hub(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hub(str(tmp_path))
    arguments = ["tables", "--output", str(tmp_path), "--caption-column", "caption", "--heldout", "data/validation*"]
    assert JOB.main(arguments) == 0
    assert "train 11 samples 5 shards" in " ".join(capfd.readouterr().out.split())
    manifest = load_manifest(str(tmp_path))
    assert [(info.path, info.split, info.samples) for info in manifest.shards[2:]] == [
        ("data/train-00000-of-00002.parquet#2", TRAIN, 1),
        ("data/train-00001-of-00002.parquet#0", TRAIN, 3),
        ("data/train-00001-of-00002.parquet#1", TRAIN, 1),
        ("data/validation.parquet#0", HELDOUT, 3),
    ]
    assert texts(manifest, TRAIN) == [f"image {n}" for n in range(11)]
    assert texts(manifest, HELDOUT) == [f"image {n}" for n in range(11, 14)]
    assert [key for key, _ in read_shard(manifest.url, manifest.shards[1])] == [
        f"data/train-00000-of-00002.parquet#1[{row}]" for row in range(3)
    ]
    assert JOB.main(arguments) == 0
    assert "was there already" in capfd.readouterr().out
    assert JOB.main(["tables", "--output", str(tmp_path), "--caption-column", "text", "--overwrite"]) == 1
    assert (
        "data/train-00000-of-00002.parquet: it has no columns 'text', but 'id, image, caption'"
        in capfd.readouterr().err
    )


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    """Splits are folders; what `map` left beside the data is no data."""
    made.save_to_disk(tmp_path / "train", [table(0, 7), table(7, 5)], 4)
    made.save_to_disk(tmp_path / "test", [table(12, 2)], 4)
    storage.write_json(f"{tmp_path}/dataset_dict.json", {"splits": ["train", "test"]})
    storage.write_bytes(f"{tmp_path}/train/cache-0123456789abcdef.arrow", made.arrow_bytes(table(0, 2), 4))
    manifest = index_shards(str(tmp_path), CAPTIONS, "test/*").manifest
    assert texts(manifest, TRAIN) == [f"image {n}" for n in range(12)]
    assert texts(manifest, HELDOUT) == ["image 12", "image 13"]
    assert [info.samples for info in manifest.split(TRAIN)] == [4, 3, 4, 1]
    assert manifest.report[survey.LEFT_OUT] == {"table_not_in_state": 1}


def test_conversations_that_datasets_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for split, numbers in (("train", range(9)), ("test", range(92, 97))):
        made.save_to_disk(tmp_path / split, [made.table([made.talk(n) for n in numbers], made.TALK)], 4)
    command = ["tables", "--output", str(tmp_path), "--conversations-column", "conversations", "--heldout", "test/*"]
    assert JOB.main(command) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "train 9 samples 3 shards" in printed
    assert "heldout 5 samples 2 shards" in printed
    assert "faulty: 2 bad_conversation, 2 placeholder_excess not read: 14 id" in printed


@pytest.mark.parametrize(
    ("state", "fault", "detail"),
    [
        (
            {"_data_files": [{"filename": "gone.arrow"}]},
            "missing",
            "gone.arrow: missing, but train/state.json names it",
        ),
        (
            {"_data_files": [], "_indices_data_files": [{"filename": "indices.arrow"}]},
            "not_a_table",
            r"save it again after flatten_indices\(\)",
        ),
        ([], "not_a_table", "not the state of a saved folder"),
    ],
)
def test_a_saved_folder_that_is_not_whole(tmp_path: Path, state: Any, fault: str, detail: str) -> None:
    made.save_to_disk(tmp_path / "train", [table(0, 2)], 4)
    storage.write_json(f"{tmp_path}/train/state.json", state)
    with pytest.raises(ShardError, match=detail) as caught:
        index_shards(str(tmp_path), CAPTIONS)
    assert caught.value.fault == fault


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_table = table(0, 40, depth_of_field=[random.Random(n).randbytes(20_000) for n in range(40)])
    storage.write_bytes(f"{tmp_path}/a.parquet", made.parquet_bytes(made_table, 10))
    read, whole = [0], storage.read_range

    def counted(url: str, start: int, count: int, *rest: Any) -> bytes:
        read[0] += count
        return whole(url, start, count, *rest)

    monkeypatch.setattr(storage, "read_range", counted)
    manifest = index_shards(str(tmp_path), CAPTIONS).manifest
    indexed, read[0] = read[0], 0
    assert len(texts(manifest, TRAIN)) == 40
    needed = sum(info.bytes for info in manifest.shards)
    head = json.loads(manifest.shards[0].row_group)["head"][1]
    assert read[0] == needed + head, "the head is read once"
    assert indexed == needed + head + 4 + 8 < (tmp_path / "a.parquet").stat().st_size / 10
    assert manifest.report == {survey.NOT_READ: {"depth_of_field": 40, "id": 40}}


# -------------------------------------------------------------------------------------------------------------- faults


def one(folder: Path, kind: str) -> Manifest:
    data = made.parquet_bytes(table(0, 6), 3) if kind == "parquet" else made.arrow_bytes(table(0, 6), 3)
    storage.write_bytes(f"{folder}/a.{kind}", data)
    return index_shards(str(folder), CAPTIONS).manifest


def cut(data: bytes, place: int) -> bytes:
    return data[:place]


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("part", ["head", "extents"])
@pytest.mark.parametrize("damage", [cut, flip])
def test_damage_at_rest_is_named_or_dropped(
    tmp_path: Path, kind: str, part: str, damage: Callable[[bytes, int], bytes]
) -> None:
    manifest = one(tmp_path, kind)
    info, path = manifest.shards[1], tmp_path / f"a.{kind}"
    group = info.parsed_group()
    assert group is not None
    start, count = group.head if part == "head" else group.extents[-1]
    path.write_bytes(damage(path.read_bytes(), start + count // 2))
    row_group._head.cache_clear()
    with pytest.raises(ShardError, match=rf"a\.{kind}: .*--overwrite") as caught:
        read_shard(manifest.url, info, backoff=AT_ONCE)
    assert caught.value.fault in ("truncated", "replaced")


def test_a_missing_file_and_one_that_is_dropped(tmp_path: Path) -> None:
    manifest = one(tmp_path, "parquet")
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ShardError, match="missing, but the manifest lists it") as caught:
        read_shard(manifest.url, manifest.shards[1], backoff=AT_ONCE)
    assert caught.value.fault == "missing"
    samples = fetch_shard(manifest.url, manifest.shards[1], bad_shards="drop")
    assert [key for key, _ in samples] == [f"a.parquet#1[{row}]" for row in range(3)]
    with pytest.raises(SampleError, match=r"^bad_shard"):
        parse_sample(*samples[0])


def test_a_replaced_file_is_not_there_already(tmp_path: Path) -> None:
    first = one(tmp_path, "arrow")
    size = (tmp_path / "a.arrow").stat().st_size
    other = made.arrow_bytes(table(6, 6), 3)
    (tmp_path / "a.arrow").write_bytes(other[:size].ljust(size, b"\0"))
    with pytest.raises((DatasetConflictError, ShardError)):
        index_shards(str(tmp_path), CAPTIONS)
    (tmp_path / "a.arrow").write_bytes(other)
    assert index_shards(str(tmp_path), CAPTIONS, overwrite=True).manifest.sha256 != first.sha256


def test_an_image_in_both_splits_is_an_error(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/a.parquet", made.parquet_bytes(table(0, 4), 2))
    storage.write_bytes(f"{tmp_path}/b.arrow", made.arrow_bytes(table(3, 2), 2))
    with pytest.raises(ValueError, match="1 images lie in shards that match"):
        index_shards(str(tmp_path), CAPTIONS, "b.*")
    counted = index_shards(str(tmp_path), CAPTIONS, "b.*", shared_images="count").manifest
    assert counted.report[survey.SHARED] == {HELDOUT: 1}


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    doubled = pa.concat_tables([table(0, 2), table(1, 1)])
    storage.write_bytes(f"{tmp_path}/a.parquet", made.parquet_bytes(doubled.combine_chunks(), 8))
    with pytest.raises(ShardError, match=r"a\.parquet#0: the key '1' is there twice; name another --key-column"):
        index_shards(str(tmp_path), Tables(Columns(caption_column="caption", key_column="id")))


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"<html>" * 9, "not_a_table"),
        (b"", "not_a_table"),
        (b"PAR1" + b"x" * 40, "truncated"),
        (made.parquet_bytes(table(0, 2), 2)[:-20], "truncated"),
        (made.arrow_bytes(table(0, 2), 2)[:-40], "truncated"),
        (made.arrow_bytes(table(0, 2), 2)[:90], "truncated"),
        (made.arrow_bytes(table(0, 2), 1)[:-8], "truncated"),
        (made.nested_footer(100_000), "truncated"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, body: bytes, fault: str) -> None:
    (tmp_path / "worse.parquet").write_bytes(body)
    with pytest.raises(ShardError, match=r"worse\.parquet: ") as caught:
        index_shards(str(tmp_path), CAPTIONS)
    assert caught.value.fault == fault
    assert storage.list_files(str(tmp_path)) == ["worse.parquet"]


def test_fewer_rows_than_the_footer_says_are_named(tmp_path: Path) -> None:
    body = made.parquet_bytes(table(0, 6), 6)
    place = body.rindex(b"\x16\x0c")  # the last i64 that is 6: the rows of the row group
    (tmp_path / "a.parquet").write_bytes(body[:place] + b"\x16\x0e" + body[place + 2 :])
    with pytest.raises(ShardError, match=r"a\.parquet#0: .*they hold 6 rows, the footer says 7"):
        index_shards(str(tmp_path), CAPTIONS)


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"compression": "none", "use_dictionary": False}])
@pytest.mark.parametrize("limit", ["MAX_GROUP_BYTES", "MAX_GROUP_ROWS", "MAX_GROUP_VALUES"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_row_group_above_a_limit_is_named(
    tmp_path: Path, kind: str, limit: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image for all rows: a Parquet file of some kB that unpacks to megabytes."""
    noise = made.jpeg(1) * 100
    same = made.table([(str(n), "same", [noise]) for n in range(500)], made.CAPTION)
    body = made.parquet_bytes(same, 500, **options) if kind == "parquet" else made.arrow_bytes(same, 500)
    storage.write_bytes(f"{tmp_path}/a.{kind}", body)
    value = 2**21 if limit == "MAX_GROUP_BYTES" else 499
    for module in (parquet, arrow, files):
        if hasattr(module, limit):
            monkeypatch.setattr(module, limit, value)
    with pytest.raises(ShardError, match=rf"a\.{kind}#0: .*the limit is {value}; write the file anew") as caught:
        index_shards(str(tmp_path), CAPTIONS)
    assert caught.value.fault == "too_large"


# ------------------------------------------------------------------------------------------------------------ manifest


def test_a_manifest_from_before_has_the_same_identity(tmp_path: Path) -> None:
    made.tars(tmp_path, [made.captioned(n) for n in range(4)], [2, 2])
    manifest = index_shards(str(tmp_path)).manifest
    rows = [{name: value for name, value in vars(info).items() if name != "row_group"} for info in manifest.shards]
    assert manifest.sha256 == sha256_of_json({"spec": manifest.spec, "shards": rows})
    assert all(info.row_group == "" and info.parsed_group() is None for info in load_manifest(manifest.url).shards)


def test_a_manifest_with_a_row_group_that_is_none_is_refused(tmp_path: Path) -> None:
    manifest = one(tmp_path, "parquet")
    for change in ({"format": "csv"}, {"extents": [[-1, 5]]}, {"extents": [[4, 2**40]]}, {"extents": [[4, 1]]}):
        group = json.dumps({**json.loads(manifest.shards[0].row_group), **change})
        bad = [dataclasses.replace(manifest.shards[0], row_group=group)]
        save_manifest(manifest.url, bad, manifest.spec)
        with pytest.raises(ShardError, match="not a manifest of this format"):
            load_manifest(manifest.url)
    save_manifest(manifest.url, [dataclasses.replace(manifest.shards[0], path="a.parquet")], manifest.spec)
    with pytest.raises(ShardError, match=r"'a\.parquet' names no row group"):
        load_manifest(manifest.url)


# --------------------------------------------------------------------------------------------------------- over real S3


@pytest.mark.stack
def test_tables_on_s3(s3: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The same shards and identity as on disk, by ranges; an object that got shorter is named."""
    url = f"s3://{BUCKET}/hub"
    hub(url)
    hub(str(tmp_path))
    assert JOB.main(["tables", "--output", url, "--caption-column", "caption", "--heldout", "data/validation*"]) == 0
    manifest = load_manifest(url)
    assert manifest.sha256 == index_shards(str(tmp_path), CAPTIONS, "data/validation*").manifest.sha256
    assert texts(manifest, TRAIN) == [f"image {n}" for n in range(11)]
    last = manifest.shards[1]
    body = storage.read_bytes(f"{url}/{last.file}")
    storage.write_bytes(f"{url}/{last.file}", body[:100])
    with pytest.raises(ShardError, match="truncated: "):
        read_shard(url, last, backoff=AT_ONCE)
