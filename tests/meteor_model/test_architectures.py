"""Every named architecture, built on the meta device: shapes only, no weight."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from meteor_model.architectures import ARCHITECTURES, build_config
from meteor_model.configuration_meteor import MeteorConfig, PruningConfig
from meteor_model.encoders import VisionEncoder, encoder_class
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from tests.meteor_model.builders import DENSE

SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

#: Visual tokens per image that enter the LLM where nothing is pruned, and the width of each projector's input.
DENSE_SHAPES: dict[str, tuple[int, dict[str, int]]] = {
    "eagle_x4_7b": (1024, {"joint": 1024 + 3072 + 1024 + 1536}),
    "eagle_x5_7b": (1024, {"joint": 1024 + 3072 + 4 * 256 + 1024 + 1536}),
    "meteor_x4_1b": (256 + 256 + 1024 + 576, {"clip": 768, "convnext": 1024, "eva02": 768, "pix2struct": 768}),
    "meteor_x4_7b": (576 + 1024 + 4096 + 2025, {"clip": 1024, "convnext": 3072, "eva02": 1024, "pix2struct": 1536}),
    "small": (256 + 100 + 441, {"dinov2": 384, "efficientnet": 320, "reader": 192}),
    "tiny": (64 + 64 + 64, {"clip": 64, "pix2struct": 64, "convnext": 64}),
}


def vicuna_config(name: str, pruning: PruningConfig) -> MeteorConfig:
    """An architecture with Vicuna's vocabulary and the placeholder."""
    return build_config(name, pruning, 32001, SPECIAL_IDS, 32000)


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_an_architecture_has_its_published_shapes(name: str) -> None:
    tokens, widths = DENSE_SHAPES[name]
    config = vicuna_config(name, DENSE)
    assert config.tokens_per_image == tokens
    with torch.device("meta"):
        net = MeteorForConditionalGeneration(config)
    assert all(p.is_meta for p in net.parameters())
    layers = {
        part: [m for m in mlp.modules() if isinstance(m, torch.nn.Linear)] for part, mlp in net.projectors.items()
    }
    assert {part: linear[0].in_features for part, linear in layers.items()} == widths
    assert {linear[-1].out_features for linear in layers.values()} == {config.text_config.hidden_size}
    for item in config.encoders:
        tower = cast(VisionEncoder, net.encoders[item.name])
        assert tower.grid == config.encoder_grids[item.name]
        assert len(tower.blocks) == encoder_class(item.family).num_blocks(item)


def test_the_joint_projectors_are_eagle_s() -> None:
    assert DENSE_SHAPES["eagle_x4_7b"][1] == {"joint": 6656}
    assert DENSE_SHAPES["eagle_x5_7b"][1] == {"joint": 7680}


def test_every_architecture_is_in_the_table() -> None:
    assert DENSE_SHAPES.keys() == ARCHITECTURES.keys()
