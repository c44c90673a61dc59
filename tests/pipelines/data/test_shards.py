"""Shards: exact bytes, a manifest that is believed, and every damage found and named."""

import dataclasses
import hashlib
import io
import pickle
import tarfile
import time
from pathlib import Path
from typing import get_args

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.data import shards
from pipelines.data.schema import SampleError, parse_sample
from pipelines.data.shards import (
    Manifest,
    ShardError,
    ShardInfo,
    fetch_shard,
    load_manifest,
    read_shard,
    save_manifest,
    write_shards,
)
from pipelines.data.tar_format import ShardFault, pack_shard, parse_shard
from pipelines.io import storage
from pipelines.io.retry import Backoff
from tests.pipelines.s3_fixture import BUCKET, S3Server

SAMPLES = [(f"k{number:03d}", {"json": b"{}", "jpg": bytes([number]) * (number * 37)}) for number in range(20)]


def tar_of(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make(url: str, count: int = 20, per_shard: int = 8) -> Manifest:
    infos = write_shards(SAMPLES[:count], url, "train", per_shard)
    return save_manifest(url, infos, {"format": 1, "source": {"name": "test"}})


# ---------------------------------------------------------------------------------------------------------------- tars


@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9-]{1,12}", fullmatch=True),
        st.dictionaries(
            st.from_regex(r"([0-9]\.)?(jpg|png|npy)|json|txt", fullmatch=True), st.binary(max_size=1500), min_size=1
        ),
        max_size=6,
    )
)
@settings(deadline=None, max_examples=40)
def test_parse_inverts_pack(samples: dict[str, dict[str, bytes]]) -> None:
    data = pack_shard(list(samples.items()))
    assert data == pack_shard([(key, dict(reversed(members.items()))) for key, members in samples.items()])
    assert parse_shard(data, "x").samples == list(samples.items())


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    """The oracle is the library that users read such shards with."""
    (tmp_path / "x.tar").write_bytes(pack_shard(SAMPLES))
    theirs = [
        (one["__key__"], {name: data for name, data in one.items() if not name.startswith("__")})
        for one in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False, empty_check=False)
    ]
    assert theirs == parse_shard((tmp_path / "x.tar").read_bytes(), "x").samples == SAMPLES


def test_every_truncation_is_found() -> None:
    """Cut anywhere before the end mark, also exactly between two members, where tarfile itself says nothing."""
    data = pack_shard(SAMPLES[:4])
    end = max(position for position in range(0, len(data), 512) if any(data[position : position + 512])) + 512
    for cut in [*range(0, end, 256), end, end + 511]:
        with pytest.raises(ShardError) as caught:
            parse_shard(data[:cut], "s3://b/x.tar")
        assert caught.value.fault == ("not_a_tar" if cut < 512 else "truncated"), cut
        assert str(caught.value).startswith("s3://b/x.tar: ")
    assert len(parse_shard(data[: end + 512], "x").samples) == 4


def test_damage_in_the_middle_is_found() -> None:
    data = bytearray(pack_shard(SAMPLES[:4]))
    second = data.index(b"k001.jpg")
    data[second : second + 512] = b"\x07" * 512
    with pytest.raises(ShardError, match="breaks off or is damaged at byte") as caught:
        parse_shard(bytes(data), "x")
    assert caught.value.fault == "truncated"


@pytest.mark.parametrize("data", [b"", b"<html>503</html>", b"\x1f\x8b" + b"x" * 600, b"PK\x03\x04" * 400])
def test_not_a_tar(data: bytes) -> None:
    with pytest.raises(ShardError, match="not an \\(uncompressed\\) tar") as caught:
        parse_shard(data, "x")
    assert caught.value.fault == "not_a_tar"


def test_empty_tar_has_no_samples() -> None:
    assert parse_shard(tar_of(), "x").samples == []


@pytest.mark.parametrize(
    "names",
    [("a.json", "a.json"), ("a.jpg", "b.jpg", "a.json"), ("a.jpg", "a.JPG"), ("d/a.json", "e/a.json", "d/a.jpg")],
)
def test_duplicate_key_is_named(names: tuple[str, ...]) -> None:
    with pytest.raises(ShardError, match=r"the key '(d/)?a' is there twice") as caught:
        parse_shard(tar_of(*((name, b"x") for name in names)), "x")
    assert caught.value.fault == "duplicate_key"


@pytest.mark.parametrize("name", ["a.pkl", "a.pyd", "a.model.PTH", "a.pickle"])
def test_pickled_member_is_refused(name: str) -> None:
    with pytest.raises(ShardError, match="is pickled data") as caught:
        parse_shard(tar_of(("a.json", b"{}"), (name, b"\x80\x04.")), "x")
    assert caught.value.fault == "refused_member"
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["/etc/a.json", "../a.json", "d/../../a.json", "d\\..\\a.json"])
def test_escaping_member_is_refused(name: str) -> None:
    with pytest.raises(ShardError, match="leaves the archive") as caught:
        parse_shard(tar_of((name, b"{}")), "x")
    assert caught.value.fault == "refused_member"


def test_entries_that_are_no_members_are_ignored_and_counted() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in [("d", tarfile.DIRTYPE), ("l.json", tarfile.SYMTYPE), ("h.json", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in ["README", "._x.json", "__meta.json__", "./d/x.y/k.0.jpg"]:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(b"1"))
    contents = parse_shard(buffer.getvalue(), "x")
    assert contents.samples == [("d/x.y/k", {"0.jpg": b"1"})]
    assert contents.ignored == {"directory": 1, "link_or_device": 2, "metadata": 1, "no_key_or_extension": 2}


@pytest.mark.parametrize(
    ("key", "extension"),
    [("a.b", "jpg"), ("", "jpg"), ("a/b", "jpg"), ("__a__", "jpg"), ("a", "pkl"), ("a", "x/y"), ("a", "v1.json")],
)
def test_what_could_not_be_read_back_is_not_written(key: str, extension: str) -> None:
    with pytest.raises(ValueError, match="written"):
        pack_shard([(key, {extension: b"x"})])


# ------------------------------------------------------------------------------------------------- manifest and reading


def test_write_and_read_back(tmp_path: Path) -> None:
    made = make(str(tmp_path))
    loaded = load_manifest(str(tmp_path))
    assert loaded == made == load_manifest(made.url)
    assert loaded.sha256 == made.sha256
    assert [(shard.path, shard.samples) for shard in loaded.split("train")] == [
        ("train-000000.tar", 8),
        ("train-000001.tar", 8),
        ("train-000002.tar", 4),
    ]
    assert loaded.samples("train") == 20
    assert loaded.shards[2].members == {"jpg": 4, "json": 4}
    read = [sample for shard in loaded.shards for sample in read_shard(loaded.url, shard)]
    assert read == SAMPLES
    with pytest.raises(ValueError, match="no split 'test'; it has: train"):
        loaded.split("test")


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    first, second = make(str(tmp_path / "a")), make(str(tmp_path / "b"))
    assert first.shards == second.shards
    assert first.sha256 == second.sha256
    for name in ["train-000000.tar", "manifest.parquet"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert make(str(tmp_path / "c"), per_shard=7).sha256 != first.sha256


def test_duplicate_key_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'k000' occurs twice in the split 'train'"):
        write_shards([*SAMPLES, SAMPLES[0]], str(tmp_path), "train", 8)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="there is no manifest here: the prefix is empty or") as caught:
        load_manifest(str(tmp_path))
    assert caught.value.fault == "missing"


def test_foreign_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ShardError, match="not a manifest of this format"):
        load_manifest(str(tmp_path))
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1]}), tmp_path / "manifest.parquet")
    with pytest.raises(ShardError, match="not a manifest of this format"):
        load_manifest(str(tmp_path))


def test_shard_path_stays_in_the_folder(tmp_path: Path) -> None:
    manifest = make(str(tmp_path / "d"))
    for path in ["../x.tar", "/x.tar", "a/../../x.tar"]:
        with pytest.raises(ShardError, match="leaves the folder"):
            read_shard(manifest.url, dataclasses.replace(manifest.shards[0], path=path))


def damaged(tmp_path: Path, change: bytes | None) -> ShardError:
    manifest = make(str(tmp_path))
    file = tmp_path / "train-000001.tar"
    file.unlink() if change is None else file.write_bytes(change)
    with pytest.raises(ShardError, match="train-000001") as caught:
        read_shard(manifest.url, manifest.shards[1], backoff=Backoff(0.0))
    assert read_shard(manifest.url, manifest.shards[0]) == SAMPLES[:8]
    return caught.value


def test_missing_shard(tmp_path: Path) -> None:
    assert damaged(tmp_path, None).fault == "missing"


def test_truncated_shard(tmp_path: Path) -> None:
    error = damaged(tmp_path, pack_shard(SAMPLES[8:16])[:3000])
    assert error.fault == "truncated"
    assert "3000 of" in str(error)


def test_wrong_body(tmp_path: Path) -> None:
    assert damaged(tmp_path, b"<html>gone</html>").fault == "not_a_tar"
    assert damaged(tmp_path, b"x" * 100_000).fault == "not_a_tar"


@pytest.mark.parametrize("count", [7, 9, 8])
def test_replaced_shard(tmp_path: Path, count: int) -> None:
    other = pack_shard([(f"n{number}", {"json": b"{}", "jpg": b"9" * 5000}) for number in range(count)])
    assert damaged(tmp_path, other).fault == "replaced"


def test_flipped_byte(tmp_path: Path) -> None:
    data = bytearray(pack_shard(SAMPLES[8:16]))
    data[700] ^= 1
    assert damaged(tmp_path, bytes(data)).fault in ("replaced", "not_a_tar")


def test_wrong_count_in_the_manifest(tmp_path: Path) -> None:
    manifest = make(str(tmp_path))
    with pytest.raises(ShardError, match="8 samples, but the manifest says 9") as caught:
        read_shard(manifest.url, dataclasses.replace(manifest.shards[0], samples=9))
    assert caught.value.fault == "wrong_count"


def test_wrong_bodies_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make(str(tmp_path))
    good, calls = storage.read_bulk, []

    def flaky(url: str, retry_s: float) -> bytes:
        calls.append(url)
        if len(calls) == 1:
            raise storage.ObjectMissingError("a server that just starts")
        return good(url)[: 2000 if len(calls) == 2 else None]

    monkeypatch.setattr(storage, "read_bulk", flaky)
    assert read_shard(manifest.url, manifest.shards[0], backoff=Backoff(0.0)) == SAMPLES[:8]
    assert len(calls) == 3


def test_retries_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make(str(tmp_path))

    def down(url: str, retry_s: float) -> bytes:
        raise storage.TransientStorageError("connection refused")

    monkeypatch.setattr(storage, "read_bulk", down)
    wanted = r"train-000000\.tar: could not be read, .* for 7 s \(data\.read_patience_s\).*: connection refused"
    with pytest.raises(ShardError, match=wanted) as caught:
        read_shard(manifest.url, manifest.shards[0], retry_s=7.0)
    assert caught.value.fault == "unreadable"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.shard, again.fault, str(again)) == (caught.value.shard, "unreadable", str(caught.value))
    with pytest.raises(ShardError, match="could not be read"):  # storage being down is no bad shard
        fetch_shard(manifest.url, manifest.shards[0], 7.0, "drop")


# ---------------------------------------------------------------------------------------------------------- bad shards


def damage(root: Path, manifest: Manifest, fault: ShardFault) -> ShardInfo:
    """Do to the second shard what ends in that fault; its row of the manifest."""
    file, info = root / "train-000001.tar", manifest.shards[1]
    good = file.read_bytes()
    if fault == "missing":
        file.unlink()
    elif fault == "wrong_count":
        return dataclasses.replace(info, samples=9)
    elif fault in ("truncated", "not_a_tar", "replaced"):
        other = {"truncated": good[:3000], "not_a_tar": b"<html>gone</html>", "replaced": pack_shard(SAMPLES[:8])}
        file.write_bytes(other[fault])
    else:
        names = {
            "duplicate_key": ("a.json", "b.json", "a.jpg"),
            "dotted_key": ("a.v1.json", "a.v1.jpg"),
            "refused_member": ("a.json", "a.pkl"),
        }[fault]
        file.write_bytes(tar_of(*((name, b"x") for name in names)))
        data = file.read_bytes()
        return dataclasses.replace(info, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    return info


OF_TABLES = {"not_a_table", "wrong_columns", "too_large"}


@pytest.mark.parametrize("fault", sorted(set(get_args(ShardFault)) - {"unreadable"} - OF_TABLES))
def test_a_bad_shard_fails_or_drops_all_its_samples_with_a_reason(
    tmp_path: Path, fault: ShardFault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    manifest = make(str(tmp_path))
    info = damage(tmp_path, manifest, fault)
    with pytest.raises(ShardError, match=r"train-000001\.tar") as caught:
        fetch_shard(manifest.url, info)
    assert caught.value.fault == fault
    samples = fetch_shard(manifest.url, info, bad_shards="drop")
    assert [key for key, _ in samples] == [f"train-000001.tar[{index}]" for index in range(info.samples)]
    for key, members in samples:
        with pytest.raises(SampleError) as refused:
            parse_sample(key, members)
        assert (refused.value.reason, refused.value.detail) == ("bad_shard", str(caught.value))
    assert fetch_shard(manifest.url, manifest.shards[0], bad_shards="drop") == SAMPLES[:8]


def test_an_empty_shard_is_a_good_shard(tmp_path: Path) -> None:
    make(str(tmp_path))
    manifest = load_manifest(str(tmp_path))
    (tmp_path / "train-000003.tar").write_bytes(pack_shard([]))
    info = shards.shard_info("train-000003.tar", "train", pack_shard([]), [])
    assert info.samples == 0
    save_manifest(str(tmp_path), [*manifest.shards, info], manifest.spec)
    stored = load_manifest(str(tmp_path))
    assert stored.samples("train") == 20
    assert fetch_shard(stored.url, stored.shards[3]) == []
    (tmp_path / "train-000003.tar").unlink()
    assert fetch_shard(stored.url, stored.shards[3], bad_shards="drop") == []


# ----------------------------------------------------------------------------------------------------- over a real S3


@pytest.mark.stack
def test_over_s3(s3: S3Server) -> None:
    url = f"s3://{BUCKET}/set"
    manifest = make(url)
    assert [read_shard(url, shard) for shard in load_manifest(url).shards] == [SAMPLES[:8], SAMPLES[8:16], SAMPLES[16:]]
    storage.write_bytes(f"{url}/train-000001.tar", pack_shard(SAMPLES[8:16])[:3000])
    with pytest.raises(ShardError, match=r"s3://meteor/set/train-000001\.tar: truncated: 3000 of"):
        read_shard(url, manifest.shards[1], backoff=Backoff(0.0))
    storage.delete(f"{url}/train-000001.tar")
    with pytest.raises(ShardError, match="missing, but the manifest lists it"):
        read_shard(url, manifest.shards[1], backoff=Backoff(0.0))
    with pytest.raises(ShardError, match=r"s3://meteor/empty/manifest\.parquet: there is no manifest here"):
        load_manifest(f"s3://{BUCKET}/empty")
    with pytest.raises(storage.StorageError, match="bucket 'nowhere' does not exist"):
        load_manifest("s3://nowhere/set")
    with pytest.raises(storage.StorageError, match="bucket 'nowhere' does not exist"):
        read_shard("s3://nowhere/set", manifest.shards[0])


def test_rows_of_the_manifest_are_checked_types() -> None:
    assert [field.name for field in dataclasses.fields(ShardInfo)] == shards.MANIFEST_SCHEMA.names
