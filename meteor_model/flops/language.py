"""FLOPs of the language model, run by run between the prunings of stage 3, and of stage 3's scores.

Legend: T tokens of a sequence, C language model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from meteor_model.compat import CACHE
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.scores import attention_mass
from meteor_model.flops.counter import flop_counter
from meteor_model.flops.on_meta import META
from meteor_model.flops.report import LayersFlops
from meteor_model.modeling_meteor import MeteorForConditionalGeneration


def schedule_of(config: MeteorConfig) -> list[tuple[int, int]]:
    """Stage 3 as (layers that see what came before, visual tokens kept from there on) pairs; empty where it is off."""
    decode = config.pruning.decode
    if not decode.enabled:
        return []
    if decode.target_mean is None:
        raise ValueError("pruning.decode.target_mean is not set: FLOPs are counted at the mean number of tokens kept")
    schedule, present = [], config.tokens_per_image
    for cut in decode.cuts():
        present = min(present, round(cut.keep or 0))
        schedule.append((cut.layer, present))
    return schedule


def full_mask(length: int) -> Tensor:
    """A mask without padding."""
    return torch.ones(1, length, dtype=torch.long, device=META)


@contextmanager
def _layer_counts(layers: Sequence[nn.Module]) -> Iterator[tuple[FlopCounterMode, list[int]]]:
    """The counter of what runs inside, and the FLOPs of every layer in it."""
    with flop_counter() as counter:
        entered, spent = [0] * len(layers), [0] * len(layers)
        handles = []
        for index, layer in enumerate(layers):

            def enter(*_: Any, index: int = index) -> None:
                entered[index] = counter.get_total_flops()

            def leave(*_: Any, index: int = index) -> None:
                spent[index] += counter.get_total_flops() - entered[index]

            handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
        try:
            yield counter, spent
        finally:
            for handle in handles:
                handle.remove()


def _per_layer(model: MeteorForConditionalGeneration, length: int) -> tuple[list[int], list[int]]:
    """FLOPs of every LLM layer: prefill of `length` tokens, and one new token after them."""
    llm, width = model.language_model, model.config.text_config.hidden_size
    cache = DynamicCache(config=model.config.text_config)
    with _layer_counts(llm.layers) as (_, prefill):
        embeds_1TC = torch.empty(1, length, width, device=META)
        llm(inputs_embeds=embeds_1TC, attention_mask=full_mask(length), use_cache=True, **{CACHE: cache})
    with _layer_counts(llm.layers) as (_, step):
        embeds_11C = torch.empty(1, 1, width, device=META)
        llm(inputs_embeds=embeds_11C, attention_mask=full_mask(length + 1), use_cache=True, **{CACHE: cache})
    return prefill, step


def count_layers(
    model: MeteorForConditionalGeneration, text_tokens: int, schedule: Sequence[tuple[int, int]]
) -> tuple[LayersFlops, ...]:
    """The LLM run by run: between two prunings every layer sees the same tokens."""
    equal, later = model.config.pruning.decode.equal_layers, model.config.pruning.decode.query == "answer"
    firsts = [0, *(layer for layer, _ in schedule)]
    ends = [*firsts[1:], model.config.text_config.num_hidden_layers]
    kept = [model.config.tokens_per_image, *(tokens for _, tokens in schedule)]
    runs = []
    for first, end, visual in zip(firsts, ends, kept, strict=True):
        prefill, step = _per_layer(model, text_tokens + visual)
        if equal:
            _, step = _per_layer(model, text_tokens + kept[-1])
        if later:
            prefill, _ = _per_layer(model, text_tokens + kept[0])
        runs.append(LayersFlops(first, end, visual, sum(prefill[first:end]), sum(step[first:end])))
    return tuple(runs)


def count_stage3(model: MeteorForConditionalGeneration, text_tokens: int, schedule: Sequence[tuple[int, int]]) -> int:
    """What stage 3 adds to the layers: the scores of the layers that are asked, each on the tokens it sees.

    Nothing up to the first token where the answer asks.
    """
    config, total = model.config, 0
    if config.pruning.decode.query == "answer":
        return 0
    heads, width = config.decode_heads, config.text_config.hidden_size
    present = [config.tokens_per_image, *(kept for _, kept in schedule)]
    cells_n2 = torch.tensor(config.visual_cells(), device=META) if config.pruning.decode.wants_grid else None
    for (layer, _), visual in zip(schedule, present[:-1], strict=True):
        length = text_tokens + visual
        visual_1T = torch.ones(1, length, dtype=torch.bool, device=META)
        embeds_1TC = torch.empty(1, length, width, device=META)
        settings = replace(config.pruning.decode, layer=layer, later_layers=(), later_keep=())
        with _layer_counts(model.language_model.layers) as (counter, layers):
            attention_mass(model.language_model, embeds_1TC, None, None, visual_1T, settings, heads, cells_n2)
        total += counter.get_total_flops() - sum(layers)
    return total
