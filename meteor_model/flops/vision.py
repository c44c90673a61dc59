"""FLOPs of towers, their boundaries, projectors and fusion.

Legend: N tokens of a tower, D its width, K visual tokens of one image, C language model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.encode import encode_looking, encode_pruned, segment_ends
from meteor_model.encoders import VisionEncoder
from meteor_model.encoders.base import VisionTokens
from meteor_model.flops.counter import counted
from meteor_model.flops.on_meta import META
from meteor_model.flops.report import TowerFlops
from meteor_model.fusion import concat_channels, prune_pool
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.pruners.encode_criteria import ENCODE_CRITERIA
from meteor_model.vision_meteor import JOINT


def towers_of(model: MeteorForConditionalGeneration) -> Iterator[VisionEncoder]:
    """The encoders that give tokens, in their order: those that are run, or all where maps are joined."""
    for name, encoder in model.encoders.items():
        if model.config.runs(name) or model.config.fusion == "channel_concat":
            yield cast(VisionEncoder, encoder)


def _pixels(encoder: VisionEncoder) -> Tensor:
    side = encoder.config.image_size
    return torch.empty(1, 3, side, side, device=META)


def encode(encoder: VisionEncoder, config: MeteorConfig) -> tuple[VisionTokens, dict[float, Tensor] | None]:
    """Tokens of one encoder through stage 1, (1, N, D), and the attention that stage 2 asks for."""
    looks = config.pruning.fuse.looks
    if not config.runs(encoder.config.name):  # its place among joined maps is zero
        count = config.encoder_tokens[encoder.config.name]
        zeros_1ND = torch.empty(1, count, encoder.embed_dim, device=META)
        return VisionTokens(zeros_1ND, torch.arange(count, device=META)[None], zeros_1ND[:, :0]), None
    if looks:
        return encode_looking(encoder, _pixels(encoder), looks, config.pruning.encode.score_queries)
    budgets, encode = config.encode_budgets[encoder.config.name], config.pruning.encode
    tokens, _ = encode_pruned(
        encoder,
        _pixels(encoder),
        budgets,
        encode.first_deep_segment,
        encode.score_queries,
        criterion=encode.criterion,
        options=encode.options,
    )
    return tokens, None


def _run_tower(encoder: VisionEncoder, budgets: Sequence[int], before: bool) -> Tensor:
    """The tower without scores: after (`before`) each segment the first tokens stay. Prefix tokens come back."""
    hidden = encoder.embed(_pixels(encoder))
    rows, columns = encoder.grid_size(encoder.config)
    positions_1N = torch.arange(rows * columns, device=META)[None]
    if not encoder.prunes_between_blocks:
        for index in range(len(encoder.blocks)):
            hidden = encoder.run_block(index, hidden, positions_1N)
        return encoder.finish(hidden, positions_1N)
    start = 0
    for end, budget in zip(segment_ends(len(encoder.blocks), len(budgets)), budgets, strict=True):
        kept = encoder.num_prefix_tokens + budget
        if before:
            hidden, positions_1N = hidden[:, :kept], positions_1N[:, :budget]
        for index in range(start, end):
            hidden = encoder.run_block(index, hidden, positions_1N)
        hidden, positions_1N = hidden[:, :kept], positions_1N[:, :budget]
        start = end
    return encoder.finish(hidden, positions_1N)


def count_vision(model: MeteorForConditionalGeneration) -> tuple[tuple[TowerFlops, ...], int, int]:
    """Encoders with their projectors; the joint projector; the scores of fusion, contained in a joint projector's."""
    config, projected = model.config, []
    towers = {
        item.name: TowerFlops(item.name, (config.encoder_tokens[item.name], *config.encode_budgets[item.name]), 0, 0, 0)
        for item in config.encoders
    }
    before = config.pruning.encode.enabled and ENCODE_CRITERIA[config.pruning.encode.criterion].facts["before"]
    for encoder in towers_of(model):
        name = encoder.config.name
        budgets = config.encode_budgets[name]
        (encoded, attention), everything = counted(encode, encoder, config)
        tower = counted(_run_tower, encoder, budgets, before)[1] if config.runs(name) else 0
        projector = 0
        if config.fusion == "post_projection":
            hidden_1ND, projector = counted(model.projectors[name], encoded.hidden)
            encoded = encoded._replace(hidden=hidden_1ND)
        projected.append((encoded, attention))
        tokens = (config.encoder_tokens[name], *budgets)
        towers[name] = TowerFlops(name, tokens, tower, everything - tower, projector)
    _, joined = counted(fuse, model, projected, projected=True)
    if config.fusion == "channel_concat":
        return tuple(towers.values()), joined, 0
    return tuple(towers.values()), 0, joined


def fuse(
    model: MeteorForConditionalGeneration,
    encoded: Sequence[tuple[VisionTokens, dict[float, Tensor] | None]],
    projected: bool = False,
) -> Tensor:
    """Tokens of all encoders -> visual tokens (1, K, C); with `projected` they have been through their projectors."""
    config, features = model.config, [tokens.hidden for tokens, _ in encoded]
    if config.fusion == "channel_concat":
        folds = [item.fold for item in config.encoders]
        joined = concat_channels(features, list(config.encoder_grids.values()), folds, config.concat_grid)
        features = [model.projectors[JOINT](joined)]
    elif not projected:
        names = [encoder.config.name for encoder in towers_of(model)]
        features = [model.projectors[name](hidden) for name, hidden in zip(names, features, strict=True)]
    text_1C = torch.empty(1, config.text_config.hidden_size, device=META)
    attention = [found for _, found in encoded]
    pool = model.pool_of(features, [tokens.positions for tokens, _ in encoded], attention, text_1C)
    return prune_pool(pool, config.pruning.fuse)[0]
