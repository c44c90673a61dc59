"""Large files over a slow, jerky or dead network: what moves arrives in bounded memory, what does not is given up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from infra.fault_proxy import INTERNAL_ERROR, FaultProxy, Reset, Rule, Status
from infra.throttle import Link
from pipelines.io import bulk, ranged, retry, s3_client, storage
from pipelines.io.pulse import Phase, mark, pulse
from pipelines.io.upload import upload_file
from tests.pipelines.fake_s3 import BUCKET, FakeS3

MB = 10**6
SIZE = 6 * 2**20 + 12_345
PART = 2**20


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of 1 MiB; a socket's limit is 3 s, that of a part 8 s."""
    monkeypatch.setattr(retry, "BACKOFF", retry.Backoff(longest_s=0.1))
    monkeypatch.setattr(bulk, "PART_BYTES", PART)
    monkeypatch.setattr(ranged, "PART_BYTES", PART)
    monkeypatch.setattr(s3_client, "STALL_S", 3.0)
    s3_client._client.cache_clear()
    monkeypatch.setattr(s3_client, "LEAST_BYTES_PER_S", PART // 2)
    monkeypatch.setattr(s3_client.part_limit_s, "__defaults__", (PART,))


def through(
    store: FakeS3, monkeypatch: pytest.MonkeyPatch, *, up: Link | None = None, down: Link | None = None
) -> FaultProxy:
    proxy = FaultProxy(store.endpoint, up=up, down=down)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    return proxy


def file_of(tmp_path: Path, size: int = SIZE) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(os.urandom(size))
    return path


LINKS = {
    "steady": Link(2 * MB),
    "jerky": Link(4 * MB, open_s=0.4, pause_s=1.5),
}


@pytest.mark.parametrize("link", LINKS)
def test_a_slow_store_is_waited_for(
    link: str, fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pauses and all, it takes longer than a socket's limit, and no part is sent twice."""
    local = file_of(tmp_path)
    with through(fake_s3, monkeypatch, up=LINKS[link]) as proxy:
        start = time.monotonic()
        storage.write_file(local, f"s3://{BUCKET}/slow.bin", retry_s=0)
        assert time.monotonic() - start > 2.5
        assert proxy.sent < SIZE * 1.01 + 10_000
    assert fake_s3.objects["slow.bin"] == local.read_bytes()
    assert fake_s3.operations().count("UploadPart") == 7


@pytest.mark.parametrize("link", LINKS)
def test_a_slow_download_is_waited_for(link: str, fake_s3: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_s3.objects["slow.bin"] = data = os.urandom(SIZE)
    with through(fake_s3, monkeypatch, down=LINKS[link]) as proxy:
        assert storage.read_bulk(f"s3://{BUCKET}/slow.bin", retry_s=0) == data
        assert proxy.received < SIZE * 1.01 + 10_000


def test_every_part_that_arrives_is_a_sign_of_life_of_the_upload_alone(fake_s3: FakeS3, tmp_path: Path) -> None:
    local = file_of(tmp_path)
    marks = []
    for phase in (Phase.UPLOAD, Phase.FORWARD):
        mark(phase)
        before = pulse()._marks
        upload_file(local, f"s3://{BUCKET}/x")
        marks.append(pulse()._marks - before)
    assert marks == [7, 0]


def test_memory_holds_a_window_of_parts(fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where parts are read: never more than WINDOW of them are there."""
    local = file_of(tmp_path, 20 * PART)
    there, most, lock = [0], [0], threading.Lock()
    send = bulk._send_part

    def counted(place: dict[str, str], number: int, data: bytes, stopped: threading.Event) -> dict[str, object]:
        with lock:
            there[0] += len(data)
            most[0] = max(most[0], there[0])
        try:
            return send(place, number, data, stopped)
        finally:
            with lock:
                there[0] -= len(data)

    monkeypatch.setattr(bulk, "_send_part", counted)
    with through(fake_s3, monkeypatch, up=Link(20 * MB)):
        storage.write_file(local, f"s3://{BUCKET}/x", retry_s=0)
    assert most[0] == s3_client.WINDOW * PART
    assert fake_s3.objects["x"] == local.read_bytes()


DEAD: dict[str, Callable[[FakeS3, str], object]] = {
    "up": lambda store, path: storage.write_file(Path(path), f"s3://{BUCKET}/x", retry_s=0),
    "down": lambda store, path: storage.read_bulk(f"s3://{BUCKET}/there", retry_s=0),
}


@pytest.mark.parametrize("way", DEAD)
def test_a_dead_store_is_given_up_and_no_try_goes_on(
    way: str, fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = file_of(tmp_path)
    fake_s3.objects["there"] = local.read_bytes()
    before = {thread.ident for thread in threading.enumerate()}
    dead = Link(0)
    with through(fake_s3, monkeypatch, up=dead if way == "up" else None, down=dead if way == "down" else None):
        start = time.monotonic()
        with pytest.raises(storage.TransientStorageError):
            DEAD[way](fake_s3, str(local))
        waited = time.monotonic() - start
        limit_s = s3_client.part_limit_s(PART)
        assert waited < limit_s + 3
        left = [one.name for one in threading.enumerate() if one.ident not in before and "load" in one.name]
        assert left == []
    assert "x" not in fake_s3.objects
    assert fake_s3.uploads == {}


def test_one_fault_costs_one_part(fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = file_of(tmp_path)
    with through(fake_s3, monkeypatch) as proxy:
        proxy.add(Rule(INTERNAL_ERROR, method="PUT", path="partNumber=3", times=2))
        proxy.add(Rule(Reset(0.5, "request"), method="PUT", path="partNumber=5", times=1))
        storage.write_file(local, f"s3://{BUCKET}/x", retry_s=10)
        assert len(proxy.injected) == 3
        assert proxy.sent < SIZE + 2 * PART + 10_000
    assert fake_s3.objects["x"] == local.read_bytes()


def test_a_refusal_in_the_middle_aborts_the_upload(
    fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = file_of(tmp_path, 30 * PART)
    with through(fake_s3, monkeypatch) as proxy:
        proxy.add(Rule(Status(400, "InvalidArgument", "no"), method="PUT", path="partNumber=9", times=None))
        with pytest.raises(storage.StorageError, match="refused the request: InvalidArgument"):
            storage.write_file(local, f"s3://{BUCKET}/x", retry_s=60)
    assert fake_s3.operations()[-1] == "AbortMultipartUpload"
    assert fake_s3.operations().count("UploadPart") < 20  # the others are not sent in vain
    assert fake_s3.uploads == {}


def test_an_upload_that_the_store_forgot_is_made_again(
    fake_s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = file_of(tmp_path)
    with through(fake_s3, monkeypatch) as proxy:
        proxy.add(Rule(Reset(where="answer"), method="POST", path="uploadId", times=1))
        storage.write_file(local, f"s3://{BUCKET}/x", retry_s=10)
        assert len(proxy.injected) == 1
    assert fake_s3.objects["x"] == local.read_bytes()
    assert fake_s3.uploads == {}


def test_an_object_that_is_replaced_while_it_is_read_is_not_mixed(fake_s3: FakeS3) -> None:
    fake_s3.objects["x"] = os.urandom(SIZE)
    pieces = storage.pieces(f"s3://{BUCKET}/x", retry_s=0)
    next(pieces)
    fake_s3.objects["x"] = os.urandom(SIZE)
    with pytest.raises(storage.TransientStorageError, match="replaced while it was read"):
        list(pieces)


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 3 * PART - 1])
def test_every_size_goes_up_and_down(size: int, fake_s3: FakeS3, tmp_path: Path) -> None:
    local = file_of(tmp_path, size)
    url = f"s3://{BUCKET}/sized"
    storage.write_file(local, url, retry_s=10)
    assert storage.read_bulk(url) == local.read_bytes() == storage.read_bytes(url)
    assert [len(piece) for piece in storage.pieces(url)][:-1] == [PART] * max(0, (size - 1) // PART)


def test_parts_grow_with_the_file() -> None:
    assert bulk.part_bytes(10**6) == PART
    for size in (1, 10**9, 5 * 10**12):
        assert -(-size // bulk.part_bytes(size)) <= 10_000


def test_a_download_ahead_is_bounded(fake_s3: FakeS3) -> None:
    """Who takes one piece and waits has a window of pieces in memory, not the file."""
    fake_s3.objects["x"] = os.urandom(40 * PART)
    before = psutil.Process().memory_info().rss
    pieces = storage.pieces(f"s3://{BUCKET}/x", retry_s=0)
    for _ in range(3):
        next(pieces)
    time.sleep(0.5)
    assert fake_s3.operations().count("GetObject") <= 3 + s3_client.WINDOW
    assert psutil.Process().memory_info().rss - before < 30 * PART
