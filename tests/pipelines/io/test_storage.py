"""Storage: addresses, reading and writing, and errors that name the thing, on local files and on a real S3 server."""

from collections.abc import Callable
from pathlib import Path

import pytest

from infra.processes import choose_port
from pipelines.io import storage
from pipelines.io.arrow import arrow_filesystem
from pipelines.io.s3_client import PART_BYTES
from pipelines.io.storage_check import require_access
from tests.pipelines.s3_fixture import BUCKET, S3Server


def test_join_keeps_schemes_and_roots() -> None:
    assert storage.join("s3://b/p/", "/x/", "y.tar") == "s3://b/p/x/y.tar"
    assert storage.join("/data", "x") == "/data/x"
    assert storage.join("/", "x") == "/x"
    assert storage.join("s3://b", "") == "s3://b"


def test_split_s3() -> None:
    assert storage.split_s3("s3://b/a/c/") == ("b", "a/c")
    assert storage.split_s3("s3://b") == ("b", "")
    with pytest.raises(storage.StorageError, match="names no bucket"):
        storage.split_s3("s3:///x")


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(storage.StorageError, match="'gs' is not supported"):
        storage.read_bytes("gs://bucket/x")
    with pytest.raises(storage.StorageError, match="'http' is not supported"):
        arrow_filesystem("http://host/x")


def _round_trip(base: str) -> None:
    url = storage.join(base, "deep/er/object.bin")
    assert not storage.exists(url)
    with pytest.raises(storage.ObjectMissingError, match=r"object\.bin"):
        storage.read_bytes(url)
    with pytest.raises(storage.ObjectMissingError, match=r"object\.bin"):
        storage.read_bulk(url)
    data = bytes(range(256)) * 5000
    storage.write_bytes(url, data)
    assert storage.exists(url)
    assert storage.read_bytes(url) == data
    assert storage.read_bulk(url) == data
    assert storage.read_range(url, 1000, 5000) == data[1000:6000]
    assert storage.read_range(url, len(data) - 3, 5000) == data[-3:]
    assert storage.read_range(url, len(data) + 3, 5000) == storage.read_range(url, 7, 0) == b""
    storage.write_bytes(url, b"new")
    assert storage.read_bulk(url) == b"new"
    storage.write_json(storage.join(base, "deep/a.json"), {"b": 1, "ä": [2]})
    assert storage.read_json(storage.join(base, "deep/a.json")) == {"b": 1, "ä": [2]}
    assert storage.list_sizes(base) == {"deep/a.json": 34, "deep/er/object.bin": 3}
    assert storage.exists(storage.join(base, "deep"))
    storage.write_bytes(storage.join(base, "bad.json"), b"{")
    with pytest.raises(storage.StorageError, match=r"bad\.json: not JSON"):
        storage.read_json(storage.join(base, "bad.json"))
    storage.delete(url)
    storage.delete(url)
    assert storage.list_files(base) == ["bad.json", "deep/a.json"]
    assert storage.list_files(storage.join(base, "nothing")) == []
    storage.write_bytes(storage.join(base, "shallow/x"), b"x")
    assert storage.list_folders(base) == ["deep", "shallow"]
    assert storage.list_folders(storage.join(base, "nothing")) == []


def test_local_round_trip(tmp_path: Path) -> None:
    _round_trip(str(tmp_path / "base"))


def test_local_write_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.bin"
    storage.write_bytes(str(target), b"old")

    def fail(self: object, other: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(storage.StorageError, match="disk full"):
        storage.write_bytes(str(target), b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]
    assert target.read_bytes() == b"old"


@pytest.mark.stack
def test_s3_round_trip(s3: S3Server) -> None:
    _round_trip(f"s3://{BUCKET}/round/trip")


@pytest.mark.stack
def test_large_object_goes_in_parts(s3: S3Server, tmp_path: Path) -> None:
    data = b"0123456789abcdef" * (101 << 16)
    url = f"s3://{BUCKET}/large/large.bin"
    (tmp_path / "large.bin").write_bytes(data)
    storage.write_file(tmp_path / "large.bin", url)
    assert storage.list_sizes(f"s3://{BUCKET}/large") == {"large.bin": len(data)}
    assert storage.read_bulk(url) == data
    first, count = PART_BYTES - 5, 2 * PART_BYTES + 9
    assert storage.read_range(url, first, count) == data[first : first + count]


@pytest.mark.stack
@pytest.mark.parametrize(
    "use",
    [
        storage.read_bytes,
        storage.read_bulk,
        storage.exists,
        storage.list_files,
        require_access,
        storage.read_json,
        lambda url: storage.write_bytes(url, b"x"),
    ],
)
def test_missing_bucket_is_named(s3: S3Server, use: Callable[[str], object]) -> None:
    with pytest.raises(storage.StorageError, match="bucket 'nowhere' does not exist") as caught:
        use("s3://nowhere/a/b")
    assert s3.endpoint in str(caught.value)
    assert not isinstance(caught.value, storage.ObjectMissingError)


@pytest.mark.stack
@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize(
    "use",
    [
        storage.read_bytes,
        storage.read_bulk,
        storage.exists,
        storage.list_files,
        require_access,
        lambda url: storage.write_bytes(url, b"x"),
    ],
)
def test_wrong_credentials_are_named_without_the_secret(
    s3: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    wrong: str,
    use: Callable[[str], object],
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    monkeypatch.setenv(wrong, "wrong-value")
    with pytest.raises(storage.StorageError, match="refused the credentials for the bucket 'meteor'") as caught:
        use(f"s3://{BUCKET}/a")
    assert "AWS_SECRET_ACCESS_KEY" in str(caught.value)
    assert "wrong-value" not in str(caught.value)
    assert s3.secret_key not in str(caught.value)
    assert not isinstance(caught.value, storage.TransientStorageError)


def at_once(use: Callable[..., object]) -> Callable[[str], object]:
    return lambda url: use(url, retry_s=0.0)


@pytest.mark.parametrize(
    "use",
    [
        *map(at_once, [storage.read_bytes, storage.read_bulk, storage.list_files, storage.exists]),
        require_access,
    ],
)
def test_unreachable_endpoint_is_named(monkeypatch: pytest.MonkeyPatch, use: Callable[[str], object]) -> None:
    endpoint = f"http://127.0.0.1:{choose_port(set())}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(storage.TransientStorageError, match="cannot be reached; is the object store up") as caught:
        use("s3://bucket/a")
    assert endpoint in str(caught.value)


def test_endpoint_without_scheme_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    with pytest.raises(storage.StorageError, match="has no scheme"):
        storage.read_bulk("s3://bucket/a")
    with pytest.raises(storage.StorageError, match="has no scheme"):
        storage.read_bytes("s3://bucket/a")
