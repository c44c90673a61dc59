"""The pictures and conversations that every reader of `make bench-data` reads, made from a seed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.sample_encoder import save_sample_encoder
from meteor_model.tokenizer import train_tokenizer
from pipelines.data.shards import Manifest, save_manifest, write_shards

WIDTH, HEIGHT = 640, 480
QUALITY = 95
"""Of JPEG; gives files of about 100 kB."""
SAMPLES_PER_SHARD = 128
TOKENS_PER_IMAGE = 256
WORDS = ("a red house by the river", "two dogs run over wet grass", "the sign says open until nine", "nobody is there")
_FIELDS = 8
"""Noise fields; each picture is two of them, rolled by its own amounts."""


@cache
def _fields() -> list[NDArray[np.float32]]:
    """Noise of four scales, float32 (H, W, 3)."""
    random = np.random.default_rng(0)
    fields = []
    for _ in range(_FIELDS):
        field = np.zeros((HEIGHT, WIDTH, 3), np.float32)
        for side, spread in ((4, 45), (16, 30), (64, 15), (160, 10)):
            small = random.normal(0, spread, (side * 3 // 4, side, 3)).astype(np.float32)
            for channel in range(3):
                layer = Image.fromarray(small[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
                field[..., channel] += np.asarray(layer)
        fields.append(field)
    return fields


def picture(number: int) -> bytes:
    """JPEG number `number`."""
    random = np.random.default_rng([1, number])
    first, second = random.choice(_FIELDS, 2, replace=False)
    down, right = random.integers(HEIGHT), random.integers(WIDTH)
    mixed = 128 + 0.75 * (_fields()[first] + np.roll(_fields()[second], (int(down), int(right)), (0, 1)))
    stream = io.BytesIO()
    Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def record(number: int) -> bytes:
    """A conversation of two questions, 40 to 60 words."""
    turns = []
    for turn in range(4):
        text = ". ".join(WORDS[(number + turn + place) % len(WORDS)] for place in range(3))
        turns.append({"from": ("human", "gpt")[turn % 2], "value": f"<image>\n{text}" if turn == 0 else text})
    return json.dumps({"id": str(number), "conversations": turns}).encode()


def samples(count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Keys and members of the first `count` samples."""
    for number in range(count):
        yield f"sample{number:07d}", {"jpg": picture(number), "json": record(number)}


def make_dataset(url: str, count: int) -> Manifest:
    """Shards of the samples and their manifest under `url`."""
    shards = write_shards(samples(count), url, "train", SAMPLES_PER_SHARD)
    return save_manifest(url, shards, {"source": "benchmarks.data", "samples": count})


def make_encoder(folder: Path, image_size: int) -> None:
    """The file that data tasks read their tokenizer and image size from."""
    processor = MeteorProcessor(MeteorImageProcessor(image_size), train_tokenizer(WORDS, 600), TOKENS_PER_IMAGE)
    if not save_sample_encoder(processor, folder):
        raise AssertionError("the tokenizer is one of the Rust library")
