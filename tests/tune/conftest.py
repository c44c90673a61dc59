"""A tiny model with random weights as a folder, and shards of questions, on local disk."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.data import shards
from pipelines.registry.folder import export_model
from tests.meteor_model.builders import TEXTS, config, model, processor


def pairs(count: int, seed: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    rng = np.random.default_rng(seed)
    for index in range(count):
        question, answer = TEXTS[index % len(TEXTS)].split("? " if "?" in TEXTS[index % len(TEXTS)] else ". ")
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(stream, "PNG")
        turns = [{"from": "human", "value": f"<image>\n{question}?"}, {"from": "gpt", "value": answer}]
        record = json.dumps({"id": str(index), "conversations": turns}).encode()
        yield f"s{index:03d}", {"json": record, "png": stream.getvalue()}


@dataclass(frozen=True)
class Bench:
    """Where things are."""

    base: Path
    manifest: shards.Manifest
    encoders: tuple[str, ...]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("tune")
    data = str(folder / "data")
    infos = [*shards.write_shards(pairs(16, 0), data, "train"), *shards.write_shards(pairs(48, 1), data, "heldout")]
    base = export_model(model(), processor(), folder / "base")
    names = tuple(item.name for item in config().encoders)
    return Bench(base, shards.save_manifest(data, infos, {"source": {"name": "test"}}), names)
