"""Uploads through a proxy that injects faults, to a real S3 server: all arrives, or an error says what did not."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray.train
from ray.train.v2._internal.constants import AWS_RETRYABLE_TOKENS

from infra.fault_proxy import (
    DISK_FULL,
    INSUFFICIENT_STORAGE,
    SLOW_DOWN,
    Fault,
    FaultProxy,
    Refuse,
    Reset,
    Rule,
)
from pipelines.io import bulk, retry, sealed, storage
from pipelines.io.upload import CheckpointUpload, UploadError, upload_folder
from tests.pipelines.s3_fixture import BUCKET, S3Server

SIZES = {"a.json": 500, "empty.txt": 0, "deep/er/model.bin": 23_000_000, "z.bin": 3_000_000}
"""One small file, one without bytes, one that goes in several parts, one in a single large request."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "local"
    for name, size in SIZES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.urandom(size))
    return root


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    monkeypatch.setattr(retry, "BACKOFF", retry.Backoff(longest_s=0.1))
    with FaultProxy(s3.endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.endpoint)
        yield running


def sizes(url: str) -> dict[str, int]:
    """Of what was uploaded; the list of its checksums apart."""
    return {name: size for name, size in storage.list_sizes(url).items() if not sealed.is_list(name)}


def equal(folder: Path, url: str) -> bool:
    return sizes(url) == SIZES and all(
        storage.read_bulk(storage.join(url, name)) == (folder / name).read_bytes() for name in SIZES
    )


def test_a_local_folder(folder: Path, tmp_path: Path) -> None:
    assert upload_folder(folder, str(tmp_path / "stored")) == SIZES
    assert equal(folder, str(tmp_path / "stored"))


@pytest.mark.parametrize(("left", "what"), [("nothing", "is not there"), ("empty", "is empty")])
def test_a_folder_without_files_is_no_upload(tmp_path: Path, left: str, what: str) -> None:
    """Its worker's shards would be missing in a checkpoint that counts."""
    local, train = tmp_path / "local", tmp_path / "train"
    train.mkdir()
    if left == "empty":
        local.mkdir()
    with pytest.raises(UploadError, match=f"local {what}"):
        upload_folder(local, str(tmp_path / "stored"))
    upload = CheckpointUpload(str(train), part=1, parts=2)
    with pytest.raises(UploadError, match=f"local {what}: worker 1 of 2 has lost its files.*TMPDIR"):
        upload(ray.train.Checkpoint(str(local)), "step-1")
    assert not list(train.iterdir()), "nothing is stored that looks like a part"


UPLOAD_FAULTS: dict[str, tuple[Fault, int]] = {
    "slow_down": (SLOW_DOWN, 5),
    "disk_full_for_a_while": (DISK_FULL, 5),
    "insufficient_storage_for_a_while": (INSUFFICIENT_STORAGE, 5),
    "reset_in_the_body": (Reset(0.5, "request"), 5),
    "reset_before_the_answer": (Reset(where="answer"), 5),
    "server_down": (Refuse(1.0), 2),
}


@pytest.mark.stack
@pytest.mark.parametrize("name", UPLOAD_FAULTS)
def test_no_fault_on_the_way_loses_a_byte(folder: Path, proxy: FaultProxy, name: str) -> None:
    fault, times = UPLOAD_FAULTS[name]
    url = f"s3://{BUCKET}/up/{name}"
    proxy.add(Rule(fault, method="PUT", times=times))  # in every file's first requests, whole ones and parts
    proxy.add(Rule(fault, method="PUT", path="partNumber=2", times=1))
    proxy.add(Rule(fault, method="POST", path="uploadId", times=1))  # the end of an upload in parts
    assert upload_folder(folder, url) == SIZES
    assert equal(folder, url)
    assert len(proxy.injected) == times + 2
    proxy.clear()
    assert upload_folder(folder, url) == SIZES  # again is harmless
    assert equal(folder, url)


@pytest.mark.stack
@pytest.mark.parametrize("fault", [DISK_FULL, INSUFFICIENT_STORAGE], ids=["500", "507"])
def test_a_disk_that_stays_full_is_an_error_that_helps(folder: Path, proxy: FaultProxy, fault: Fault) -> None:
    train = f"s3://{BUCKET}/runs/full{fault.code}/train"  # type: ignore[union-attr]
    upload = CheckpointUpload(train, retry_s=1.0)
    proxy.add(Rule(fault, method="PUT", path="model.bin", times=None))
    with pytest.raises(UploadError) as caught:
        upload(ray.train.Checkpoint.from_directory(str(folder)), "step-1")
    text = str(caught.value)
    for part in (str(folder / "deep/er/model.bin"), f"{train}/step-1/deep/er/model.bin", "1 of 4 files"):
        assert part in text
    assert "the one before it is kept" in text
    assert "the same command again under the same run name" in text
    assert not any(token in text for token in AWS_RETRYABLE_TOKENS)  # Ray would retry all of it three times over
    assert proxy.injected
    assert sizes(f"{train}/step-1") == {"a.json": 500}  # nothing of the file that broke off is visible
    proxy.clear()
    stored = upload(ray.train.Checkpoint.from_directory(str(folder)), "step-1")
    assert stored.path == f"{BUCKET}/runs/full{fault.code}/train/step-1"  # type: ignore[union-attr]
    assert equal(folder, f"{train}/step-1")
    with stored.as_directory() as directory:
        assert {name: Path(directory, name).read_bytes() for name in SIZES} == {
            name: (folder / name).read_bytes() for name in SIZES
        }


@pytest.mark.stack
def test_an_object_of_another_size_is_sent_again(
    folder: Path, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/up/short"
    size = bulk.s3_size
    asked: list[str] = []

    def lying(bucket: str, key: str) -> int:
        asked.append(key)
        return size(bucket, key) if len(asked) > 1 else 0

    monkeypatch.setattr(bulk, "s3_size", lying)
    assert upload_folder(folder, url) == SIZES
    assert len(asked) == len(SIZES) + 1
    assert equal(folder, url)


@pytest.mark.stack
def test_what_is_wrong_for_good_fails_at_once(folder: Path, proxy: FaultProxy, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(storage.StorageError, match="bucket 'nowhere' does not exist"):
        upload_folder(folder, "s3://nowhere/x")
    with pytest.raises(storage.StorageError, match="no such folder on this machine"):
        CheckpointUpload(str(tmp_path / "none"))(ray.train.Checkpoint.from_directory(str(folder)), "step-1")
    assert time.monotonic() - start < 5
