"""How fast the store is from here, asked with a file that goes there and back as weights do."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from pathlib import Path

from pipelines.io import storage
from pipelines.io.addresses import join
from pipelines.io.storage_check import PROBE

PROBE_BYTES = 32 * 2**20
RETRY_S = 60.0


def measure_store_mb(url: str, size: int = PROBE_BYTES) -> float:
    """MB/s of the slower way, up or down, of one transfer between this machine and the store.

    Args:
        url: of a folder in the store. A file `.meteor-check-...` is made there and removed.
        size: bytes that are sent, of random content.

    Raises:
        StorageError: the store fails.
    """
    probe = join(url, f"{PROBE}-{uuid.uuid4().hex}")
    with tempfile.NamedTemporaryFile(prefix="meteor-probe-") as file:
        file.write(os.urandom(size))
        file.flush()
        began = time.perf_counter()
        try:
            storage.write_file(Path(file.name), probe, RETRY_S)
            sent = time.perf_counter()
            received = sum(len(piece) for piece in storage.pieces(probe, RETRY_S))
            ended = time.perf_counter()
        finally:
            storage.delete(probe, RETRY_S)
    return min(size / (sent - began), received / (ended - sent)) / 1e6
