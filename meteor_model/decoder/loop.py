"""Stage 3: text-guided pruning inside an unmodified Hugging Face decoder, at inference.

    1. lower    layers [0, layer) run on the whole prompt
    2. score    the last of them is asked how much the text looks at each visual token; only the asking rows are
                computed, from its own query projection and the keys it has just made: attention kernels stay untouched
    3. keep     K visual tokens per sample, from its own attention mass; text tokens all stay
    4. upper    layers [layer, L) run on the kept tokens: gathered, left-padded to the longest sample, masked, at their
                original positions
    5. decode   new tokens run through all layers; the cache is full below `layer` and short above it

What was decided at prefill lives in the cache (`MeteorCache`). The loop owns the calls to the decoder's layers and
changes none of them. A prefill reads values back to the host twice (is anything padded; how wide is the result), a
later pass with a mask of its own once (does it hide anything), a step of `generate` never.

Shape legend: B samples, T tokens of the whole prompt, W kept tokens of the longest sample, Q new tokens of this call,
L all tokens so far (cached and new), R rows that ask, H heads, G key/value heads, C language model width, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from meteor_model.decoder.cache import Decision, MeteorCache
from meteor_model.decoder.families import DecoderPlan, plan_decoder, rotary_embeddings
from meteor_model.decoder.masks import build_masks, check_kernel
from meteor_model.decoder.prompt import Prompt, check_mask, places, positions, read_prompt
from meteor_model.decoder.scores import KeyTap, refuse_nan, run_layers, score_layer
from meteor_model.pruning import VisualScores, adaptive_selection, gather_tokens


@dataclass
class DecodedOutput(BaseModelOutputWithPast):
    """Output of `decode_pruned`.

    Attributes:
        last_hidden_state: (B, W, C) at prefill, (B, Q, C) afterwards. Index -1 is each sample's last token. Pruned
            positions have no hidden state, hence no logits; `decision.kept_index_BW` says which prompt columns the
            rows of a prefill are.
        past_key_values: the `MeteorCache`, or None without a cache; named `cache` from transformers 5.24 on.
        decision: what stage 3 decided on the prompt.
        prefill: whether this pass was the prompt, so that rows of the hidden state are its kept columns.
    """

    decision: Decision | None = None
    prefill: bool | None = None


def decode_pruned(
    language_model: PreTrainedModel,
    inputs_embeds_BQC: Tensor,
    attention_mask_BL: Tensor | None,
    position_ids_BQ: Tensor | None,
    visual_mask_BQ: Tensor | None,
    cache: MeteorCache,
    use_cache: bool = True,
) -> DecodedOutput:
    """One pass of a decoder with stage 3: the prefill on an empty cache, decode steps after it.

    At prefill the whole prompt must come in one call. Padding may be on either side; from the layer on it is on the
    left. Tokens that come later are never pruned, visual or not. When nothing is dropped the result equals the
    decoder's own forward bit for bit (for left-padded input; later steps up to rounding where a sliding window binds).

    Args:
        language_model: a bare decoder (`LlamaModel`, ...) of one of `DECODER_FAMILIES`.
        inputs_embeds_BQC: embeddings of the prompt (Q = T), or of the new tokens.
        attention_mask_BL: 0 and 1 for all tokens so far, cached and new: what it hides of either is hidden from now on.
            None: no padding but the prompt's.
        position_ids_BQ: the original positions. None: counted up from the length of the cache.
        visual_mask_BQ: which tokens of the prompt are visual; ignored after prefill. None: none.
        cache: carries settings and decision.
        use_cache: without, keys and values are dropped: one pass over a prompt, no decode steps.

    Raises:
        ValueError: an unsupported decoder or attention kernel, masks that do not fit, a sample without any token, NaN,
            a mask that shows cached padding, or a cache that was filled elsewhere.
    """
    past_length = _check_cache(cache, use_cache)
    if past_length:
        return _continue(language_model, inputs_embeds_BQC, attention_mask_BL, position_ids_BQ, cache)
    plan, settings = plan_decoder(language_model.config), cache.settings
    check_kernel(language_model.config, plan)
    prompt = read_prompt(inputs_embeds_BQC, attention_mask_BL, position_ids_BQ, visual_mask_BQ, settings.query)
    return _prefill(language_model, plan, prompt, cache, use_cache)


# ------------------------------------------------------------------------------------------------------------ the steps


def _prefill(
    language_model: PreTrainedModel, plan: DecoderPlan, prompt: Prompt, cache: MeteorCache, use_cache: bool
) -> DecodedOutput:
    settings, layer, length = cache.settings, cache.settings.layer, prompt.embeds_BTC.shape[1]
    config, kept_cache = language_model.config, cache if use_cache else None
    binds = plan.window is not None and length >= plan.window

    # 1. lower, pausing before the layer that is asked
    rotary = rotary_embeddings(language_model, plan, prompt.embeds_BTC, prompt.position_ids_BT)
    places_BT = places(prompt.seen_BT, length, prompt.embeds_BTC) if binds else None
    masks = build_masks(
        config,
        plan.window,
        plan.slides[:layer],
        prompt.embeds_BTC,
        prompt.seen_BT,
        places_BT,
        kept_cache,
        layer=0,
    )
    lower: dict[str, Any] = {"masks": masks, "rotary": rotary, "position_ids_BQ": prompt.position_ids_BT}
    asked_BTC = run_layers(language_model, plan, prompt.embeds_BTC, range(layer - 1), **lower, cache=kept_cache)
    tap = KeyTap() if kept_cache is None else kept_cache
    hidden_BTC = run_layers(language_model, plan, asked_BTC, range(layer - 1, layer), **lower, cache=tap)

    # 2. score, 3. keep
    keys = tap.keys if isinstance(tap, KeyTap) else tap.layers[layer - 1].keys
    scores = score_layer(language_model, plan, layer - 1, asked_BTC, keys, rotary, prompt, cache.num_heads)
    decision, order_BW = _decide(scores, prompt, cache.lam, settings.k_min, cache.k_max)
    hidden_BWC = gather_tokens(hidden_BTC, order_BW.to(hidden_BTC.device))

    # 4. upper. Positions reach the layers through the rotary embedding only: as position_ids their gaps would look like
    # packed sequences to flash attention.
    masks = build_masks(
        config,
        plan.window,
        plan.slides[layer:],
        hidden_BWC,
        decision.mask_BW if decision.upper_padded else None,
        None if places_BT is None else gather_tokens(places_BT.expand(len(order_BW), -1), order_BW),
        kept_cache,
        layer=layer,
    )
    hidden_BWC = run_layers(
        language_model,
        plan,
        hidden_BWC,
        range(layer, config.num_hidden_layers),
        masks=masks,
        rotary={
            kind: (gather_tokens(cos, order_BW), gather_tokens(sin, order_BW)) for kind, (cos, sin) in rotary.items()
        },
        position_ids_BQ=None,
        cache=kept_cache,
    )
    if kept_cache is not None:
        kept_cache.decision, kept_cache.attended_BL = decision, decision.attended_BT
    return DecodedOutput(language_model.norm(hidden_BWC), kept_cache, decision=decision, prefill=True)


def _continue(
    language_model: PreTrainedModel,
    embeds_BQC: Tensor,
    attention_mask_BL: Tensor | None,
    position_ids_BQ: Tensor | None,
    cache: MeteorCache,
) -> DecodedOutput:
    """5. decode: new tokens through all layers. Nothing is read back to the host for a step of `generate`."""
    decision, plan, config, layer = cache.decision, cache.plan, language_model.config, cache.settings.layer
    assert decision is not None
    if len(embeds_BQC) != len(decision.kept_counts_B):
        raise ValueError(
            f"{len(embeds_BQC)} samples on a cache of {len(decision.kept_counts_B)}: repeat or select its rows first "
            "(batch_repeat_interleave, batch_select_indices)"
        )
    past_length = cache.get_seq_length()
    length, prompt_length = past_length + embeds_BQC.shape[1], decision.prompt_length
    position_ids_BQ = positions(embeds_BQC, position_ids_BQ, past_length)
    if attention_mask_BL is not None:
        check_mask(embeds_BQC, attention_mask_BL, past_length)
    cache.follow_mask(attention_mask_BL, embeds_BQC.shape[1])
    lower_padded = decision.lower_padded or cache.masked_since
    upper_padded = decision.upper_padded or cache.masked_since
    binds = plan.window is not None and length >= plan.window

    lower_seen = upper_seen = lower_places = upper_places = None
    if lower_padded or upper_padded or binds:
        tokens_BL = cache.attended_BL
        assert tokens_BL is not None
        kept_index_BW = decision.kept_index_BW.clamp(min=0)
        if attention_mask_BL is None:
            attended_BL = tokens_BL
        else:
            attended_BL = attention_mask_BL.to(device=embeds_BQC.device, dtype=torch.bool)
        lower_seen = attended_BL if lower_padded else None
        if upper_padded:
            seen_BW = decision.mask_BW & gather_tokens(attended_BL, kept_index_BW)
            upper_seen = torch.cat([seen_BW, attended_BL[:, prompt_length:]], dim=1)
        if binds:  # a hidden token keeps its place
            lower_places = places(tokens_BL if lower_padded else None, length, embeds_BQC)
            everywhere_BL = lower_places.expand(len(embeds_BQC), -1)
            kept_BW = gather_tokens(everywhere_BL, kept_index_BW)
            upper_places = torch.cat([kept_BW, everywhere_BL[:, prompt_length:]], dim=1)

    rotary = rotary_embeddings(language_model, plan, embeds_BQC, position_ids_BQ)
    hidden_BQC = embeds_BQC
    parts = (
        (range(layer), lower_seen, lower_places, position_ids_BQ),
        (range(layer, config.num_hidden_layers), upper_seen, upper_places, None),
    )
    for layers, seen_BL, places_BL, ids_BQ in parts:
        slides = plan.slides[layers.start : layers.stop]
        masks = build_masks(config, plan.window, slides, hidden_BQC, seen_BL, places_BL, cache, layers.start)
        hidden_BQC = run_layers(
            language_model, plan, hidden_BQC, layers, masks=masks, rotary=rotary, position_ids_BQ=ids_BQ, cache=cache
        )
    return DecodedOutput(language_model.norm(hidden_BQC), cache, decision=decision)


def _decide(scores: VisualScores, prompt: Prompt, lam: float, k_min: int, k_max: int | None) -> tuple[Decision, Tensor]:
    """The decision, and the gather order (B, W): prompt columns of the kept tokens, after those that pad the row."""
    attended_BT, visual_BT = prompt.attended_BT, prompt.visual_BT
    scores_BT, mass_B = scores.scores_BT.to(visual_BT.device), scores.mass_B.to(visual_BT.device)
    # The next token is read off the last one: where a prompt ends in an image, that is the first to be kept.
    columns_T = torch.arange(attended_BT.shape[1], device=attended_BT.device)
    last_B1 = torch.where(attended_BT, columns_T, 0).amax(dim=1, keepdim=True)
    scores_BT = scores_BT.masked_fill(columns_T == last_B1, torch.inf)
    visual_kept_BT, counts_B = adaptive_selection(scores_BT, mass_B, visual_BT, lam, k_min, k_max)
    keep_BT = (attended_BT & ~visual_BT) | visual_kept_BT
    totals_B = keep_BT.sum(dim=1)
    found = torch.stack([torch.isnan(mass_B).sum(), (keep_BT != attended_BT).sum(), totals_B.min(), totals_B.max()])
    # On the meta device there are shapes only: as if nothing were dropped.
    num_nan, num_dropped, fewest, most = (0, 0, *keep_BT.shape[1:] * 2) if found.is_meta else found.tolist()
    refuse_nan(num_nan, len(mass_B))
    # Nothing dropped: keep the prompt's width, so that this is the decoder's own forward to the last bit.
    width = most if num_dropped else keep_BT.shape[1]
    # A stable sort of 0 (not kept) before 1 (kept) is the left-padded gather; what pads is masked, whatever it is.
    order_BW = torch.sort(keep_BT.to(torch.uint8), dim=1, stable=True).indices[:, -width:]
    mask_BW = gather_tokens(keep_BT, order_BW)
    decision = Decision(
        attended_BT=attended_BT,
        visual_BT=visual_BT,
        mask_BW=mask_BW,
        kept_index_BW=order_BW.masked_fill(~mask_BW, -1),
        kept_counts_B=counts_B,
        mass_B=mass_B,
        heads_Bk=scores.heads_Bk,
        lower_padded=prompt.padded,
        upper_padded=fewest < width,
    )
    return decision, order_BW


# ------------------------------------------------------------------------------------------------- arguments and checks


def _check_cache(cache: MeteorCache, use_cache: bool) -> int:
    """Tokens in the cache, 0 at prefill."""
    length = cache.get_seq_length()
    if length and cache.decision is None:
        raise ValueError(
            f"the cache holds {length} tokens that stage 3 has not seen: give decode_pruned a new MeteorCache and the "
            "whole prompt"
        )
    if length and not use_cache:
        raise ValueError(f"a pass without a cache got one that holds {length} tokens: give it a new MeteorCache")
    return length
