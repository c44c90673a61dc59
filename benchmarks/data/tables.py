"""What reading tables costs beside shards of the same samples: CPU time in one process on one thread, without Ray.

The samples of `make bench-data` lie on a local disk as tars, as Parquet and as a folder of the library `datasets`, as
many to a row group as to a tar. In every round each form is read by the read tasks of a training, in the order of one
plan, and encoded (checksums, checks, tokens, decoded pictures) up to micro-batches. What is compared is of the same
round. Writes benchmarks/results/tables.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.data.dataset import SAMPLES_PER_SHARD, make_dataset, make_encoder, samples
from benchmarks.environment import end_on_sigterm
from benchmarks.results_file import RESULTS, hardware, write_results
from meteor_model.sample_encoder import load_sample_encoder
from pipelines.data.indexing import index_shards
from pipelines.data.order import StreamPlan
from pipelines.data.shards import Manifest
from pipelines.data.stream import MOST_RAW_BLOCK_BYTES, Cut, PlannedShards, RowEncoder, encode_table
from pipelines.data.tables.columns import Columns
from pipelines.data.tables.index import Tables

TARS = "tars"
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_TURNS = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
_SCHEMA = pa.schema([("key", pa.string()), ("image", _IMAGE), ("conversations", _TURNS)])
_COLUMNS = Columns(conversations_column="conversations", key_column="key")


def _parquet(path: Path, table: pa.Table, **options: Any) -> None:
    pq.write_table(table, path / "data.parquet", row_group_size=SAMPLES_PER_SHARD, **options)


def _saved(path: Path, table: pa.Table) -> None:
    name = "data-00000-of-00001.arrow"
    with pa.ipc.new_stream(path / name, table.schema) as writer:
        writer.write_table(table, max_chunksize=SAMPLES_PER_SHARD)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))


FORMS: dict[str, Callable[[Path, pa.Table], None]] = {
    "Parquet": _parquet,
    "Parquet, no dictionaries": partial(_parquet, use_dictionary=False),
    "datasets folder": _saved,
}
"""How a table is written; the first as pyarrow and `datasets` do it unless told otherwise."""


def make_forms(folder: Path, count: int) -> dict[str, Manifest]:
    """The samples in every form, and their manifests."""
    rows = []
    for key, members in samples(count):
        picture = {"bytes": members["jpg"], "path": f"{key}.jpg"}
        rows.append({"key": key, "image": picture, "conversations": json.loads(members["json"])["conversations"]})
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    found = {TARS: make_dataset(str(folder / TARS), count)}
    for number, (name, write) in enumerate(FORMS.items()):
        (path := folder / f"tables{number}").mkdir()
        write(path, table)
        found[name] = index_shards(str(path), Tables(_COLUMNS)).manifest
    return found


def tasks_of(manifest: Manifest, batch: int) -> list[Callable[[], Any]]:
    """The read tasks of one epoch."""
    shards = manifest.split("train")
    plan = StreamPlan([info.samples for info in shards], seed=0, epochs=1, global_batch=batch, window_shards=4)
    cut = Cut(0, batch, MOST_RAW_BLOCK_BYTES)
    return list(PlannedShards([(manifest.url, shards)], plan, 0, plan.total_rows, cut=cut).get_read_tasks(1))


def read_pass(manifest: Manifest, encoder: RowEncoder, batch: int) -> dict[str, float]:
    """CPU milliseconds a sample of one epoch: reading, and encoding what was read."""
    count = sum(info.samples for info in manifest.split("train"))
    spent = {"read": 0.0, "encode": 0.0}
    for task in tasks_of(manifest, batch):
        tables = iter(task())
        while True:
            began = time.process_time()
            table = next(tables, None)
            spent["read"] += time.process_time() - began
            if table is None:
                break
            began = time.process_time()
            encode_table(table, encoder)
            spent["encode"] += time.process_time() - began
    return {name: 1e3 * seconds / count for name, seconds in spent.items()}


Round = Mapping[str, Mapping[str, float]]


def over_tars(rounds: Sequence[Round]) -> dict[str, dict[str, list[float]]]:
    """CPU time of every other form over that of the tars in the same round: median, least, most."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in (name for name in rounds[0] if name != TARS):
        of = {
            "read": [one[name]["read"] / one[TARS]["read"] for one in rounds],
            "read and encode": [sum(one[name].values()) / sum(one[TARS].values()) for one in rounds],
        }
        found[name] = {
            part: [round(value, 3) for value in (statistics.median(all_), min(all_), max(all_))]
            for part, all_ in of.items()
        }
    return found


def measure(manifests: Mapping[str, Manifest], encoder: RowEncoder, batch: int, rounds: int) -> list[Round]:
    """Some rounds behind one that is thrown away; who begins changes."""
    found: list[Round] = []
    names = list(manifests)
    for number in range(rounds + 1):
        turn = number % len(names)
        found.append({name: read_pass(manifests[name], encoder, batch) for name in names[turn:] + names[:turn]})
    return found[1:]


def main(argv: list[str] | None = None) -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data.tables", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds (%(default)s)")
    parser.add_argument("--samples", type=int, default=512, help="pictures (%(default)s)")
    parser.add_argument("--size", type=int, default=448, help="side of what is handed over (%(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a micro-batch (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "tables.json", help="the results (%(default)s)")
    arguments = parser.parse_args(argv)
    end_on_sigterm()
    torch.set_num_threads(1)
    machine = hardware()
    with tempfile.TemporaryDirectory(prefix="meteor-tables-") as name:
        folder = Path(name)
        manifests = make_forms(folder, arguments.samples)
        make_encoder(folder, arguments.size)
        encoder = RowEncoder(partial(load_sample_encoder, folder), 0, 2048)  # type: ignore[arg-type]
        rounds = measure(manifests, encoder, arguments.batch, arguments.rounds)
        ratios = over_tars(rounds)
        write_results(
            arguments.output,
            {
                "machine": machine,
                "load_after": hardware()["load"],
                "samples": arguments.samples,
                "rounds": arguments.rounds,
                "bytes": {form: sum(info.bytes for info in one.shards) for form, one in manifests.items()},
                "cpu_ms_per_sample": {
                    form: {
                        part: round(statistics.median(one[form][part] for one in rounds), 4)
                        for part in ("read", "encode")
                    }
                    for form in manifests
                },
                "over_tars": ratios,
            },
        )
    for form, parts in ratios.items():
        for part, (median, least, most) in parts.items():
            print(f"{form}, {part}: {median:.3f} of the CPU time of tars ({least:.3f} to {most:.3f})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
