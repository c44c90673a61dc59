"""The same samples as users read them today: `python -m benchmarks.data.peers`, in the peers' environment.

It needs torch, Pillow, webdataset and mosaicml-streaming; of this project the decoder alone. Loaders are used as their
documentation shows. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from benchmarks.data.pace import Pace

SHUFFLE = 1000
"""Samples of webdataset's shuffle buffer, as in its documentation."""
SEED = 9176
"""The default of mosaicml-streaming."""


def pillow(data: bytes, size: int) -> torch.Tensor:
    """Uint8 (3, size, size) as usual: Pillow, bicubic."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def decoder(name: str, size: int) -> Any:
    """Bytes of an image -> uint8 (3, size, size)."""
    if name == "pillow":
        return lambda data: pillow(data, size)
    from meteor_model.images import decode_image

    return lambda data: decode_image(data, size)


class Bare(IterableDataset):
    """The decoder alone, over and over: no files, no batches, nothing handed to another process but a count."""

    def __init__(self, pictures: list[bytes], decode: Any, count: int, batch: int, workers: int) -> None:
        self.pictures, self.decode, self.count, self.batch, self.workers = pictures, decode, count, batch, workers

    def __iter__(self) -> Iterator[int]:
        for first in range(0, self.count // self.workers, self.batch):
            for number in range(first, first + self.batch):
                self.decode(self.pictures[number % len(self.pictures)])
            yield self.batch


def bare(arguments: argparse.Namespace) -> Any:
    """Batches of the bare decoder: numbers of samples."""
    import webdataset

    shard = str(next(Path(arguments.shards).glob("*.tar")))
    pictures = [sample["jpg"] for sample in webdataset.WebDataset(shard, shardshuffle=False, empty_check=False)]
    decode = decoder(arguments.decoder, arguments.size)
    data = Bare(pictures, decode, arguments.count, arguments.batch, arguments.readers)
    return torch.utils.data.DataLoader(data, batch_size=None, num_workers=arguments.readers)


def webdataset_loader(arguments: argparse.Namespace) -> Any:
    """Tuples (pixels, records)."""
    import webdataset

    decode = decoder(arguments.decoder, arguments.size)
    shards = sorted(map(str, Path(arguments.shards).glob("*.tar")))
    data = (
        webdataset.WebDataset(shards, shardshuffle=100, seed=0)
        .shuffle(SHUFFLE)
        .to_tuple("jpg", "json")
        .map_tuple(decode, json.loads)
        .batched(
            arguments.batch, collation_fn=lambda rows: (torch.stack([row[0] for row in rows]), [row[1] for row in rows])
        )
    )
    return webdataset.WebLoader(data, batch_size=None, num_workers=arguments.readers)


def streaming_loader(arguments: argparse.Namespace) -> Any:
    """Tuples (pixels, records)."""
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    decode = decoder(arguments.decoder, arguments.size)

    class Data(StreamingDataset):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return decode(sample["jpg"]), json.loads(sample["json"])

    places = {"remote": arguments.remote, "local": arguments.cache} if arguments.remote else {"local": arguments.mds}
    data = Data(**places, shuffle=True, batch_size=arguments.batch, shuffle_seed=SEED)
    return StreamingDataLoader(
        data,
        batch_size=arguments.batch,
        num_workers=arguments.readers,
        collate_fn=lambda rows: (torch.stack([row[0] for row in rows]), [row[1] for row in rows]),
    )


def write_mds(shards: Path, folder: Path) -> None:
    """The samples of the shards in the format of mosaicml-streaming."""
    import webdataset
    from streaming import MDSWriter

    urls = sorted(map(str, shards.glob("*.tar")))
    with MDSWriter(out=str(folder), columns={"jpg": "bytes", "json": "bytes"}) as writer:
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            writer.write({"jpg": sample["jpg"], "json": sample["json"]})


LOADERS = {"bare": bare, "webdataset": webdataset_loader, "streaming": streaming_loader}


def one_pass(arguments: argparse.Namespace, first: int, last: int) -> dict[str, Any]:
    """Read samples [first, last), 0: to the end; a resume behind `first` samples, as far as the loader knows one."""
    pace = Pace()
    loader = LOADERS[arguments.loader](arguments)
    skip = first
    if skip and arguments.loader == "streaming":
        known = {"num_canonical_nodes": 1, "shuffle_seed": SEED, "initial_physical_nodes": 1}
        loader.load_state_dict({"epoch": 0, "sample_in_epoch": skip, **known})
        skip = 0
    at = 0
    for batch in loader:
        samples = batch if isinstance(batch, int) else len(batch[0])
        at += samples
        if at <= skip:
            continue
        pace.batch(samples)
        if last and at >= last - (first - skip):
            break
    return pace.found()


def main() -> None:
    """Read once or several times, and print what was found of each time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data.peers", description=__doc__)
    parser.add_argument("loader", choices=[*LOADERS, "write"])
    parser.add_argument("--decoder", choices=["ours", "pillow"], default="ours")
    parser.add_argument("--shards", type=Path, required=True, help="folder of the tars")
    parser.add_argument("--mds", default="", help="folder of the samples in MDS")
    parser.add_argument("--remote", default="", help="the same in S3")
    parser.add_argument("--cache", default="", help="where what comes from S3 is kept")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--readers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--count", type=int, default=0, help="samples; of `bare` alone")
    parser.add_argument("--passes", nargs="+", default=["0:0"], help="FIRST:LAST samples of each pass; LAST 0: the end")
    arguments = parser.parse_args()
    if arguments.loader == "write":
        write_mds(arguments.shards, Path(arguments.mds))
        return
    torch.set_num_threads(1)
    passes = [one_pass(arguments, *map(int, one.split(":"))) for one in arguments.passes]
    print(json.dumps({"passes": passes}))


if __name__ == "__main__":
    main()
