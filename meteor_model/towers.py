"""A model of some of its towers, and towers that see smaller images: other configurations of the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from meteor_model.configuration_meteor import (
    DecodePruning,
    EncodePruning,
    FusePruning,
    MeteorConfig,
    PruningConfig,
)
from meteor_model.encoders import encoder_class

if TYPE_CHECKING:
    from meteor_model.modeling_meteor import MeteorForConditionalGeneration


def towers_of(config: MeteorConfig) -> dict[str, int]:
    """By name, the side in pixels of the image that each tower sees."""
    return {item.name: item.image_size for item in config.encoders}


def with_towers(config: MeteorConfig, sides: Mapping[str, int]) -> MeteorConfig:
    """The configuration of these towers at these image sides, in the model's order; nothing pruned, no ranks.

    Raises:
        ValueError: for no tower, one that the model does not have, another side of one whose weights belong to theirs,
            or another choice of towers where one projector serves all.
    """
    known = towers_of(config)
    if unknown := sorted(set(sides) - set(known)):
        raise ValueError(f"towers {unknown} are not in the model, which has {list(known)}")
    if not sides:
        raise ValueError(f"no tower is left: name at least one of {list(known)}")
    if set(sides) != set(known) and config.fusion != "post_projection":
        raise ValueError("the towers are joined on the channels, by one projector of all: none can be left out")
    for item in config.encoders:
        if sides.get(item.name, item.image_size) != item.image_size and not encoder_class(item.family).any_size:
            raise ValueError(f"encoder {item.name!r} runs at {item.image_size} pixels alone, not at {sides[item.name]}")
    encoders = [replace(item, image_size=sides[item.name]) for item in config.encoders if item.name in sides]
    dense = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))
    return MeteorConfig(
        **{**config.to_dict(), "encoders": encoders, "pruning": dense, "ranks": None, "calibrated": None}
    )


def of_towers(model: MeteorForConditionalGeneration, config: MeteorConfig) -> MeteorForConditionalGeneration:
    """The model under a configuration of some of its towers.

    It shares all modules: where all towers stay, it is the model itself, followed in place; where some are left out,
    a new one. Image sides are the towers' own, so the model has to `follow` its configuration before it is used again.

    Raises:
        ValueError: as `MeteorVisionMixin.follow`.
    """
    names = list(towers_of(config))
    if names == list(model.encoders):
        model.follow(config)
        return model
    with torch.device("meta"):
        part = type(model)(config)
    part.encoders = nn.ModuleDict({name: model.encoders[name] for name in names})
    part.projectors = nn.ModuleDict({name: model.projectors[name] for name in names})
    part.language_model, part.lm_head = model.language_model, model.lm_head
    part.generation_config = model.generation_config
    part.train(model.training)
    part.follow(config)
    return part
