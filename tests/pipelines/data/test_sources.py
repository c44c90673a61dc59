"""Sources and dataset making: exact answers, stable splits, same seed same bytes, faults named by record and file."""

import collections
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jobs.make_shards import JOB
from pipelines.data.build import MARKER_NAME, DatasetConflictError, make_shards
from pipelines.data.indexing import index_shards
from pipelines.data.schema import build_members, parse_sample
from pipelines.data.shards import ShardError, load_manifest, read_shard
from pipelines.data.sources import HELDOUT, TRAIN, SourceError, split_of
from pipelines.data.sources.drawing import CENTERS, PALETTE, main_color
from pipelines.data.sources.llava import Llava, LlavaSettings, key_of
from pipelines.data.sources.openmoji import OpenMoji, OpenMojiSettings, QuestionWeights, family_of, short_name
from pipelines.data.sources.openmoji_drawings import cut_to_visible
from pipelines.data.survey import DIGESTS_NAME
from pipelines.data.tar_format import pack_shard
from pipelines.io import storage
from tests.pipelines.s3_fixture import BUCKET, S3Server

SMALL = OpenMojiSettings(code_points=24, heldout_code_points=6, variants=3, text_only_share=0.1, two_image_share=0.2)


def members_of(source: OpenMoji | Llava, split: str) -> dict[str, dict[str, bytes]]:
    return dict(source.samples(split))


# ------------------------------------------------------------------------------------------------------------ openmoji


@pytest.fixture(scope="module")
def openmoji() -> OpenMoji:
    return OpenMoji(SMALL)


def test_every_sample_parses_and_every_form_occurs(openmoji: OpenMoji) -> None:
    samples = members_of(openmoji, TRAIN)
    assert len(samples) == 24 * 3
    parsed = [parse_sample(key, members) for key, members in samples.items()]
    forms = collections.Counter(len(sample.images) for sample in parsed)
    assert set(forms) == {0, 1, 2}
    assert forms[1] > forms[0] + forms[2]
    assert {len(sample.turns) for sample in parsed} == {4}
    for sample in parsed:
        for image in sample.images:
            decoded = Image.open(io.BytesIO(image))
            assert (decoded.format, decoded.size) == ("JPEG", (64, 64))


def true_background(image: Image.Image) -> str:
    """The nearest palette name of the corners' median colour: an independent look at the picture."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.int64)
    corners = np.median([pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]], axis=0)
    return min(PALETTE, key=lambda name: float(((corners - PALETTE[name]) ** 2).sum()))


def true_position(image: Image.Image) -> str:
    """Where the middle of what is not background lies."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.int64)
    off = np.abs(pixels - np.median([pixels[0, 0], pixels[0, -1], pixels[-1, 0]], axis=0)).max(-1) > 40
    rows, columns = np.flatnonzero(off.any(1)), np.flatnonzero(off.any(0))
    middle = (columns[[0, -1]].mean() / image.width, rows[[0, -1]].mean() / image.height)
    return min(CENTERS, key=lambda name: (middle[0] - CENTERS[name][0]) ** 2 + (middle[1] - CENTERS[name][1]) ** 2)


def test_answers_are_true_of_the_pictures(openmoji: OpenMoji) -> None:
    asked: collections.Counter[str] = collections.Counter()
    for key, members in openmoji.samples(TRAIN):
        sample = parse_sample(key, members)
        images = [Image.open(io.BytesIO(image)) for image in sample.images]
        for question, answer in zip(sample.turns[::2], sample.turns[1::2], strict=True):
            text = question.text.replace("<image>\n", "")
            if len(images) == 1 and ("background" in text or "behind" in text):
                assert answer.text == true_background(images[0]), key
                asked["background"] += 1
            elif len(images) == 1 and ("Where" in text or "part" in text):
                assert answer.text == true_position(images[0]), key
                asked["position"] += 1
            elif len(images) == 2 and "Which image" in text:
                colors = [true_background(image) for image in images]
                assert colors[0] != colors[1]
                assert colors[["first", "second"].index(answer.text)] == text.split()[4], key
                asked["which"] += 1
            elif len(images) == 2:
                assert answer.text == true_position(images["second" in text]), key
                asked["where"] += 1
    assert asked["background"] > 30
    assert asked["position"] > 20
    assert min(asked["which"], asked["where"]) > 3


def test_same_seed_same_bytes_other_seed_other_bytes(openmoji: OpenMoji) -> None:
    again = OpenMoji(SMALL)
    for split in (TRAIN, HELDOUT):
        assert list(openmoji.samples(split)) == list(again.samples(split))
    import dataclasses

    other = members_of(OpenMoji(dataclasses.replace(SMALL, seed=1)), TRAIN)
    mine = members_of(openmoji, TRAIN)
    assert other.keys() == mine.keys()  # the seed does not choose the drawings
    assert sum(other[key] != mine[key] for key in mine) > 60


def test_split_is_by_drawing_and_its_siblings() -> None:
    source = OpenMoji(OpenMojiSettings())
    train, heldout = source.pool(TRAIN), source.pool(HELDOUT)
    assert len(train) > 2048
    assert len(heldout) > 128
    assert not {family_of(one) for one in train} & {family_of(one) for one in heldout}
    assert not any(tone in one.split("-") for one in train + heldout for tone in ("1F3FB", "1F3FF"))
    assert family_of("1F468-200D-1F33E") == family_of("1F469-200D-1F33E") != family_of("1F468-200D-1F373")
    assert family_of("1F3C3-200D-2640-FE0F") == family_of("1F3C3")


def test_split_of_is_stable_for_ever() -> None:
    """Literal values: a change here would move held-out samples into training."""
    assert [split_of(name, 0.3) for name in ("1F600", "1F601", "a", "b", "c", "d")] == [HELDOUT, TRAIN] * 3
    share = sum(split_of(f"record {number}", 0.1) == HELDOUT for number in range(5000)) / 5000
    assert 0.08 < share < 0.12


def test_names() -> None:
    assert short_name("1F408", 1) == "cat"
    assert short_name("1F600", 1) is None
    assert short_name("1F600", 2) == "grinning face"
    assert short_name("2764-FE0F", 2) == short_name("2764", 2) == "red heart"
    assert short_name("E000", 3) is None


def test_main_color_and_cut() -> None:
    rgba = np.zeros((20, 30, 4), np.uint8)
    assert cut_to_visible(rgba) is None
    assert main_color(rgba) is None
    rgba[5:15, 10:20] = (210, 30, 30, 255)
    rgba[5, 10:20] = (0, 0, 0, 255)
    cut = cut_to_visible(rgba)
    assert cut is not None
    assert cut.shape == (10, 10, 4)
    assert main_color(cut) == "red"
    rgba[5:15, 10:15] = (30, 80, 210, 255)
    assert main_color(rgba) is None
    rgba[5:15, 10:20] = (0, 0, 0, 255)
    assert main_color(rgba) == "black"


def test_png_with_alpha() -> None:
    source = OpenMoji(OpenMojiSettings(code_points=12, variants=1, png_share=1.0, text_only_share=0, two_image_share=0))
    pngs = [members["png"] for _, members in source.samples(TRAIN) if "png" in members]
    assert len(pngs) > 5
    for data in pngs:
        image = Image.open(io.BytesIO(data))
        assert image.mode == "RGBA"
        assert image.getpixel((0, 0))[3] == 0  # type: ignore[index]


def test_drawings_that_fail_are_counted_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import resvg_py

    source = OpenMoji(OpenMojiSettings(code_points=5))
    first, second = source.pool(TRAIN)[:2]
    good = resvg_py.svg_to_bytes

    def render(**options: Any) -> bytes:
        if first in options["svg_path"]:
            raise ValueError("broken SVG")
        if second in options["svg_path"]:
            return good(svg_string='<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>')
        return good(**options)

    monkeypatch.setattr(resvg_py, "svg_to_bytes", render)
    assert [drawing.code_point for drawing in source.drawings(TRAIN)] == source.pool(TRAIN)[2:7]
    assert source.report() == {"blank": 1, "not_renderable": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 8}, r"image_size is 8; it must be in \[16, 2048\]"),
        ({"image_size": 4096}, r"image_size is 4096; it must be in \[16, 2048\]"),
        ({"variants": 0}, "variants is 0"),
        ({"code_points": -1}, "code_points is -1"),
        ({"heldout_share": 1.0}, r"heldout_share is 1.0; it must be in \[0, 1\)"),
        ({"text_only_share": 0.6, "two_image_share": 0.5}, "leave nothing"),
        ({"png_share": 1.1}, "png_share is 1.1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        OpenMojiSettings(**settings)


def test_bad_weights_are_named() -> None:
    with pytest.raises(SourceError, match=r"questions\.name is -1"):
        QuestionWeights(name=-1)
    with pytest.raises(SourceError, match="background and position are both 0"):
        QuestionWeights(background=0, position=0)


def test_weights_choose_the_questions() -> None:
    only = QuestionWeights(background=1, position=0, color=0, name=0)
    source = OpenMoji(OpenMojiSettings(code_points=10, questions=only, text_only_share=0, two_image_share=0))
    for key, members in source.samples(TRAIN):
        turns = parse_sample(key, members).turns
        assert len(turns) == 2
        assert turns[1].text in PALETTE


# --------------------------------------------------------------------------------------------------------------- llava


def jpeg(color: tuple[int, int, int] = (1, 2, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(buffer, "JPEG")
    return buffer.getvalue()


def talk(images: int = 1) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>" * images + "Hi"}, {"from": "gpt", "value": "Yo"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "img" / "sub").mkdir(parents=True)
    (tmp_path / "img" / "a.jpg").write_bytes(jpeg((255, 0, 0)))
    (tmp_path / "img" / "sub" / "b.JPEG").write_bytes(jpeg((0, 255, 0)))
    (tmp_path / "img" / "c.png").write_bytes(b"not looked at")
    return tmp_path


def llava(folder: Path, rows: list[Any], lines: bool = False, **settings: Any) -> Llava:
    file = folder / ("records.jsonl" if lines else "records.json")
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n" if lines else json.dumps(rows))
    options = {"heldout_share": 0.0, **settings}
    return Llava(LlavaSettings(records=str(file), images=str(folder / "img"), **options))


GOOD: list[Any] = [
    {"id": "one", "image": "a.jpg", "conversations": talk(), "model": "ignored"},
    {"id": "two/x.y", "image": ["sub/b.JPEG", "./c.png"], "conversations": talk(2)},
    {"id": 3, "conversations": talk(0)},
]
TEXT_SAMPLE = build_members(GOOD[2], [])
LINKED = {"id": "x", "image": "link.jpg", "conversations": talk()}


@pytest.mark.parametrize("lines", [False, True])
def test_records_become_samples(folder: Path, lines: bool) -> None:
    samples = list(llava(folder, GOOD, lines).samples(TRAIN))
    assert [key for key, _ in samples] == ["one", key_of("two/x.y"), "3"]
    assert samples[0][1]["jpg"] == (folder / "img" / "a.jpg").read_bytes()
    assert sorted(samples[1][1]) == ["0.jpeg", "1.png", "json"]
    assert samples[1][1]["1.png"] == b"not looked at"
    assert json.loads(samples[1][1]["json"]) == {"id": "two/x.y", "conversations": talk(2)}
    assert [len(parse_sample(key, members).images) for key, members in samples] == [1, 2, 0]
    pack_shard(samples)


def test_split_by_id_does_not_depend_on_the_others(folder: Path) -> None:
    rows = [{"id": f"r{number}", "conversations": talk(0)} for number in range(200)]
    heldout = set(members_of(llava(folder, rows, heldout_share=0.2), HELDOUT))
    fewer = set(members_of(llava(folder, rows[::2], heldout_share=0.2), HELDOUT))
    assert 20 < len(heldout) < 60
    assert fewer == {key for key in heldout if int(key[1:]) % 2 == 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": "x", "image": "no.jpg", "conversations": talk()},
            r"record 3 \(id 'x'\): the image '.*no\.jpg' is missing",
        ),
        ({"id": "x", "image": "../img/a.jpg", "conversations": talk()}, r"'\.\./img/a\.jpg' leaves the image folder"),
        ({"id": "x", "image": "/etc/a.jpg", "conversations": talk()}, "'/etc/a.jpg' leaves the image folder"),
        ({"id": "x", "image": "..\\a.jpg", "conversations": talk()}, "leaves the image folder"),
        ({"id": "x", "image": "s3://b/a.jpg", "conversations": talk()}, "leaves the image folder"),
        (LINKED, "'link.jpg' leaves the image folder by a link; allow it with --follow-links"),
        ({"id": "x", "image": "a.tiff", "conversations": talk()}, "is not one of jpg, jpeg, png"),
        ({"id": "x", "image": 7, "conversations": talk()}, "'image' holds 7"),
        (
            {"id": "one", "image": "a.jpg", "conversations": talk()},
            r"another record has this id[\s\S]*--duplicate-ids rename",
        ),
        ({"id": "x", "image": "a.jpg"}, r"record 3 \(id 'x'\): 'conversations' must be a list"),
        ({"id": "x", "image": "a.jpg", "conversations": []}, "'conversations' must be a list"),
        ({"id": "x", "image": "a.jpg", "conversations": talk(0)}, "1 images but 0 <image>"),
        ({"id": "x", "conversations": talk(1)}, "1 <image> in the conversation but 0 images"),
        ({"image": "a.jpg", "conversations": talk()}, "record 3 .* has no 'id'"),
        ("text", "record 3 .* is a str, not an object"),
    ],
)
def test_faulty_records_are_named(folder: Path, row: Any, message: str) -> None:
    (folder / "secret.jpg").write_bytes(b"x")
    (folder / "img" / "link.jpg").symlink_to(folder / "secret.jpg")
    with pytest.raises(SourceError, match=message) as caught:
        llava(folder, [*GOOD, row])
    if row == LINKED:
        assert len(llava(folder, [*GOOD, row], follow_links=True).records) == 4
    assert "records.json: 1 of 4 records cannot be used" in str(caught.value)
    skipping = llava(folder, [*GOOD, row], faults="skip")
    assert len(skipping.records) == 3
    assert sum(skipping.report().values()) == 1


def test_repeated_ids_can_be_renamed(folder: Path) -> None:
    keys = [key for key, _ in llava(folder, [GOOD[0]] * 3, duplicate_ids="rename").samples(TRAIN)]
    assert keys == ["one", key_of("one#1"), key_of("one#2")]
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[{]", "not JSON"),
        (b'{"id": 1}\n{oops\n', "line 2 is not JSON"),
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_unreadable_records_file_is_named(folder: Path, text: bytes, message: str) -> None:
    (folder / "bad.json").write_bytes(text)
    with pytest.raises(SourceError, match=rf"bad\.json: {message}"):
        Llava(LlavaSettings(records=str(folder / "bad.json"), images=str(folder / "img")))
    with pytest.raises(storage.ObjectMissingError, match=r"gone\.json"):
        Llava(LlavaSettings(records=str(folder / "gone.json"), images=str(folder / "img")))
    (folder / "ok.json").write_text(json.dumps(GOOD))
    with pytest.raises(SourceError, match="is not a folder"):
        Llava(LlavaSettings(records=str(folder / "ok.json"), images=str(folder / "nowhere")))


# -------------------------------------------------------------------------------------------------------------- making


def test_made_twice_is_made_once_and_overwrite_leaves_nothing_stale(openmoji: OpenMoji, tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    first = make_shards(openmoji, url, samples_per_shard=10)
    assert first.manifest.samples(TRAIN) == 72
    assert first.manifest.samples(HELDOUT) == 18
    assert first.manifest.spec["source"]["license"].startswith("drawings: OpenMoji 17.0.0, CC BY-SA 4.0")
    stamp = (tmp_path / "set" / "train-000000.tar").stat().st_mtime_ns
    second = make_shards(OpenMoji(SMALL), url, samples_per_shard=10)
    assert second.reused
    assert second.manifest == first.manifest
    assert (tmp_path / "set" / "train-000000.tar").stat().st_mtime_ns == stamp
    with pytest.raises(DatasetConflictError, match="samples_per_shard: 10 -> 30") as caught:
        make_shards(openmoji, url, samples_per_shard=30)
    assert "--overwrite" in str(caught.value)
    third = make_shards(openmoji, url, samples_per_shard=30, overwrite=True)
    assert storage.list_files(url) == sorted(
        [DIGESTS_NAME, "manifest.parquet", *(shard.path for shard in third.manifest.shards)]
    )
    assert [key for shard in third.manifest.split(TRAIN) for key, _ in read_shard(url, shard)] == [
        key for key, _ in openmoji.samples(TRAIN)
    ]


def test_differences_name_nested_settings(openmoji: OpenMoji, tmp_path: Path) -> None:
    make_shards(openmoji, str(tmp_path))
    other = OpenMoji(OpenMojiSettings(code_points=24, questions=QuestionWeights(name=0.7)))
    with pytest.raises(DatasetConflictError, match=r"source\.settings\.questions\.name: 0\.1 -> 0\.7"):
        make_shards(other, str(tmp_path))


def test_a_killed_run_is_taken_up_but_foreign_tars_are_not(folder: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    source = llava(folder, GOOD)
    (folder / "img" / "a.jpg").unlink()  # lost between the check and the writing: the run dies half-way
    with pytest.raises(SourceError, match="record 'one': its image is missing"):
        make_shards(source, url, samples_per_shard=1)
    assert storage.exists(f"{url}/{MARKER_NAME}")
    with pytest.raises(ShardError, match="there is no manifest"):
        load_manifest(url)
    (folder / "img" / "a.jpg").write_bytes(jpeg())
    assert make_shards(source, url, samples_per_shard=1).manifest.samples(TRAIN) == 3
    assert not storage.exists(f"{url}/{MARKER_NAME}")

    storage.write_bytes(str(tmp_path / "mine" / "x.tar"), pack_shard([("a", TEXT_SAMPLE)]))
    with pytest.raises(DatasetConflictError, match=r"holds 1 tars \(the first is x\.tar\) but no manifest"):
        make_shards(source, str(tmp_path / "mine"))
    index_shards(str(tmp_path / "mine"))
    with pytest.raises(DatasetConflictError, match="never overwritten"):
        make_shards(source, str(tmp_path / "mine"), overwrite=True)


def test_index_existing_shards(tmp_path: Path) -> None:
    url = str(tmp_path)
    bodies = {"a/train-0.tar": 3, "a/train-1.tar": 2, "val/x.tar": 4}
    for path, count in bodies.items():
        storage.write_bytes(
            f"{url}/{path}", pack_shard([(f"k{n}", {**TEXT_SAMPLE, "npy": b"1"}) for n in range(count)])
        )
    before = {path: (tmp_path / path).read_bytes() for path in bodies}
    made = index_shards(url, heldout="val/*")
    assert [(shard.path, shard.split, shard.samples) for shard in made.manifest.shards] == [
        ("a/train-0.tar", TRAIN, 3),
        ("a/train-1.tar", TRAIN, 2),
        ("val/x.tar", HELDOUT, 4),
    ]
    assert {path: (tmp_path / path).read_bytes() for path in bodies} == before
    assert len(read_shard(url, made.manifest.shards[2])) == 4
    assert index_shards(url, heldout="val/*").reused
    storage.write_bytes(f"{url}/b.tar", pack_shard([("z", TEXT_SAMPLE)]))
    with pytest.raises(DatasetConflictError, match="listing_sha256"):
        index_shards(url, heldout="val/*")
    assert index_shards(url, heldout="val/*", overwrite=True).manifest.samples(TRAIN) == 6


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"<html>" * 200, "not_a_tar"),
        (pack_shard([("k", {"jpg": b"1" * 9000})])[:5000], "truncated"),
        (b"", "not_a_tar"),
    ],
)
def test_index_names_the_faulty_shard(tmp_path: Path, body: bytes, fault: str) -> None:
    storage.write_bytes(f"{tmp_path}/good.tar", pack_shard([("a", {"json": b"{}"})]))
    (tmp_path / "worse.tar").write_bytes(body)
    with pytest.raises(ShardError, match=r"worse\.tar: ") as caught:
        index_shards(str(tmp_path))
    assert caught.value.fault == fault
    assert not storage.exists(f"{tmp_path}/manifest.parquet")


def test_index_of_an_empty_prefix(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no object matches '\*\.tar' here"):
        index_shards(str(tmp_path / "empty"))


# ------------------------------------------------------------------------------------------------ the job, on a real S3


@pytest.mark.stack
def test_job_on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    out = f"s3://{BUCKET}/job"
    small = ["--code-points", "10", "--heldout-code-points", "4", "--samples-per-shard", "16"]
    assert JOB.main(["openmoji", "--output", out, *small]) == 0
    printed = capfd.readouterr().out
    assert "s3://meteor/job/manifest.parquet written in" in printed
    assert "train 40 samples 3 shards" in " ".join(printed.split())
    manifest = load_manifest(out)
    assert sum(len(read_shard(out, shard)) for shard in manifest.shards) == 56
    assert JOB.main(["openmoji", "--output", out, *small]) == 0
    assert "was there already" in capfd.readouterr().out
    assert JOB.main(["openmoji", "--output", out, *small, "--seed", "5"]) == 1
    assert "source.settings.seed: 0 -> 5" in capfd.readouterr().err
    assert JOB.main(["webdataset", "--output", f"s3://{BUCKET}/nothing"]) == 1
    assert "no object matches '*.tar' here" in capfd.readouterr().err
    assert JOB.main(["openmoji", "--output", "s3://nowhere/x", *small]) == 1
    assert "the bucket 'nowhere' does not exist" in capfd.readouterr().err
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert JOB.main(["openmoji", "--output", out, *small]) == 1
    assert "refused the credentials" in capfd.readouterr().err


def test_job_refuses_a_misspelt_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert JOB.main(["openmoji", "--output", "x", "--varaints", "3"]) == 2
    assert "--variants" in capsys.readouterr().err
