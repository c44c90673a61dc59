"""A real store behind a network far slower than the disk, with the limits that real runs have."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray.train

from infra.fault_proxy import FaultProxy
from infra.throttle import Link
from pipelines.checkpoint.local import local_copy
from pipelines.io import storage
from pipelines.io.s3_client import PART_BYTES, WINDOW
from pipelines.io.upload import CheckpointUpload
from tests.pipelines.s3_fixture import BUCKET, S3Server

pytestmark = [pytest.mark.stack, pytest.mark.slow]

SIZE = 160 * 10**6
LINKS = {"steady": Link(8e6), "jerky": Link(16e6, open_s=3.0, pause_s=4.0)}


@contextmanager
def watched() -> Iterator[list[int]]:
    """The growth of this process's memory, in bytes, at its largest."""
    process, most, stop = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def look() -> None:
        while not stop.wait(0.02):
            most[0] = max(most[0], process.memory_info().rss - before)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join(5)


@pytest.mark.parametrize("name", LINKS)
def test_a_checkpoint_goes_up_and_comes_back(
    name: str, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(os.urandom(SIZE))
    (folder / "state.json").write_text("{}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train = f"s3://{BUCKET}/slow/{name}/train"
    with FaultProxy(s3.endpoint, up=LINKS[name], down=LINKS[name]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        storage.write_bytes(f"{train}/warm", b"x")
        sent, start = proxy.sent, time.monotonic()
        with watched() as grown:
            CheckpointUpload(train)(ray.train.Checkpoint.from_directory(str(folder)), "step-1")
        assert time.monotonic() - start > SIZE / 8e6 * 0.7  # slower than the disk by far
        assert proxy.sent - sent < SIZE * 1.02  # and nothing was sent twice
        assert grown[0] < (WINDOW + 4) * PART_BYTES
        received = proxy.received
        with watched() as grown, local_copy(f"{train}/step-1") as copy:
            assert (copy / "weights.bin").stat().st_size == SIZE
            taken = grown[0]
        assert proxy.received - received < SIZE * 1.02
        assert taken < 2 * (WINDOW + 4) * PART_BYTES
