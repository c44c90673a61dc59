"""Stage 3: text-guided pruning inside an unmodified Hugging Face decoder, at inference.

    1. lower    layers [0, layer) run on the whole prompt
    2. score    a criterion looks at the last of them (METEOR: how much the text looks at each visual token); only the
                asking rows are computed, from its own query projection and the keys it has just made: attention kernels
                stay untouched
    3. keep     K visual tokens per sample, by a budget (METEOR: from its own attention mass); text tokens all stay
    4. upper    the layers above run on the kept tokens: gathered, left-padded to the longest sample, masked, at their
                original positions (or renumbered, `positions`); further prunings repeat steps 1 to 3 on what is left
    5. decode   new tokens run through all layers; the cache is full below the first pruning and shorter above each
    6. anew     where the settings say so (`query="answer"`, `reselect_every`, `later_turn`), steps 2 to 4 again on all
                tokens so far, from the hidden states that wait below the first cut: what a pass without a cache gives

What was decided at prefill lives in the cache (`MeteorCache`). The loop owns the calls to the decoder's layers and
changes none of them. A prefill reads values back to the host twice (is anything padded; how wide is the result), and
once more for each further pruning, and so does a selection anew; a later pass with a mask of its own once (does it hide
anything), any other step of `generate` never.

Shape legend: B samples, T tokens of the whole prompt, W kept tokens of the longest sample, Q new tokens of this call,
L all tokens so far (cached and new), R rows that ask, H heads, G key/value heads, C language model width, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from meteor_model.decoder.cache import Cut, Decision, MeteorCache
from meteor_model.decoder.families import DecoderPlan, plan_decoder, rotary_embeddings
from meteor_model.decoder.masks import build_masks, check_kernel
from meteor_model.decoder.prompt import Prompt, check_mask, places, positions, read_prompt
from meteor_model.decoder.scores import run_layers
from meteor_model.decoder.steps import Reached, decision_of, keep_all, prune, reach, run_upper, whole_columns
from meteor_model.decoder.view import cached_states
from meteor_model.decoder.waiting import Due, Waiting
from meteor_model.pruners.select import gather_tokens


@dataclass
class DecodedOutput(BaseModelOutputWithPast):
    """Output of `decode_pruned`.

    Attributes:
        last_hidden_state: (B, W, C) at prefill, (B, Q, C) afterwards. Index -1 is each sample's last token. Pruned
            positions have no hidden state, hence no logits; `decision.kept_index_BW` says which prompt columns the
            rows of a prefill are.
        past_key_values: the `MeteorCache`, or None without a cache; named `cache` from transformers 5.24 on.
        decision: what stage 3 has decided last.
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
    reply_BQ: Tensor | None = None,
) -> DecodedOutput:
    """One pass of a decoder with stage 3: the prefill on an empty cache, decode steps after it.

    At prefill the whole prompt must come in one call. Padding may be on either side; from the layer on it is on the
    left. Tokens that come later are never pruned, visual or not; a pass that brings several is a later turn. When
    nothing is dropped the result equals the decoder's own forward bit for bit (for left-padded input; later steps up to
    rounding where a sliding window binds).

    Args:
        language_model: a bare decoder (`LlamaModel`, ...) of one of `DECODER_FAMILIES`.
        inputs_embeds_BQC: embeddings of the prompt (Q = T), or of the new tokens.
        attention_mask_BL: 0 and 1 for all tokens so far, cached and new: what it hides of either is hidden from now on.
            None: no padding but the prompt's.
        position_ids_BQ: the original positions. None: counted up from the length of the cache.
        visual_mask_BQ: which tokens of the prompt are visual; ignored after prefill. None: none.
        cache: carries settings and decision.
        use_cache: without, keys and values are dropped: one pass over a prompt, no decode steps.
        reply_BQ: of a prompt with its replies, which columns come from the first of them on: what training gives.

    Raises:
        ValueError: an unsupported decoder or attention kernel, masks that do not fit, a sample without any token, NaN,
            a mask that shows cached padding, or a cache that was filled elsewhere.
    """
    past_length = _check_cache(cache, use_cache)
    if past_length:
        return _continue(language_model, inputs_embeds_BQC, attention_mask_BL, position_ids_BQ, cache)
    plan, settings = plan_decoder(language_model.config), cache.settings
    check_kernel(language_model.config, plan)
    read = (inputs_embeds_BQC, attention_mask_BL, position_ids_BQ, visual_mask_BQ, settings.query)
    prompt = read_prompt(*read, reply_BT=reply_BQ)
    return _prefill(language_model, plan, prompt, cache, use_cache)


# ------------------------------------------------------------------------------------------------------------ the steps


def _prefill(
    language_model: PreTrainedModel, plan: DecoderPlan, prompt: Prompt, cache: MeteorCache, use_cache: bool
) -> DecodedOutput:
    settings, kept_cache = cache.settings, cache if use_cache else None
    columns = whole_columns(language_model, plan, prompt, prompt.seen_BT)
    reached = reach(language_model, plan, columns, settings.layer, kept_cache)
    if settings.query == "answer":  # nobody asks yet
        pruned = keep_all(columns, reached.hidden_BTC, settings.layer)
    else:
        pruned = prune(language_model, plan, columns, reached, cache, kept_cache)
    hidden_BWC = run_upper(language_model, plan, pruned.columns, kept_cache)
    decision = decision_of(prompt, pruned, everywhere=settings.equal_layers)
    if kept_cache is not None:
        if decision.everywhere:
            kept_cache.keep_columns(decision.cuts[0])
        kept_cache.decision, kept_cache.attended_BL = decision, decision.attended_BT
        kept_cache.begin(Waiting(prompt.embeds_BTC, *reached[:2], prompt.position_ids_BT))
    return DecodedOutput(hidden_BWC, kept_cache, decision=decision, prefill=True)


def _continue(
    language_model: PreTrainedModel,
    embeds_BQC: Tensor,
    attention_mask_BL: Tensor | None,
    position_ids_BQ: Tensor | None,
    cache: MeteorCache,
) -> DecodedOutput:
    """5. decode: new tokens through all layers. Only a selection anew reads anything back for a step of `generate`."""
    decision, plan, config = cache.decision, cache.plan, language_model.config
    assert decision is not None
    if len(embeds_BQC) != len(decision.kept_counts_B):
        raise ValueError(
            f"{len(embeds_BQC)} samples on a cache of {len(decision.kept_counts_B)}: repeat or select its rows first "
            "(batch_repeat_interleave, batch_select_indices)"
        )
    past_length = cache.get_seq_length()
    length = past_length + embeds_BQC.shape[1]
    position_ids_BQ = positions(embeds_BQC, position_ids_BQ, past_length)
    if attention_mask_BL is not None:
        check_mask(embeds_BQC, attention_mask_BL, past_length)
    cache.follow_mask(attention_mask_BL, embeds_BQC.shape[1])
    tokens_BL = cache.attended_BL
    assert tokens_BL is not None
    attended_BL = tokens_BL
    if attention_mask_BL is not None:
        attended_BL = attention_mask_BL.to(device=embeds_BQC.device, dtype=torch.bool)
    places_BL = None
    if plan.window is not None and length >= plan.window:  # a hidden token keeps its place
        lower_padded = decision.lower_padded or cache.masked_since
        places_BL = places(tokens_BL if lower_padded else None, length, embeds_BQC)

    rotary = rotary_embeddings(language_model, plan, embeds_BQC, position_ids_BQ)
    hidden_BQC = embeds_BQC
    due = cache.due(embeds_BQC.shape[1])
    for layers, cut in decision.runs(config.num_hidden_layers):
        padded = (decision.lower_padded if cut is None else cut.padded) or cache.masked_since
        seen_BL = _of_columns(attended_BL, cut, decision.prompt_length, masked=True) if padded else None
        there_BL = None
        if places_BL is not None:
            everywhere_BL = places_BL if cut is None else places_BL.expand(len(embeds_BQC), -1)
            there_BL = _of_columns(everywhere_BL, cut, decision.prompt_length, masked=False)
        slides = plan.slides[layers.start : layers.stop]
        masks = build_masks(config, plan.window, slides, hidden_BQC, seen_BL, there_BL, cache, layers.start)
        turned = rotary
        if cut is not None and cut.shift_B is not None:
            shifted_BQ = position_ids_BQ - cut.shift_B.to(position_ids_BQ.device)[:, None]
            turned = rotary_embeddings(language_model, plan, embeds_BQC, shifted_BQ)
        shared: dict[str, Any] = {
            "masks": masks,
            "rotary": turned,
            "position_ids_BQ": position_ids_BQ if cut is None else None,
            "cache": cache,
        }
        if layers.start > 0 or cache.waiting is None:
            hidden_BQC = run_layers(language_model, plan, hidden_BQC, layers, **shared)
            continue
        asked_BQC = run_layers(language_model, plan, hidden_BQC, layers[:-1], **shared)
        hidden_BQC = run_layers(language_model, plan, asked_BQC, layers[-1:], **shared)
        cache.waiting = cache.waiting.grown(Waiting(embeds_BQC, asked_BQC, hidden_BQC, position_ids_BQ))
        if due:
            return _select_anew(language_model, attended_BL, embeds_BQC.shape[1], cache, due)
    cache.grown += embeds_BQC.shape[1]
    return DecodedOutput(language_model.norm(hidden_BQC), cache, decision=decision)


def _select_anew(
    language_model: PreTrainedModel, attended_BL: Tensor, new: int, cache: MeteorCache, due: Due
) -> DecodedOutput:
    """The upper layers anew on all tokens so far, of whose visual ones some are chosen from all there were.

    What a pass without a cache over the same tokens would give. Hidden states of the `new` last columns.
    """
    waiting, settings, plan, before = cache.waiting, cache.settings, cache.plan, cache.decision
    assert waiting is not None
    assert before is not None
    assert cache.attended_BL is not None
    length = attended_BL.shape[1]
    visual_BL = F.pad(before.visual_BT, (0, length - before.prompt_length))
    answer = settings.answer_tokens if settings.query == "answer" else 0
    prompt = read_prompt(
        waiting.embeds_BLC, attended_BL.long(), waiting.position_ids_BL, visual_BL, settings.query, answer
    )
    columns = whole_columns(language_model, plan, prompt, cache.attended_BL)
    reached = Reached(waiting.asked_BLC, waiting.hidden_BLC, cached_states(cache, settings.layer - 1))
    cache.empty_from(settings.layer)
    if due == "keep":
        pruned = keep_all(columns, reached.hidden_BTC, settings.layer)
    else:
        pruned = prune(language_model, plan, columns, reached, cache, cache, cache.held_of(length))
    hidden_BWC = run_upper(language_model, plan, pruned.columns, cache)
    decision = decision_of(prompt, pruned)
    cache.decision = decision
    cache.selected(chosen=due == "choose")
    row_BQ = decision.row_of_column()[:, -new:].clamp(min=0).to(hidden_BWC.device)
    return DecodedOutput(gather_tokens(hidden_BWC, row_BQ), cache, decision=decision)


def _of_columns(values_BL: Tensor, cut: Cut | None, prompt_length: int, *, masked: bool) -> Tensor:
    """Values of all tokens so far -> of the columns that a cut left and of what came after the prompt."""
    if cut is None:
        return values_BL
    kept_BW = gather_tokens(values_BL, cut.kept_index_BW.clamp(min=0))
    if masked:
        kept_BW = cut.mask_BW & kept_BW
    return torch.cat([kept_BW, values_BL[:, prompt_length:]], dim=1)


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
