"""The readers of foreign bytes, what they may raise, and what must hold of what they accept."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save

from meteor_model.answering import Answerer, RequestError
from meteor_model.images import ImageError, decode_image
from meteor_model.limits import ImageLimits, RequestLimits
from meteor_model.loading import load_config
from meteor_model.replay import GivenTokens
from meteor_model.weights.checkpoints import WeightsError, parse_source, read_checkpoint
from pipelines.checkpoint.parity_file import ParityBatch, read_parity
from pipelines.checkpoint.state import CheckpointError, TrainState
from pipelines.checkpoint.weight_sums import Precision, WeightSums
from pipelines.compat.ray import parse_snapshot
from pipelines.data.blocks import rows_to_table
from pipelines.data.sample_id import NO_SAMPLE
from pipelines.data.schema import Row, SampleError, parse_sample
from pipelines.data.shards import MANIFEST_SCHEMA, SPEC_KEY, ShardError, load_manifest
from pipelines.data.sources import SourceError
from pipelines.data.sources.llava import Llava, LlavaSettings
from pipelines.data.tables.columns import Columns
from pipelines.data.tables.files import RangeFile
from pipelines.data.tables.index import row_groups
from pipelines.data.tables.row_group import RowGroup, decode
from pipelines.data.tar_format import parse_shard
from pipelines.inference.reading import read_request
from pipelines.io.codec import encode
from tests.fuzz.mutate import Mutator, any_bytes, image_parts, json_tokens, one_of, request_images, tar_headers
from tests.meteor_model.builders import model, processor

PIXELS = 2**20
"""Limit of the images here: what one at the real limit costs is measured elsewhere (`make bench-limits`)."""
LIMITS = ImageLimits(pixels=PIXELS)


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        seeds: well-formed files.
        mutate: makes others of them.
        read: the reader; it also checks what must hold of what is accepted.
        errors: what it may raise.
    """

    seeds: Callable[[], Sequence[bytes]]
    mutate: Mutator
    read: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]

    def case(self, seed: str, number: int) -> bytes:
        """The input of a number, the same for ever for equal seeds and seed files."""
        rng = random.Random(f"{seed}/{number}")
        return self.mutate(rng, rng.choice(self.seeds()))


# -------------------------------------------------------------------------------------------------------------- seeds


def _picture(mode: str = "RGB", side: int = 40) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (side // 4, side // 4, 4), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).convert(mode)


def _saved(kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    _picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def image_seeds() -> tuple[bytes, ...]:
    """All formats and modes that are accepted."""
    exif = Image.Exif()
    exif[0x0112] = 6
    more = [_picture("L"), _picture("L").rotate(90)]
    return (
        *(_saved("JPEG", **options) for options in ({}, {"progressive": True}, {"restart_marker_rows": 1})),
        *(_saved("JPEG", mode) for mode in ("L", "CMYK")),
        _saved("JPEG", exif=exif),
        *(_saved("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")),
        _saved("PNG", exif=exif),
        *(_saved("WEBP", **options) for options in ({}, {"lossless": True}, {"exif": exif})),
        *(_saved("WEBP", "RGBA", save_all=True, append_images=more) for _ in range(1)),
        _saved("GIF", "P"),
        _saved("GIF", "P", save_all=True, append_images=more),
    )


_TURNS = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "<image>\nWhat?"},
    {"from": "gpt", "value": "a"},
]
_RECORD = json.dumps({"id": "a1", "image": "a.png", "conversations": _TURNS}).encode()


def record_seeds() -> Sequence[bytes]:
    text = [{"from": "human", "value": "Hi \u00e9 \U0001f600"}, {"from": "gpt", "value": "Yes"}]
    return _RECORD, json.dumps({"id": 7, "conversations": text * 3}).encode()


def _tar(kind: int, *keys: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for key in keys:
            for extension, data in (("json", _RECORD), ("png", image_seeds()[6][:700])):
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@cache
def tar_seeds() -> tuple[bytes, ...]:
    """All formats of tar, long names, names beyond ASCII, and two archives after each other."""
    made = [_tar(kind, "a", "folder/b", "n" * 120, "caf\u00e9") for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    return *made, _tar(tarfile.USTAR_FORMAT, "c", "d"), made[0] + _tar(tarfile.USTAR_FORMAT, "c", "d")


_TALK = Columns(conversations_column="conversations", key_column="id")


@cache
def table_seeds() -> tuple[bytes, ...]:
    """Parquet with and without dictionaries and compression, Arrow's streaming and its file format."""
    image = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string()), ("tags", pa.list_(pa.string()))]))
    files = [{"bytes": image_seeds()[6][:300], "path": "a.png"}]
    rows = [{"id": n, "image": files if n % 3 else None, "conversations": _TURNS, "group": "g"} for n in range(9)]
    schema = pa.schema([("id", pa.int64()), ("image", image), ("conversations", turns), ("group", pa.string())])
    table = pa.Table.from_pylist(rows, schema=schema)
    found = []
    for options in ({"compression": "zstd"}, {"compression": "none", "use_dictionary": False, "store_schema": False}):
        pq.write_table(table, buffer := io.BytesIO(), row_group_size=4, **options)
        found.append(buffer.getvalue())
    for kind in (pa.ipc.new_stream, pa.ipc.new_file):
        with kind(buffer := io.BytesIO(), schema) as writer:
            writer.write_table(table, max_chunksize=4)
        found.append(buffer.getvalue())
    return tuple(found)


@cache
def request_seeds() -> tuple[bytes, ...]:
    import base64

    images = [base64.b64encode(image_seeds()[index]).decode() for index in (0, 6, 13)]
    rows = [{"image": image, "prompt": "what?"} for image in images]
    return (
        json.dumps({"dataframe_records": rows, "params": {"max_new_tokens": 3, "visual_tokens": 4}}).encode(),
        json.dumps({"dataframe_records": [{"prompt": "x"}]}).encode(),
    )


@cache
def manifest_seeds() -> tuple[bytes, ...]:
    row = {"path": "a.tar", "split": "train", "samples": 9, "bytes": 9, "sha256": "0" * 64, "members": [("json", 9)]}
    group = RowGroup("parquet", (99, 9), "0" * 64, ((4, 7), (20, 2)), _TALK)
    rows = [{**row, "row_group": ""}, {**row, "path": "b.parquet#0", "row_group": encode(group)}]
    schema = MANIFEST_SCHEMA.with_metadata({SPEC_KEY: b'{"format": 1, "source": {"name": "x"}}'})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    return (buffer.getvalue(),)


def snapshot_seeds() -> Sequence[bytes]:
    result = {"checkpoint_dir_name": "step-000010", "metrics": {"loss": 1.5}}
    return (json.dumps({"latest_checkpoint_result": result, "checkpoint_results": [result]}).encode(),)


@cache
def config_seeds() -> tuple[bytes, ...]:
    return (model().config.to_json_string(use_diff=False).encode(),)


@cache
def weight_seeds() -> tuple[bytes, ...]:
    tensors = {"a": torch.zeros(3, 4), "b.c": torch.ones(2, dtype=torch.bfloat16)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return save(tensors), buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ readers


def read_tar(data: bytes) -> None:
    """Keys and members fit the tables that carry them; no byte is in two members."""
    contents = parse_shard(data, "fuzz.tar")
    for key, members in contents.samples:
        pa.array([key, *members], pa.string())
    assert sum(len(body) for _, members in contents.samples for body in members.values()) <= len(data)


def read_table(data: bytes) -> None:
    """Keys and members fit the tables that carry them; a sample that is refused has a reason."""
    file = RangeFile("fuzz", len(data), lambda start, count: data[start : start + count])
    for number, (group, head, body) in enumerate(row_groups(file, _TALK)):
        for key, members in decode(f"fuzz#{number}", group, head, body, "fuzz"):
            pa.array([key, *members], pa.string())
            with suppress(SampleError):
                parse_sample(key, members)


def read_record(data: bytes) -> None:
    """Texts can be tokenised; a refusal fits a row."""
    try:
        images = {"png": b""} if b"<image>" in data else {}
        sample = parse_sample("k", {"json": data, **images})
    except SampleError as error:
        rows_to_table([Row(0, NO_SAMPLE, error.reason, error.detail, [0], [0])])
        raise
    for turn in sample.turns:
        turn.text.encode()


def read_image(data: bytes) -> None:
    image = decode_image(data, 32, LIMITS)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8


@cache
def _answerer() -> Answerer:
    return Answerer(model(), processor())


def read_a_request(data: bytes) -> None:
    for question, budget in read_request(data, _answerer(), RequestLimits(LIMITS)):
        assert question.length + budget.max_new_tokens <= 10**6


def in_folder(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A reader of a file, in a folder of its own."""

    def read_file(data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="meteor-fuzz-") as folder:
            (Path(folder) / name).write_bytes(data)
            read(Path(folder))

    return read_file


def _read_weights(data: bytes) -> None:
    name = "pytorch_model.bin" if data[:2] == b"PK" else "model.safetensors"
    in_folder(name, lambda folder: read_checkpoint(parse_source(str(folder))))(data)


@cache
def parity_seeds() -> Sequence[bytes]:
    """With and without what a model kept."""
    inputs = {
        "input_ids": torch.arange(6).view(2, 3),
        "attention_mask": torch.ones(2, 3, dtype=torch.int64),
        "pixel_values": torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
    }
    kept = GivenTokens({"tower": (torch.tensor([[0, 2]]), torch.tensor([[1]]))}, torch.tensor([[0, 1]]))
    sums: dict[Precision, WeightSums] = {"fp32": {"a": 1}, "bf16": {"a": 2}}
    found = []
    with tempfile.TemporaryDirectory(prefix="meteor-fuzz-") as folder:
        for batch in (ParityBatch(inputs, torch.ones(2, 3, 5), kept, sums, ("b",)), ParityBatch(inputs, torch.ones(1))):
            batch.save(path := Path(folder) / "parity.safetensors", "bf16")
            found.append(path.read_bytes())
    return tuple(found)


def _read_records(folder: Path) -> None:
    (folder / "a.png").write_bytes(b"")
    source = Llava(LlavaSettings(str(folder / "data.json"), str(folder), faults="skip"))
    for split in ("train", "heldout"):
        list(source.samples(split))


TARGETS: dict[str, Target] = {
    "tar": Target(tar_seeds, one_of((tar_headers, tar_headers, any_bytes)), read_tar, (ShardError,)),
    "table": Target(table_seeds, any_bytes, read_table, (ShardError,)),
    "record": Target(record_seeds, one_of((json_tokens, json_tokens, any_bytes)), read_record, (SampleError,)),
    "records": Target(
        lambda: (b"[" + b", ".join(record_seeds()) + b"]", b"\n".join(record_seeds())),
        one_of((json_tokens, any_bytes)),
        in_folder("data.json", _read_records),
        (SourceError,),
    ),
    "image": Target(image_seeds, one_of((image_parts, any_bytes)), read_image, (ImageError,)),
    "request": Target(
        request_seeds,
        one_of((json_tokens, any_bytes)),
        read_a_request,
        (RequestError,),
    ),
    "request_images": Target(
        lambda: request_seeds()[:1], request_images(one_of((image_parts, any_bytes))), read_a_request, (RequestError,)
    ),
    "manifest": Target(
        manifest_seeds, any_bytes, in_folder("manifest.parquet", lambda f: load_manifest(str(f))), (ShardError,)
    ),
    "snapshot": Target(snapshot_seeds, one_of((json_tokens, any_bytes)), parse_snapshot, (ValueError,)),
    "state": Target(
        lambda: (TrainState("abc", 2, 9, final={"loss": 1.5}, first_losses=(2.0, 1.0)).to_json().encode(),),
        one_of((json_tokens, any_bytes)),
        lambda data: TrainState.from_json(data, "state.json"),
        (CheckpointError,),
    ),
    "config": Target(
        config_seeds, one_of((json_tokens, any_bytes)), in_folder("config.json", load_config), (ValueError, OSError)
    ),
    "parity": Target(
        parity_seeds,
        one_of((json_tokens, any_bytes)),
        in_folder("parity.safetensors", lambda folder: read_parity(folder / "parity.safetensors")),
        (CheckpointError,),
    ),
    "weights": Target(weight_seeds, any_bytes, _read_weights, (WeightsError,)),
}
"""By name; `make fuzz ARGS="--only NAME"`."""
