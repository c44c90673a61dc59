"""A synthetic stream in the format of the real one; the data tasks import this module, so it stays light."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data

from pipelines.data.blocks import block_of
from pipelines.data.ledger import Ledger
from pipelines.data.sample_id import NO_SAMPLE, SampleId, SampleIds
from pipelines.data.schema import ROW_SCHEMA, VOID, Row
from pipelines.io.pulse import Phase, begin_data_task, doing, pulse

IMAGE_SIZE = 4
VOCABULARY = 32
PAD, IMAGE = 0, 1
TEXT_ONLY_ROWS = range(8, 12)
"""One micro-batch of worker 0 that is text only, while worker 1 has images."""
FAULTY_ROW = 21


def make_row(
    row: int,
    total: int,
    samples: int,
    faulty: Sequence[int],
    fails_at: int | None = None,
    stuck_at: int | None = None,
) -> Row:
    """Row `row` of the synthetic plan: 0 to 2 images, uneven numbers of supervised tokens."""
    if row == stuck_at:
        time.sleep(600)
    if row == fails_at:
        raise ValueError(f"row {row} cannot be read: shard-000003.tar is truncated")
    random = np.random.default_rng(row)
    sample = SampleId(0, 0, row // 10, row % 10, f"key{row}")
    if row >= samples:
        return Row(row, NO_SAMPLE, VOID, "", [PAD], [-100])
    if row in faulty:
        return Row(row, sample, "undecodable_image", "not an image", [PAD], [-100])
    count = 0 if row in TEXT_ONLY_ROWS else int(random.integers(0, 3))
    text = random.integers(2, VOCABULARY, int(random.integers(3, 20))).tolist()
    hidden = int(random.integers(1, len(text)))
    return Row(
        row,
        sample,
        reason="",
        detail="",
        input_ids=[IMAGE] * count + text,
        labels=[-100] * (count + hidden) + text[hidden:],
        images=random.integers(0, 256, count * 3 * IMAGE_SIZE**2, dtype=np.uint8).tobytes(),
        num_images=count,
        image_size=IMAGE_SIZE,
    )


@dataclass(frozen=True)
class Plan:
    """The synthetic order: row r is sample r % 10 of shard r // 10, and void from `total_samples` on."""

    total_rows: int
    total_samples: int

    @property
    def sizes(self) -> list[list[int]]:
        return [[10] * -(-self.total_rows // 10)]

    def consumed(self, rows: int) -> Ledger:
        ledger = Ledger(self.sizes)
        row = np.arange(min(rows, self.total_samples))
        ledger.add(SampleIds(np.zeros_like(row), np.zeros_like(row), row // 10, row % 10))
        return ledger


def make_stream(
    total: int,
    samples: int,
    faulty: Sequence[int],
    micro: int,
    start: int,
    *,
    spare: int = 0,
    mailbox: str = "",
    stops: tuple[int, str] | None = None,
    **faults: Any,
) -> Any:
    """The rows from `start` on; the task with row `stops[0]` is stopped there unless the file `stops[1]` exists."""

    def read(item: dict[str, Any]) -> dict[str, Any]:
        begin_data_task(mailbox)
        with doing(Phase.ENCODING, f"row {item['item']}"):
            if stops is not None and item["item"] == stops[0] and not Path(stops[1]).exists():
                Path(stops[1]).touch()
                pulse().send(wait_s=5.0)
                os.kill(os.getpid(), signal.SIGSTOP)
            return make_row(item["item"], total, samples, faulty, **faults).to_columns()

    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items(list(range(start, total + spare)), override_num_blocks=3)
    rows.context.execution_options.preserve_order = True
    rows.context.raise_original_map_exception = True
    made = rows.map(read, num_cpus=0.5, concurrency=2).repartition(target_num_rows_per_block=micro, strict=True)
    return made.map_batches(_block, batch_size=micro, batch_format="pyarrow", num_cpus=0.5)


def _block(table: pa.Table) -> pa.Table:
    return block_of(table.select(ROW_SCHEMA.names).cast(ROW_SCHEMA))
