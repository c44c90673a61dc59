"""Tables as users have them, and the same samples as tars."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.data.schema import build_members
from pipelines.data.tar_format import pack_shard
from pipelines.io import storage

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""How the library `datasets` stores its feature Image."""
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])
TALK = pa.schema([("id", pa.string()), ("image", pa.list_(IMAGE)), ("conversations", pa.list_(TURN))])
CAPTION = pa.schema([("id", pa.string()), ("image", IMAGE), ("caption", pa.string())])
JSON_TALK = pa.schema([("id", pa.int64()), ("image", pa.list_(pa.large_binary())), ("conversations", pa.string())])

Sample = tuple[str, Any, list[bytes]]
"""Key, text (a caption or turns), images."""


def jpeg(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def talk(number: int) -> Sample:
    """Conversations of all kinds; some are faulty: cut images, too many placeholders, no reply, too long."""
    key, images = str(100_000 + number), [jpeg(number)]
    match number % 9:
        case 1:
            return key, turns("<image>what?", "cut"), [jpeg(number)[:200]]
        case 2:
            return key, turns(f"say {number}", "text"), []
        case 3:
            return key, turns("<image><image>both?", "two"), [*images, jpeg(number + 1000, "PNG")]
        case 4:
            return key, turns("<image>what? <image>", "one"), images
        case 5:
            return key, turns("<image>what?", "long " * 90), images
        case 6:
            return key, turns("<image>what?", "an answer")[:1], images
        case _:
            return key, turns(f"<image>what is {number}?", f"caf\u00e9 {number}"), images


def captioned(number: int) -> Sample:
    """Captions; some are empty, or have no image, or a broken one."""
    key, images = f"k{number}", [jpeg(number, "PNG" if number % 2 else "WEBP")]
    match number % 7:
        case 1:
            return key, " ", images
        case 2:
            return key, f"nothing {number}", []
        case 3:
            return key, f"no image {number}", [b"\xff\xd8\xff no image"]
        case 4:
            return key, None, images
        case _:
            return key, f" an image {number}\n", images


def cells(sample: Sample, schema: pa.Schema) -> dict[str, Any]:
    """A row of a table."""
    key, text, images = sample
    files: list[Any] = list(images)
    image = schema.field("image").type
    if image == IMAGE or pa.types.is_struct(image.value_type):
        files = [{"bytes": data, "path": f"{key}.jpg"} for data in images]
    if image == IMAGE:
        row = {"id": key, "image": files[0] if files else None, "caption": text}
    else:
        as_text = pa.types.is_string(schema.field("conversations").type)
        row = {"id": key, "image": files or None, "conversations": json.dumps(text) if as_text else text}
    return {**row, "id": int(key)} if pa.types.is_integer(schema.field("id").type) else row


def table(samples: Sequence[Sample], schema: pa.Schema, **others: Any) -> pa.Table:
    """The samples as a table, with other columns beside them that are not read."""
    made = pa.Table.from_pylist([cells(sample, schema) for sample in samples], schema=schema)
    for name, values in others.items():
        made = made.add_column(0, name, pa.array(values))
    return made


def parquet_bytes(made: pa.Table, rows: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(made, buffer, row_group_size=rows, **options)
    return buffer.getvalue()


def nested_footer(levels: int) -> bytes:
    """A Parquet file of no rows whose one column has this many levels, by hand: pyarrow itself ends on deep ones."""

    def element(children: int) -> bytes:
        kind = b"\x15\x02\x25\x02" if not children else b"\x35\x02"  # type INT32 and repetition, or repetition
        return kind + b"\x18\x01a" + (b"\x15\x02" if children else b"") + b"\0"

    count = levels + 2  # the root and the leaf as well
    schema = b"\xfc" + _varint(count) + element(1) * (count - 1) + element(0)
    footer = b"\x15\x02\x19" + schema + b"\x16\0\x19\x0c\0"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def _varint(number: int) -> bytes:
    return b"" if not number else bytes([number & 127 | (128 if number > 127 else 0)]) + _varint(number >> 7)


def arrow_bytes(made: pa.Table, rows: int) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, made.schema) as writer:
        writer.write_table(made, max_chunksize=rows)
    return buffer.getvalue()


def save_to_disk(folder: Path, parts: Sequence[pa.Table], rows: int) -> None:
    """A folder as `Dataset.save_to_disk` leaves it."""
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        storage.write_bytes(f"{folder}/{name}", arrow_bytes(part, rows))
    storage.write_json(f"{folder}/state.json", {"_data_files": [{"filename": name} for name in names], "_split": None})
    storage.write_json(f"{folder}/dataset_info.json", {"features": {"image": {"_type": "Image"}}})


def tars(folder: Path, samples: Sequence[Sample], sizes: Sequence[int], prefix: str = "train") -> None:
    """The same samples as WebDataset shards of these sizes."""
    first = 0
    for number, size in enumerate(sizes):
        packed = []
        for key, text, images in samples[first : first + size]:
            record = {"conversations": text} if isinstance(text, list) else {"caption": text}
            packed.append((key, build_members(record, [("jpg", image) for image in images])))
        storage.write_bytes(f"{folder}/{prefix}-{number:05d}.tar", pack_shard(packed))
        first += size
    assert first == len(samples)
