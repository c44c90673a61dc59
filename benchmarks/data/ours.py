"""One pass over the stream that a training reads, in a process of its own: `python -m benchmarks.data.ours`.

The graph, its splitting and the batches are those of a training with one worker; nothing is done with a batch. Ray's
address is in the environment. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch

from benchmarks.data.pace import Pace

if TYPE_CHECKING:
    from meteor_model.sample_encoder import SampleEncoder


def stream_pass(
    manifest_url: str, encoder_folder: Path, image_size: int, readers: int, batch: int, rows: Sequence[int]
) -> dict[str, Any]:
    """Rows [rows[0], rows[1]) of a plan, as micro-batches of `batch`; Ray is initialised.

    `rows[1]` 0 is the end of the plan. Returns what `Pace` found.
    """
    from meteor_model.collate import collate
    from pipelines.data.order import StreamPlan
    from pipelines.data.shards import load_manifest
    from pipelines.data.stream import RowEncoder, build_stream, data_config
    from pipelines.training.batches import BatchReader, Share, iterate_rows

    pace = Pace()
    manifest = load_manifest(manifest_url)
    sizes = [info.samples for info in manifest.split("train")]
    plan = StreamPlan(sizes, seed=0, epochs=1, global_batch=batch, window_shards=4)
    encoder = RowEncoder(partial(_sample_encoder, encoder_folder), 0, 2048)
    start_row, stop = rows[0], rows[1] or plan.total_rows
    data = build_stream(
        manifest, "train", plan, encoder, batch, start_row=start_row, stop_row=stop, read_concurrency=readers
    )
    share = data_config().configure({"train": data}, 1, None, [ray.get_runtime_context().get_node_id()])[0]["train"]
    reader = BatchReader(partial(collate, pad_token_id=0, image_size=image_size), 0, batch, Share(0, 1, 1))
    for step in reader.read(iterate_rows(share, batch), start_row, stop):
        for micro_batch in step:
            assert micro_batch.inputs["pixel_values"].shape[1:] == (3, image_size, image_size)
            pace.batch(micro_batch.seen)
    return pace.found()


def _sample_encoder(folder: Path) -> SampleEncoder:
    from meteor_model.sample_encoder import load_sample_encoder

    found = load_sample_encoder(folder)
    assert found is not None, f"no encoder in {folder}"
    return found


def main() -> None:
    """Read once or several times, and print what was found of each time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data.ours", description=__doc__)
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--readers", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--passes", nargs="+", default=["0:0"], help="FIRST:LAST rows of each pass; LAST 0: the end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the default of training.threads_per_worker
    ray.init(log_to_driver=False, logging_level="error")
    settings = (arguments.manifest, arguments.encoder, arguments.size, arguments.readers, arguments.batch)
    passes = [stream_pass(*settings, [int(row) for row in one.split(":")]) for one in arguments.passes]
    print(json.dumps({"passes": passes}))


if __name__ == "__main__":
    main()
