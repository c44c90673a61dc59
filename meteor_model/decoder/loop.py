"""Stage 3: text-guided pruning inside an unmodified Hugging Face decoder, at inference.

    1. lower    layers [0, layer) run on the whole prompt
    2. score    a criterion looks at the last of them (METEOR: how much the text looks at each visual token); only the
                asking rows are computed, from its own query projection and the keys it has just made: attention kernels
                stay untouched
    3. keep     K visual tokens per sample, by a budget (METEOR: from its own attention mass); text tokens all stay
    4. upper    the layers above run on the kept tokens: gathered, left-padded to the longest sample, masked, at their
                original positions; further prunings repeat steps 1 to 3 on what is left
    5. decode   new tokens run through all layers; the cache is full below the first pruning and shorter above each

What was decided at prefill lives in the cache (`MeteorCache`). The loop owns the calls to the decoder's layers and
changes none of them. A prefill reads values back to the host twice (is anything padded; how wide is the result), and
once more for each further pruning; a later pass with a mask of its own once (does it hide anything), a step of
`generate` never.

Shape legend: B samples, T tokens of the whole prompt, W kept tokens of the longest sample, Q new tokens of this call,
L all tokens so far (cached and new), R rows that ask, H heads, G key/value heads, C language model width, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from meteor_model.decoder.cache import Cut, Decision, MeteorCache
from meteor_model.decoder.families import DecoderPlan, Rotary, plan_decoder, rotary_embeddings
from meteor_model.decoder.masks import Masks, build_masks, check_kernel
from meteor_model.decoder.prompt import Prompt, check_mask, places, positions, read_prompt
from meteor_model.decoder.scores import refuse_nan, run_layers
from meteor_model.decoder.view import KeyTap, LayerView, cached_states, score_layer, view_layer
from meteor_model.pruners.decode_criteria import Asked
from meteor_model.pruners.select import best_visual, gather_tokens
from meteor_model.pruners.text_scores import VisualScores
from meteor_model.pruning_config import PlannedCut


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


@dataclass(frozen=True)
class _Columns:
    """What the next layers of a prefill are given.

    Attributes:
        hidden_BWC: hidden states of the columns.
        prompt: what is known of them.
        rotary: the decoder's (cos, sin) at their original positions.
        position_ids_BW: these positions for the layers themselves. None above a cut: positions then reach the layers
            through the rotary embedding only, for as position_ids their gaps would look like packed sequences to flash
            attention.
        first: the first of these layers.
    """

    hidden_BWC: Tensor
    prompt: Prompt
    rotary: Rotary
    position_ids_BW: Tensor | None
    first: int = 0

    def masks(self, config: PreTrainedConfig, plan: DecoderPlan, end: int, cache: MeteorCache | None) -> Masks:
        """For layers [first, end)."""
        slides = plan.slides[self.first : end]
        prompt = self.prompt
        return build_masks(
            config, plan.window, slides, self.hidden_BWC, prompt.seen_BT, prompt.places_BT, cache, self.first
        )

    def shortened(self, hidden_BTC: Tensor, order_BW: Tensor, cut: Cut) -> _Columns:
        """What a cut leaves."""
        hidden_BWC = gather_tokens(hidden_BTC, order_BW.to(hidden_BTC.device))
        rotary = {
            kind: (gather_tokens(cos, order_BW), gather_tokens(sin, order_BW))
            for kind, (cos, sin) in self.rotary.items()
        }
        prompt = self.prompt.shortened(hidden_BWC, order_BW, cut.mask_BW, cut.padded)
        return _Columns(hidden_BWC, prompt, rotary, None, cut.layer)


def _prefill(
    language_model: PreTrainedModel, plan: DecoderPlan, prompt: Prompt, cache: MeteorCache, use_cache: bool
) -> DecodedOutput:
    settings, length = cache.settings, prompt.embeds_BTC.shape[1]
    config, kept_cache = language_model.config, cache if use_cache else None
    if plan.window is not None and length >= plan.window:
        prompt = replace(prompt, places_BT=places(prompt.seen_BT, length, prompt.embeds_BTC))
    rotary = rotary_embeddings(language_model, plan, prompt.embeds_BTC, prompt.position_ids_BT)
    columns = _Columns(prompt.embeds_BTC, prompt, rotary, prompt.position_ids_BT)
    images_B = _images(prompt.visual_BT, cache.per_image)
    cuts, found = [], []
    for planned in settings.cuts():
        # 1. lower, pausing before the layer that is asked
        layer = planned.layer
        masks = columns.masks(config, plan, layer, kept_cache)
        shared: dict[str, Any] = {"rotary": columns.rotary, "position_ids_BQ": columns.position_ids_BW, "masks": masks}
        below = range(columns.first, layer - 1)
        asked_BTC = run_layers(language_model, plan, columns.hidden_BWC, below, **shared, cache=kept_cache)
        tap = KeyTap() if kept_cache is None else kept_cache
        hidden_BTC = run_layers(language_model, plan, asked_BTC, range(layer - 1, layer), **shared, cache=tap)

        # 2. score, 3. keep
        made = (tap.keys, tap.values) if isinstance(tap, KeyTap) else cached_states(tap, layer - 1)
        asked = (columns.rotary, columns.prompt, cache.num_heads, cache.cells_n2)
        view = view_layer(language_model, plan, layer - 1, asked_BTC, made, *asked)
        scores = score_layer(view, settings.scorer())
        cut, order_BW, hidden_BTC = _decide(scores, view, hidden_BTC, planned, cache, images_B)
        cuts.append(cut)
        found.append(scores)
        columns = columns.shortened(hidden_BTC, order_BW, cut)

    # 4. upper
    masks = columns.masks(config, plan, config.num_hidden_layers, kept_cache)
    hidden_BWC = run_layers(
        language_model,
        plan,
        columns.hidden_BWC,
        range(columns.first, config.num_hidden_layers),
        masks=masks,
        rotary=columns.rotary,
        position_ids_BQ=None,
        cache=kept_cache,
    )
    decision = Decision(
        attended_BT=prompt.attended_BT,
        visual_BT=prompt.visual_BT,
        cuts=tuple(cuts),
        mass_B=found[0].mass_B.to(prompt.visual_BT.device),
        heads_Bk=found[0].heads_Bk,
        lower_padded=prompt.padded,
        everywhere=settings.equal_layers,
    )
    if kept_cache is not None:
        if decision.everywhere:
            kept_cache.keep_columns(decision.cuts[0])
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
    for layers, cut in decision.runs(config.num_hidden_layers):
        padded = (decision.lower_padded if cut is None else cut.padded) or cache.masked_since
        seen_BL = _of_columns(attended_BL, cut, decision.prompt_length, masked=True) if padded else None
        there_BL = None
        if places_BL is not None:
            shared = cut is None
            everywhere_BL = places_BL if shared else places_BL.expand(len(embeds_BQC), -1)
            there_BL = _of_columns(everywhere_BL, cut, decision.prompt_length, masked=False)
        slides = plan.slides[layers.start : layers.stop]
        masks = build_masks(config, plan.window, slides, hidden_BQC, seen_BL, there_BL, cache, layers.start)
        hidden_BQC = run_layers(
            language_model,
            plan,
            hidden_BQC,
            layers,
            masks=masks,
            rotary=rotary,
            position_ids_BQ=position_ids_BQ if cut is None else None,
            cache=cache,
        )
    return DecodedOutput(language_model.norm(hidden_BQC), cache, decision=decision)


def _of_columns(values_BL: Tensor, cut: Cut | None, prompt_length: int, *, masked: bool) -> Tensor:
    """Values of all tokens so far -> of the columns that a cut left and of what came after the prompt."""
    if cut is None:
        return values_BL
    kept_BW = gather_tokens(values_BL, cut.kept_index_BW.clamp(min=0))
    if masked:
        kept_BW = cut.mask_BW & kept_BW
    return torch.cat([kept_BW, values_BL[:, prompt_length:]], dim=1)


def _images(visual_BT: Tensor, per_image: int | None) -> Tensor:
    """Images of each sample, (B,) float64; without `per_image` one where there are visual tokens."""
    visual_B = visual_BT.sum(dim=1)
    return visual_B.double() / per_image if per_image else (visual_B > 0).double()


def _decide(
    scores: VisualScores,
    view: LayerView,
    hidden_BTC: Tensor,
    planned: PlannedCut,
    cache: MeteorCache,
    images_B: Tensor,
) -> tuple[Cut, Tensor, Tensor]:
    """The cut; the gather order (B, W): columns of the kept tokens, after those that pad the row; and hidden states."""
    attended_BT, visual_BT = view.prompt.attended_BT, view.prompt.visual_BT
    scores_BT, mass_B = scores.scores_BT.to(visual_BT.device), scores.mass_B.to(visual_BT.device)
    # The next token is read off the last one: where a prompt ends in an image, that is the first to be kept.
    columns_T = torch.arange(attended_BT.shape[1], device=attended_BT.device)
    last_B1 = torch.where(attended_BT, columns_T, 0).amax(dim=1, keepdim=True)
    scores_BT = scores_BT.masked_fill(columns_T == last_B1, torch.inf)
    settings = cache.settings
    asked = Asked(mass_B, visual_BT.sum(dim=-1), images_B, planned.keep, settings.lam, settings.k_min, view)
    counts_B = planned.budget(asked)
    if cache.k_max is not None:
        counts_B = counts_B.clamp(max=cache.k_max)
    select = settings.selector()
    if select is None:
        visual_kept_BT = best_visual(scores_BT, visual_BT, counts_B)
    else:
        visual_kept_BT, hidden_BTC = select(view, hidden_BTC, scores_BT, counts_B)
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
    index_BT = view.prompt.index_BT
    index_BW = order_BW if index_BT is None else gather_tokens(index_BT, order_BW)
    cut = Cut(planned.layer, mask_BW, index_BW.masked_fill(~mask_BW, -1), counts_B, fewest < width)
    return cut, order_BW, hidden_BTC


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
