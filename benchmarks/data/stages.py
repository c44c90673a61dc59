"""What each stage of the stream costs by itself, in one process and on one thread: CPU milliseconds a sample.

`python -m benchmarks.data.stages FOLDER SIZE BATCH` prints them as a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from meteor_model.collate import collate
from meteor_model.images import decode_image
from meteor_model.sample_encoder import load_sample_encoder
from pipelines.data.blocks import block_of, rows_from_table, table_of
from pipelines.data.order import StreamPlan
from pipelines.data.shards import load_manifest, read_shard
from pipelines.data.stream import MOST_RAW_BLOCK_BYTES, Cut, PlannedShards, RowEncoder, encode_table
from pipelines.io.fingerprint import sha256
from pipelines.training.batches import make_micro_batch

ROUNDS = 5


def cpu_ms(call: Callable[[], Any], samples: int) -> float:
    """CPU milliseconds a sample, the least of some rounds."""
    call()
    spent = []
    for _ in range(ROUNDS):
        began = time.process_time()
        call()
        spent.append(time.process_time() - began)
    return round(1e3 * min(spent) / samples, 4)


def stage_costs(manifest_url: str, encoder_folder: Path, size: int, batch: int) -> dict[str, float]:
    """CPU milliseconds a sample of every stage on the first samples of a dataset, the bare decoder beside them."""
    torch.set_num_threads(1)
    manifest = load_manifest(manifest_url)
    shard = manifest.split("train")[0]
    plan = StreamPlan([shard.samples], seed=0, epochs=1, global_batch=batch, window_shards=1)
    rows = min(plan.total_samples, plan.total_rows - batch) or batch
    source = PlannedShards(
        [(manifest.url, (shard,))], plan, 0, rows, cut=Cut(0, batch, MOST_RAW_BLOCK_BYTES), fetch=read_shard
    )
    (task,) = source.get_read_tasks(1)
    tables = list(task())
    encoder = RowEncoder(partial(load_sample_encoder, encoder_folder), 0, 2048)  # type: ignore[arg-type]
    encoded = [encode_table(table, encoder) for table in tables]
    blocks = [block_of(table) for table in encoded]
    pictures = [
        data for table in tables for members in table.to_pylist() for data in members["data"] if data[:1] == b"\xff"
    ]
    made = partial(collate, pad_token_id=0, image_size=size)
    shard_bytes = b"".join(pictures)
    count = sum(map(len, tables))
    sink = pa.BufferOutputStream

    def to_store() -> None:
        for block in blocks:
            with pa.ipc.new_stream(sink(), block.schema) as writer:
                writer.write_table(block)

    def to_batches() -> None:
        for block in blocks:
            make_micro_batch(rows_from_table(table_of(block)), made, 0)

    return {
        "decode_image": cpu_ms(lambda: [decode_image(data, size) for data in pictures], count),
        "read": cpu_ms(lambda: list(task()), count),
        "read: SHA-256 of it": cpu_ms(lambda: sha256(shard_bytes), count),
        "encode": cpu_ms(lambda: [encode_table(table, encoder) for table in tables], count),
        "copy to the object store": cpu_ms(to_store, count),
        "batch": cpu_ms(to_batches, count),
    }


if __name__ == "__main__":
    folder, size, batch = sys.argv[1:]
    print(json.dumps(stage_costs(f"{folder}/set", Path(folder), int(size), int(batch))))
