"""What making and indexing a dataset finds is counted, kept in the manifest and shown: nothing goes unseen."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import webdataset

from jobs.make_shards import JOB
from pipelines.data import survey
from pipelines.data.build import DatasetConflictError, make_shards
from pipelines.data.indexing import Tars, index_shards
from pipelines.data.schema import CAPTION_QUESTION, SampleError, Turn, build_members, parse_sample, unread
from pipelines.data.shards import ShardError, load_manifest, read_shard
from pipelines.data.sources import HELDOUT, TRAIN, SourceError
from pipelines.data.sources.llava import Llava, LlavaSettings
from pipelines.data.survey import DIGESTS_NAME, NoSampleError, digests_from_parquet, image_digest
from pipelines.data.tar_format import pack_shard
from pipelines.io import storage

TALK = [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "red"}]
TEXT = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "red"}]


def sample(jpg: bytes, /, **fields: Any) -> dict[str, bytes]:
    return build_members({"id": "x", "conversations": TALK, **fields}, [("jpg", jpg)])


def shard(*images: bytes, prefix: str = "k", **fields: Any) -> bytes:
    return pack_shard([(f"{prefix}{n}", sample(image, **fields)) for n, image in enumerate(images)])


def store(folder: Path, **bodies: bytes) -> str:
    for name, body in bodies.items():
        storage.write_bytes(f"{folder}/{name}.tar", body)
    return str(folder)


# -------------------------------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize("glob", ["val-*.tar", "heldout/*", "VAL*", "*.TAR"])
def test_a_glob_that_holds_nothing_out_is_an_error(tmp_path: Path, glob: str) -> None:
    url = store(tmp_path, train=shard(b"1"), val=shard(b"2"))
    with pytest.raises(ValueError, match=r"matches none of the 2 shards.*the first one is 'train\.tar'"):
        index_shards(url, heldout=glob)
    assert storage.list_files(url) == ["train.tar", "val.tar"]


def test_an_image_in_both_splits_is_found_whatever_its_id(tmp_path: Path) -> None:
    url = store(tmp_path, train=shard(b"1", b"2", b"3"), val=shard(b"9", b"2", b"1", b"2", prefix="other"))
    with pytest.raises(ValueError, match=r"2 images lie in shards that match --heldout 'val\.tar' and in others"):
        index_shards(url, heldout="val.tar")
    made = index_shards(url, heldout="val.tar", shared_images="count").manifest
    assert made.report == {survey.SHARED: {HELDOUT: 2}}
    table = storage.read_bytes(f"{url}/{DIGESTS_NAME}")
    assert digests_from_parquet(table, TRAIN).tolist() == sorted(map(image_digest, [b"1", b"2", b"3"]))
    apart = store(tmp_path / "apart", train=shard(b"1"), val=shard(b"2"))
    assert index_shards(apart, heldout="val.tar").manifest.report == {}


def llava(folder: Path, rows: list[Any], **settings: Any) -> Llava:
    (folder / "records.json").write_text(json.dumps(rows))
    return Llava(LlavaSettings(records=str(folder / "records.json"), images=str(folder / "img"), **settings))


def test_records_of_one_image_share_a_split_and_copies_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    rows = []
    for number in range(40):
        for name in (f"{number}.jpg", f"copy-{number}.jpg"):
            (tmp_path / "img" / name).write_bytes(b"%d" % number)
        rows += [{"id": f"{number}-{n}", "image": f"{number}.jpg", "conversations": TALK} for n in range(3)]
        rows.append({"id": f"copy-{number}", "image": f"copy-{number}.jpg", "conversations": TALK})
    source = llava(tmp_path, rows, heldout_share=0.3)
    made = make_shards(source, str(tmp_path / "set")).manifest
    images: dict[str, set[bytes]] = {}
    for info in made.shards:
        images.setdefault(info.split, set()).update(members["jpg"] for _, members in read_shard(made.url, info))
    assert images[HELDOUT]
    assert not images[TRAIN] & images[HELDOUT]
    left_out = made.report[survey.LEFT_OUT]["image_trained_on"]
    assert made.samples(TRAIN) + made.samples(HELDOUT) + left_out == len(rows)
    assert 0 < left_out <= 40 * 3


# -------------------------------------------------------------------------------------------------- fields and members


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"video": "a.mp4"}, "the field 'video'"),
        ({"Videos": ["a.mp4"]}, "the field 'Videos'"),
        ({"audio_path": "a.wav"}, "the field 'audio_path'"),
        ({"speech": {"array": [1]}}, "the field 'speech'"),
        ({"depth_map": "d.png"}, "the field 'depth_map'"),
        ({"point_cloud": "p.ply"}, "the field 'point_cloud'"),
        ({"system": "Be terse."}, "the field 'system'"),
        ({"tools": [{}]}, "the field 'tools'"),
        ({"image_2": "b.jpg"}, "the field 'image_2'"),
        ({"image": ["a.jpg", "b.jpg"]}, "the record names 2 images, the sample holds 1"),
        ({"images": ["a.jpg", "b.jpg"]}, "the record names 2 images, the sample holds 1"),
        ({"conversations": [{**TALK[0], "video": "a.mp4"}, TALK[1]]}, "the field 'video' of turn 0"),
        ({"conversations": [TALK[0], {**TALK[1], "loss": False}]}, "the field 'loss' of turn 1"),
        ({"conversations": [TALK[0], {**TALK[1], "weight": 0}]}, "the field 'weight' of turn 1"),
        ({"conversations": [{**TALK[0], "value": "<image>\n<video>\nwhat?"}, TALK[1]]}, "turn 0 holds <video>"),
    ],
)
def test_what_changes_the_meaning_is_refused_by_name(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(SampleError, match=f"^unread_content: {named}"):
        parse_sample("k", sample(b"1", **fields))
    if "names" in named:
        return
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.jpg").write_bytes(b"1")
    row = {"id": "x", "image": "a.jpg", "conversations": TALK, **fields}
    with pytest.raises(SourceError, match=rf"record 1 \(id 'x'\): {named}"):
        llava(tmp_path, [{"id": "good", "conversations": TEXT}, row])
    assert llava(tmp_path, [{"id": "good", "conversations": TEXT}, row], faults="skip").report() == {
        "unread_content": 1
    }


@pytest.mark.parametrize("member", ["mp4", "wav", "left.flac", "bmp", "tiff", "heic"])
def test_films_sounds_and_other_images_are_refused(member: str) -> None:
    with pytest.raises(SampleError, match=rf"^unread_content: the member \.{member} is not read"):
        parse_sample("k", {**build_members({"conversations": TEXT}, []), member: b"x"})


def test_what_changes_nothing_is_counted_by_name_kept_and_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields: dict[str, Any] = {"url": "http://x", "video": None, "system": "", "image": "a.jpg", "tools": []}
    turns = [{**TALK[0], "source": "coco"}, {**TALK[1], "loss": True}]
    members = {**sample(b"1", **{**fields, "conversations": turns}), "mask.png": b"m", "cls": b"7"}
    html = [{"from": "human", "value": "What does a <video> tag do?"}, {"from": "gpt", "value": "<audio>"}]
    assert parse_sample("k", build_members({"conversations": html}, [])).turns[0].text == html[0]["value"]
    assert sorted(unread(members)) == [
        ".cls",
        ".mask.png",
        "system",
        "tools",
        "turn.loss",
        "turn.source",
        "url",
        "video",
    ]
    url = store(tmp_path, a=pack_shard([("k", members), ("bad", {"json": b"{"})]))
    for name in ("b.tar", "c.TAR", "d.tar.gz", "e.tgz", "notes.txt"):
        storage.write_bytes(f"{url}/{name}", b"not looked at")
    for said in ("written in", "was there already"):
        assert JOB.main(["webdataset", "--output", url, "--pattern", "a.*"]) == 0
        printed = capfd.readouterr().out
        assert said in printed
        assert "left out: 4 archive_outside_pattern" in printed
        assert "faulty: 1 bad_json" in printed
        assert "1 .mask.png" in printed
        assert "1 turn.source, 1 url" in printed
    kept = load_manifest(url)
    assert kept.report[survey.FAULTY] == {"bad_json": 1}
    assert index_shards(url, Tars("a.*")).manifest.sha256 == kept.sha256


def test_left_out_records_are_kept_with_the_manifest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "img").mkdir()
    rows = [{"id": n, "conversations": TEXT, "origin": "here"} for n in range(4)]
    (tmp_path / "r.json").write_text(json.dumps([*rows[:3], {"id": 9}, rows[3]]))
    out = str(tmp_path / "set")
    settings = [
        "--records",
        str(tmp_path / "r.json"),
        "--images",
        str(tmp_path / "img"),
        "--faults",
        "skip",
        "--limit",
        "4",
    ]
    for _ in range(2):
        assert JOB.main(["llava", "--output", out, *settings]) == 0
        printed = capfd.readouterr().out
        assert "left out: 1 bad_conversation, 1 past_limit" in printed
        assert "not read: 3 origin" in printed
    assert load_manifest(out).report[survey.LEFT_OUT] == {"bad_conversation": 1, "past_limit": 1}


def test_a_dataset_without_a_sample_to_train_is_an_error(tmp_path: Path) -> None:
    url = store(tmp_path, a=pack_shard([("k1", {"jpg": b"1"}), ("k2", {"jpg": b"1", "json": b"{}"})]))
    with pytest.raises(
        NoSampleError, match=r"none of the 2 samples can be trained.*First: k1: missing_json: no k1\.json"
    ):
        index_shards(url)
    assert storage.list_files(url) == ["a.tar"]


# --------------------------------------------------------------------------------------------------------- img2dataset


def img2dataset_shard(captions: dict[str, str], **meta: Any) -> bytes:
    """A shard in img2dataset's layout: KEY.jpg, KEY.txt and KEY.json with its metadata, written by webdataset."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False) as writer:
        for key, caption in captions.items():
            fields = {
                "url": f"https://example.org/{key}.jpg",
                "caption": caption,
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 256,
                "height": 256,
                "original_width": 640,
                "original_height": 480,
                "exif": "{}",
                "sha256": "0" * 64,
                **meta,
            }
            metadata = json.dumps(fields, indent=4).encode()
            writer.write({"__key__": key, "jpg": key.encode(), "json": metadata, "txt": caption.encode()})
    return buffer.getvalue()


def img2dataset_stats(successes: int, download: int, resize: int) -> bytes:
    counts = {"count": successes + download + resize, "successes": successes, "failed_to_download": download}
    return json.dumps(
        {**counts, "failed_to_resize": resize, "duration": 1.5, "status_dict": {"success": successes}}
    ).encode()


def test_shards_of_img2dataset_are_read_as_captions(tmp_path: Path) -> None:
    captions = {"000000000": "a red bus", "000000002": " zwei Hunde \n", "000000003": ""}
    storage.write_bytes(f"{tmp_path}/00000.tar", img2dataset_shard(captions))
    storage.write_bytes(f"{tmp_path}/00000_stats.json", img2dataset_stats(3, 5, 2))
    storage.write_bytes(f"{tmp_path}/00000.parquet", b"metadata of all rows")
    storage.write_bytes(f"{tmp_path}/00001.tar", img2dataset_shard({"000010000": "a cat"}, similarity=float("nan")))
    made = index_shards(str(tmp_path)).manifest
    samples = [pair for info in made.shards for pair in read_shard(made.url, info)]
    read = [parse_sample(key, members) for key, members in samples if key != "000000003"]
    question = Turn("user", CAPTION_QUESTION)
    assert [one.turns for one in read] == [
        (question, Turn("assistant", reply)) for reply in ("a red bus", "zwei Hunde", "a cat")
    ]
    assert [one.images for one in read] == [(b"000000000",), (b"000000002",), (b"000010000",)]
    assert made.report[survey.LEFT_OUT] == {"failed_to_download": 5, "failed_to_resize": 2}
    assert made.report[survey.FAULTY] == {"missing_caption": 1}
    assert made.report[survey.NOT_READ]["original_width"] == 2
    assert not {"caption", "status", ".txt", ".json"} & made.report[survey.NOT_READ].keys()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"jpg": b"1", "txt": b" "}, "the caption is ' '"),
        ({"jpg": b"1", "txt": b"\xff"}, "the caption is not UTF-8"),
        ({"txt": b"a cat"}, "needs one image; found 0"),
        ({"0.jpg": b"1", "1.jpg": b"2", "txt": b"two"}, "needs one image; found 2"),
        ({"jpg": b"1", "json": b'{"caption": null}'}, "the caption is None"),
        (
            {"jpg": b"1", "txt": b"x", "json": b'{"status": "failed_to_resize"}'},
            "status of the sample is 'failed_to_resize'",
        ),
    ],
)
def test_a_caption_that_is_none_is_named(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(SampleError, match=message) as caught:
        parse_sample("k", members)
    assert caught.value.reason == ("missing_image" if "found 0" in message else "missing_caption")


def test_captions_without_metadata_or_without_a_text_file() -> None:
    assert parse_sample("k", {"png": b"1", "txt": b"a cat"}).turns[1].text == "a cat"
    assert parse_sample("k", {"png": b"1", "json": b'{"caption": "a dog"}'}).turns[1].text == "a dog"
    assert parse_sample("k", {**sample(b"1"), "txt": b"not this"}).turns[1].text == "red", "a conversation goes first"
    with pytest.raises(SampleError, match=r"^bad_json"):
        parse_sample("k", {"jpg": b"1", "txt": b"x", "json": b'{"conversations": [}'})


def test_a_shard_that_lost_samples_since_img2dataset_wrote_it_is_named(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/00000.tar", img2dataset_shard({"0": "a", "1": "b"}))
    storage.write_bytes(f"{tmp_path}/00000_stats.json", img2dataset_stats(3, 0, 0))
    with pytest.raises(ShardError, match=r"00000\.tar: it holds 2 samples, but img2dataset wrote 3") as caught:
        index_shards(str(tmp_path))
    assert caught.value.fault == "wrong_count"


# ---------------------------------------------------------------------------------------------- advice that works


@pytest.mark.parametrize("size", ["equal", "another"])
def test_an_indexed_shard_that_was_replaced_is_not_there_already(tmp_path: Path, size: str) -> None:
    url = store(tmp_path, a=shard(b"1", b"2"), b=shard(b"3"))
    first = index_shards(url).manifest
    other = shard(b"4") if size == "equal" else shard(b"4" * 50000)
    assert (len(other) == len(shard(b"3"))) == (size == "equal")
    storage.write_bytes(f"{url}/b.tar", other)
    with pytest.raises(ShardError, match=r"give the command of jobs/make_shards\.py .* again, with --overwrite"):
        read_shard(url, first.shards[1])
    with pytest.raises(DatasetConflictError, match="--overwrite") as caught:
        index_shards(url)
    if size == "equal":
        assert "1 of its 2 shards are not as it says:\n  b.tar: " in str(caught.value)
    again = index_shards(url, overwrite=True).manifest
    assert again.sha256 != first.sha256
    assert len(read_shard(url, again.shards[1])) == 1
    assert index_shards(url).reused


@pytest.mark.parametrize("damage", ["replaced", "missing", "truncated"])
def test_a_made_shard_that_was_damaged_is_not_there_already(tmp_path: Path, damage: str) -> None:
    (tmp_path / "img").mkdir()
    source = llava(tmp_path, [{"id": n, "conversations": TEXT} for n in range(6)], heldout_share=0.0)
    url = str(tmp_path / "set")
    first = make_shards(source, url, samples_per_shard=2).manifest
    file = tmp_path / "set" / "train-000001.tar"
    body = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(body[:700] if damage == "truncated" else body.replace(b"red", b"tan"))
    with pytest.raises(DatasetConflictError, match=r"1 of its 3 shards are not as it says:\n.*train-000001\.tar"):
        make_shards(source, url, samples_per_shard=2)
    assert make_shards(source, url, samples_per_shard=2, check=False).reused, "the training checks what it reads"
    again = make_shards(source, url, samples_per_shard=2, overwrite=True).manifest
    assert (again.sha256, file.read_bytes()) == (first.sha256, body)


def test_images_that_are_missing_in_storage_are_found_before_writing_and_can_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that goes missing while shards are written is left out as well, and counted."""
    objects = {"a.jpg": b"1", "sub/b.jpg": b"2"}
    listings = []

    def listed(url: str, retry_s: float = 0) -> list[str]:
        listings.append(url)
        return [*objects, "goes.jpg"]

    def read(url: str, retry_s: float = 0) -> bytes:
        if not storage.is_s3(url):
            return Path(url).read_bytes()
        if (name := url.removeprefix("s3://bucket/img/")) not in objects:
            raise storage.ObjectMissingError(f"{url}: no such object")
        return objects[name]

    monkeypatch.setattr(storage, "list_files", listed)
    monkeypatch.setattr(storage, "read_bytes", read)
    names = ["a.jpg", "missing.jpg", "sub/b.jpg", "goes.jpg"]
    (tmp_path / "r.json").write_text(json.dumps([{"id": name, "image": name, "conversations": TALK} for name in names]))
    settings: dict[str, Any] = {"images": "s3://bucket/img", "heldout_share": 0.0}
    with pytest.raises(SourceError, match=r"record 1 .*: the image 's3://bucket/img/missing\.jpg' is missing"):
        Llava(LlavaSettings(records=str(tmp_path / "r.json"), **settings))
    source = Llava(LlavaSettings(records=str(tmp_path / "r.json"), **settings, faults="skip"))
    assert len(listings) == 2, "one listing for all records"
    assert len(list(source.samples(TRAIN))) == 2
    assert source.report() == {"undecodable_image": 2}


# ------------------------------------------------------------------------------------------------------------ in a job


def test_a_job_says_what_was_found_and_which_held_out_images_a_mixture_trains_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipelines.config.recipe import Recipe, RunSettings
    from pipelines.config.settings import DataSettings
    from pipelines.job.datasets import ensure_shards

    main = store(tmp_path / "main", train=shard(b"1", source="web"), val=shard(b"2", b"3"))
    more = store(tmp_path / "more", a=shard(b"3", b"4", prefix="another"))
    old = store(tmp_path / "old", a=shard(b"2"))
    index_shards(main, heldout="val.tar")
    for url in (more, old):
        index_shards(url)
    storage.delete(f"{old}/{DIGESTS_NAME}")
    data = DataSettings(manifest=main, mixture={more: 1.0, old: 1.0})
    manifests = ensure_shards(Recipe(data=data, run=RunSettings(str(tmp_path), "r")))
    assert [manifest.report for manifest in manifests] == [{survey.NOT_READ: {"source": 1}}, {}, {}]
    printed = capfd.readouterr().out
    assert f"{main}/manifest.parquet: not read: 1 source" in printed
    assert f"{more}/manifest.parquet: 1 of the 2 held-out images are trained on in this dataset" in printed
    assert f"{old}/" not in printed, "it was made before digests were kept"
