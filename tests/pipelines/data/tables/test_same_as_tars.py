"""A training sees no difference between tables and tars of the same samples: order, rows, pixels, faults, ledger."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.indexing import index_shards
from pipelines.data.ledger import Ledger
from pipelines.data.mixture import MixturePlan, Plan
from pipelines.data.order import StreamPlan
from pipelines.data.sample_id import SampleIds
from pipelines.data.schema import sample_of
from pipelines.data.shards import Manifest, fetch_shard
from pipelines.data.stream import PlannedShards, RowEncoder, encode_table
from pipelines.data.tables.columns import Columns
from pipelines.data.tables.index import Tables
from tests.pipelines.data.tables import made
from tests.pipelines.data.test_stream import ByteProcessor

GROUP = 10
SIZES = [10, 10, 5, 10, 3]
"""Rows of the row groups of two files of 25 and 13 rows."""
GLOBAL_BATCH, WINDOW, MAX_LENGTH = 8, 2, 120


def pieces(samples: Sequence[made.Sample], schema: pa.Schema) -> list[pa.Table]:
    return [made.table(part, schema, other=range(len(part))) for part in (samples[:25], samples[25:])]


def parquet(folder: Path, parts: Sequence[pa.Table]) -> None:
    for number, part in enumerate(parts):
        path = folder / "data" / f"train-{number:05d}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.parquet_bytes(part, GROUP))


def saved(folder: Path, parts: Sequence[pa.Table]) -> None:
    made.save_to_disk(folder / "train", parts, GROUP)


Writer = Callable[[Path, Sequence[pa.Table]], None]
TALK = Columns(conversations_column="conversations", key_column="id")
CAPTIONS = Columns(caption_column="caption", key_column="id")


def both(
    folder: Path, write: Writer, samples: Sequence[made.Sample], schema: pa.Schema, columns: Columns
) -> tuple[Manifest, Manifest]:
    """The manifests of a table and of tars with the same samples."""
    write(folder / "tables", pieces(samples, schema))
    made.tars(folder / "tars", samples, SIZES)
    return index_shards(str(folder / "tables"), Tables(columns)).manifest, index_shards(str(folder / "tars")).manifest


def encoded(manifests: Sequence[Manifest], plan: Plan, start: int = 0) -> pa.Table:
    """What the data tasks make of the rows from `start` on."""
    sources = [(one.url, one.split("train")) for one in manifests]
    planned = PlannedShards(sources, plan, start, plan.total_rows, fetch=fetch_shard)
    encoder = RowEncoder(ByteProcessor, 0, MAX_LENGTH, "drop")
    raw = [block for task in planned.get_read_tasks(1) for block in task()]
    return pa.concat_tables([encode_table(block, encoder) for block in raw])


def ledger_of(rows: pa.Table, plan: Plan) -> Ledger:
    """What a training of these rows files."""
    ledger = Ledger(plan.sizes)
    for columns in rows.select(["dataset", "epoch", "shard", "index", "key", "reason"]).to_pylist():
        if columns["epoch"] >= 0:
            ledger.add(SampleIds.of([sample_of(columns)]), dropped=bool(columns["reason"]))
    return ledger


@pytest.mark.parametrize(
    ("write", "sample", "schema", "columns", "reasons"),
    [
        (parquet, made.talk, made.TALK, TALK, 4),
        (saved, made.talk, made.TALK, TALK, 4),
        (parquet, made.talk, made.JSON_TALK, TALK, 4),
        (parquet, made.captioned, made.CAPTION, CAPTIONS, 3),
        (saved, made.captioned, made.CAPTION, CAPTIONS, 3),
    ],
    ids=["parquet", "datasets", "json", "parquet-captions", "datasets-captions"],
)
def test_rows_pixels_faults_and_ledger_are_those_of_tars(
    tmp_path: Path,
    write: Writer,
    sample: Callable[[int], made.Sample],
    schema: pa.Schema,
    columns: Columns,
    reasons: int,
) -> None:
    samples = [sample(number) for number in range(sum(SIZES))]
    tables, tars = both(tmp_path, write, samples, schema, columns)
    assert [info.samples for info in tables.shards] == [info.samples for info in tars.shards] == SIZES
    assert tables.report["faulty"] == tars.report["faulty"]
    plan = StreamPlan(SIZES, seed=3, epochs=2, global_batch=GLOBAL_BATCH, window_shards=WINDOW)
    rows = encoded([tables], plan)
    assert rows.equals(encoded([tars], plan))
    found = Counter(reason for reason in rows["reason"].to_pylist() if reason not in ("", "void"))
    assert len(found) == reasons
    ledger = ledger_of(rows, plan)
    assert ledger == ledger_of(encoded([tars], plan), plan)
    assert (ledger.consumed, ledger.dropped) == (2 * sum(SIZES), found.total())
    assert encoded([tables], plan, 24).equals(rows.slice(24)), "a resume reads the rest"


def test_a_mixture_of_tables_and_tars_is_that_of_tars(tmp_path: Path) -> None:
    talk = both(tmp_path / "talk", parquet, [made.talk(n) for n in range(sum(SIZES))], made.TALK, TALK)
    captions = [made.captioned(n) for n in range(sum(SIZES))]
    captioned = both(tmp_path / "captions", saved, captions, made.CAPTION, CAPTIONS)
    plan = MixturePlan([SIZES, SIZES], [1.0, 1.5], 5, 2, GLOBAL_BATCH, WINDOW)
    mixed = encoded([talk[0], captioned[1]], plan)
    assert mixed.equals(encoded([talk[1], captioned[0]], plan))
    assert mixed.equals(encoded([talk[1], captioned[1]], plan))
    assert ledger_of(mixed, plan).consumed == plan.total_samples
