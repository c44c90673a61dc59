"""How an LLM's layers look at the visual tokens of a prompt: one layer's score row, and every head's attention mass.

A layer is asked with the queries of a few rows only, and the keys that it has just made itself, read where it hands
them to the cache: attention kernels stay untouched and nothing is projected twice.

Shape legend: B samples, T tokens of the whole prompt, Q tokens of one call, R rows that ask, H heads, G key/value
heads, C language model width, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meteor_model.compat import CACHE
from meteor_model.configuration_meteor import DecodePruning
from meteor_model.decoder.cache import MeteorCache
from meteor_model.decoder.families import (
    DecoderPlan,
    Rotary,
    attention_softcap,
    check_decode_settings,
    layer_queries,
    plan_decoder,
    rotary_embeddings,
)
from meteor_model.decoder.masks import Masks, build_masks, check_kernel
from meteor_model.decoder.prompt import Prompt, places, read_prompt
from meteor_model.pruning import VisualScores, gather_tokens, text_guided_scores


class KeyTap:
    """Takes a cache's place in a pass without one, and holds on to the keys of the layer that is asked."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What a layer calls; the keys and values go back as they came."""
        self.keys = keys
        return keys, values


def attention_mass(
    language_model: PreTrainedModel,
    inputs_embeds_BTC: Tensor,
    attention_mask_BT: Tensor | None,
    position_ids_BT: Tensor | None,
    visual_mask_BT: Tensor,
    settings: DecodePruning,
    num_heads: int,
) -> Tensor:
    """Attention mass on visual tokens of each prompt, (B,) fp32, nothing pruned: what `solve_lambda` is given.

    Only the first `settings.layer` layers run. Arguments and errors as in `decode_pruned`; `settings.lam` is not used.
    """
    check_decode_settings(language_model.config, settings.layer, num_heads)
    prompt = read_prompt(inputs_embeds_BTC, attention_mask_BT, position_ids_BT, visual_mask_BT, settings.query)
    scores = _listen(language_model, prompt, [settings.layer - 1], num_heads)[0]
    if not scores.mass_B.is_meta:
        refuse_nan(int(torch.isnan(scores.mass_B).sum()), len(scores.mass_B))
    return scores.mass_B


def visual_attention_by_head(
    language_model: PreTrainedModel,
    inputs_embeds_BTC: Tensor,
    attention_mask_BT: Tensor | None,
    position_ids_BT: Tensor | None,
    visual_mask_BT: Tensor,
    query: Literal["last", "all_text"] = "last",
    layers: Sequence[int] | None = None,
) -> Tensor:
    """The visual attention value (VAV) of every head: its attention mass on visual tokens, nothing pruned.

    Which heads stage 3 listens to is `meteor_model.pruning.select_heads` of layer `settings.layer - 1`.

    Args:
        language_model: a bare decoder, as in `decode_pruned`.
        inputs_embeds_BTC: embeddings of the prompts, visual tokens in place.
        attention_mask_BT: 0 and 1; None where nothing is padded.
        position_ids_BT: None counts from 0.
        visual_mask_BT: which tokens are visual.
        query: which text token asks, as in `DecodePruning`.
        layers: counted from 0; None is all of them. The layers above the last one are not run.

    Returns:
        (B, len(layers), H) fp32, between 0 and 1.

    Raises:
        ValueError: where a layer does not exist; else as in `decode_pruned`.
    """
    depth = language_model.config.num_hidden_layers
    chosen = range(depth) if layers is None else layers
    if not chosen or not all(0 <= index < depth for index in chosen):
        raise ValueError(f"layers {list(chosen)} must be some of 0 to {depth - 1}, the LLM's layers")
    prompt = read_prompt(inputs_embeds_BTC, attention_mask_BT, position_ids_BT, visual_mask_BT, query)
    scores = _listen(language_model, prompt, chosen, num_heads=1)
    return torch.stack([layer_scores.mass_BH for layer_scores in scores], dim=1)


def run_layers(
    language_model: PreTrainedModel,
    plan: DecoderPlan,
    hidden_BQC: Tensor,
    layers: range,
    *,
    masks: Masks,
    rotary: Rotary,
    position_ids_BQ: Tensor | None,
    cache: MeteorCache | KeyTap | None,
) -> Tensor:
    """Some of the decoder's layers on hidden states (B, Q, C), each with its kind of mask and rotary embedding."""
    for index in layers:
        hidden_BQC = language_model.layers[index](
            hidden_BQC,
            attention_mask=masks.sliding if plan.slides[index] else masks.full,
            position_embeddings=rotary[plan.rotary[index]],
            position_ids=position_ids_BQ,
            **{CACHE: cache},
        )
    return hidden_BQC


def score_layer(
    language_model: PreTrainedModel,
    plan: DecoderPlan,
    index: int,
    input_BTC: Tensor,
    key_BGTd: Tensor | None,
    rotary: Rotary,
    prompt: Prompt,
    num_heads: int,
) -> VisualScores:
    """How layer `index` looks at the visual tokens, from its input and the keys that it made of it."""
    if key_BGTd is None or key_BGTd.shape[2] != input_BTC.shape[1]:
        raise ValueError(
            f"LLM layer {index} left no keys of the prompt: stage 3 is for inference, call eval() or turn gradient "
            "checkpointing off"
        )
    device = key_BGTd.device  # the layer's own, where the model is spread over several
    asking_BR = prompt.asking_BR.to(device)
    asking_at = {
        kind: (gather_tokens(cos.to(device), asking_BR), gather_tokens(sin.to(device), asking_BR))
        for kind, (cos, sin) in rotary.items()
        if kind == plan.rotary[index]
    }
    query_BHRd = layer_queries(language_model, plan, index, gather_tokens(input_BTC.to(device), asking_BR), asking_at)
    columns_T = torch.arange(input_BTC.shape[1], device=asking_BR.device)
    allowed_BRT = prompt.asks_BR.to(device)[:, :, None] & (columns_T <= asking_BR[:, :, None])
    if prompt.padded:
        allowed_BRT = allowed_BRT & prompt.attended_BT.to(device)[:, None]
    if plan.window is not None and plan.slides[index]:
        places_BT = places(prompt.seen_BT, len(columns_T), prompt.embeds_BTC).to(device).expand(len(asking_BR), -1)
        allowed_BRT = allowed_BRT & (places_BT[:, None] > gather_tokens(places_BT, asking_BR)[:, :, None] - plan.window)
    return text_guided_scores(
        query_BHRd,
        key_BGTd,
        prompt.visual_BT.to(device),
        allowed_BRT,
        language_model.layers[index].self_attn.scaling,
        num_heads,
        attention_softcap(language_model, plan, index),
    )


def _listen(
    language_model: PreTrainedModel, prompt: Prompt, asked: Sequence[int], num_heads: int
) -> list[VisualScores]:
    """Scores by each of these layers, nothing pruned."""
    plan, length = plan_decoder(language_model.config), prompt.embeds_BTC.shape[1]
    check_kernel(language_model.config, plan)
    binds = plan.window is not None and length >= plan.window
    rotary = rotary_embeddings(language_model, plan, prompt.embeds_BTC, prompt.position_ids_BT)
    places_BT = places(prompt.seen_BT, length, prompt.embeds_BTC) if binds else None
    masks = build_masks(
        language_model.config, plan.window, plan.slides, prompt.embeds_BTC, prompt.seen_BT, places_BT, None, layer=0
    )
    hidden_BTC, found = prompt.embeds_BTC, {}
    for index in range(max(asked) + 1):
        tap, input_BTC = KeyTap(), hidden_BTC
        hidden_BTC = run_layers(
            language_model,
            plan,
            hidden_BTC,
            range(index, index + 1),
            masks=masks,
            rotary=rotary,
            position_ids_BQ=prompt.position_ids_BT,
            cache=tap if index in asked else None,
        )
        if index in asked:
            found[index] = score_layer(language_model, plan, index, input_BTC, tap.keys, rotary, prompt, num_heads)
    return [found[index] for index in asked]


def refuse_nan(count: int, samples: int) -> None:
    """Raise ValueError where the attention of `count` samples is NaN."""
    if count:
        raise ValueError(
            f"the attention on visual tokens is NaN in {count} of {samples} samples: the embeddings or the LLM's "
            "weights are not finite"
        )
