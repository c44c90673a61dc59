"""Reading a row group takes at most the memory that docs/data.md says, also where pyarrow unpacks a dictionary."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.data.indexing import index_shards
from pipelines.data.tables.columns import Columns
from pipelines.data.tables.index import Tables
from pipelines.io import storage
from tests.pipelines.data.tables import made

ROOT = Path(__file__).resolve().parents[4]
MOST = 5.0
PROBE = """
import sys
from pipelines.data.shards import load_manifest, read_shard
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
manifest = load_manifest(sys.argv[1])
small, large = sorted(manifest.shards, key=lambda info: info.bytes)
read_shard(manifest.url, small)
before = peak()
read_shard(manifest.url, large)
print((peak() - before) / large.bytes)
"""


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_row_group_takes_a_few_times_its_bytes(tmp_path: Path, kind: str) -> None:
    write = made.parquet_bytes if kind == "parquet" else made.arrow_bytes
    for name, rows in (("small", 1), ("large", 300)):
        images = [random.Random(row).randbytes(200_000) for row in range(rows)]
        table = made.table([(str(row), name, [image]) for row, image in enumerate(images)], made.CAPTION)
        storage.write_bytes(f"{tmp_path}/{name}.{kind}", write(table, rows))
    index_shards(str(tmp_path), Tables(Columns(caption_column="caption")), shared_images="count")
    command = [sys.executable, "-c", PROBE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 1.5 < float(done.stdout) < MOST
