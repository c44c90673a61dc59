"""The steps of stage 3 that a prefill and a selection anew share: reach a layer, score, keep, run on what is left.

Shape legend: B samples, T columns present, W kept tokens of the longest sample, C language model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from meteor_model.decoder.cache import Cut, Decision, MeteorCache
from meteor_model.decoder.families import DecoderPlan, Rotary, layer_states, rotary_embeddings
from meteor_model.decoder.masks import Masks, build_masks
from meteor_model.decoder.prompt import Prompt, places
from meteor_model.decoder.scores import refuse_nan, run_layers
from meteor_model.decoder.view import KeyTap, LayerView, cached_states, score_layer, view_layer
from meteor_model.pruners.decode_criteria import Asked
from meteor_model.pruners.select import best_visual, gather_tokens
from meteor_model.pruners.text_scores import VisualScores
from meteor_model.pruning_config import PlannedCut


@dataclass(frozen=True)
class Columns:
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

    def shortened(self, hidden_BTC: Tensor, order_BW: Tensor, cut: Cut) -> Columns:
        """What a cut leaves, at its original positions."""
        hidden_BWC = gather_tokens(hidden_BTC, order_BW.to(hidden_BTC.device))
        rotary = {
            kind: (gather_tokens(cos, order_BW), gather_tokens(sin, order_BW))
            for kind, (cos, sin) in self.rotary.items()
        }
        prompt = self.prompt.shortened(hidden_BWC, order_BW, cut.mask_BW, cut.padded)
        return Columns(hidden_BWC, prompt, rotary, None, cut.layer)


def whole_columns(
    language_model: PreTrainedModel, plan: DecoderPlan, prompt: Prompt, tokens_BT: Tensor | None
) -> Columns:
    """The columns of a whole prompt; `tokens_BT` says which have a place (None: all), seen or not."""
    length = prompt.embeds_BTC.shape[1]
    if plan.window is not None and length >= plan.window:
        prompt = replace(prompt, places_BT=places(tokens_BT, length, prompt.embeds_BTC))
    rotary = rotary_embeddings(language_model, plan, prompt.embeds_BTC, prompt.position_ids_BT)
    return Columns(prompt.embeds_BTC, prompt, rotary, prompt.position_ids_BT)


class Reached(NamedTuple):
    """A layer that is asked, when it has run.

    Attributes:
        asked_BTC: what it was given.
        hidden_BTC: what it gave.
        made: its keys and values.
    """

    asked_BTC: Tensor
    hidden_BTC: Tensor
    made: tuple[Tensor | None, Tensor | None]


def reach(
    language_model: PreTrainedModel, plan: DecoderPlan, columns: Columns, layer: int, kept_cache: MeteorCache | None
) -> Reached:
    """Run the layers below a cut, pausing before the one that is asked."""
    masks = columns.masks(language_model.config, plan, layer, kept_cache)
    shared: dict[str, Any] = {"rotary": columns.rotary, "position_ids_BQ": columns.position_ids_BW, "masks": masks}
    below = range(columns.first, layer - 1)
    asked_BTC = run_layers(language_model, plan, columns.hidden_BWC, below, **shared, cache=kept_cache)
    tap = KeyTap() if kept_cache is None else kept_cache
    hidden_BTC = run_layers(language_model, plan, asked_BTC, range(layer - 1, layer), **shared, cache=tap)
    made = (tap.keys, tap.values) if isinstance(tap, KeyTap) else cached_states(tap, layer - 1)
    if made[0] is None and kept_cache is None and torch.is_grad_enabled():  # recomputed in the backward pass
        with torch.no_grad():
            made = layer_states(language_model, plan, layer - 1, asked_BTC, columns.rotary)
    return Reached(asked_BTC, hidden_BTC, made)


def run_upper(
    language_model: PreTrainedModel, plan: DecoderPlan, columns: Columns, kept_cache: MeteorCache | None
) -> Tensor:
    """The layers from `columns.first` on, and the final norm: (B, W, C)."""
    layers = range(columns.first, language_model.config.num_hidden_layers)
    hidden_BWC = run_layers(
        language_model,
        plan,
        columns.hidden_BWC,
        layers,
        masks=columns.masks(language_model.config, plan, layers.stop, kept_cache),
        rotary=columns.rotary,
        position_ids_BQ=columns.position_ids_BW,
        cache=kept_cache,
    )
    normed_BWC: Tensor = language_model.norm(hidden_BWC)
    return normed_BWC


class Pruned(NamedTuple):
    """What the cuts of a pass left, and what they went by.

    Attributes:
        columns: what the layers above the last cut are given.
        cuts: from the lowest layer on.
        first: the scores of the first of them.
    """

    columns: Columns
    cuts: tuple[Cut, ...]
    first: VisualScores


def prune(
    language_model: PreTrainedModel,
    plan: DecoderPlan,
    columns: Columns,
    reached: Reached,
    cache: MeteorCache,
    kept_cache: MeteorCache | None,
    held: tuple[Tensor, ...] = (),
) -> Pruned:
    """All cuts, from the first one's layer, which was reached, on.

    Args:
        language_model: the bare decoder.
        plan: how its layers run.
        columns: what the layers up to the first cut were given.
        reached: that layer.
        cache: carries the settings.
        kept_cache: the same, or None for a pass that caches nothing.
        held: for each cut, visual columns (B, T) of the whole that stay whatever their scores.
    """
    settings = cache.settings
    found: list[VisualScores] = []
    cuts: list[Cut] = []
    images_B = images_of(columns.prompt.visual_BT, cache.per_image)
    planned = settings.cuts()
    for number, cut_at in enumerate(planned):
        if number:
            reached = reach(language_model, plan, columns, cut_at.layer, kept_cache)
        asked = (columns.rotary, columns.prompt, cache.num_heads, cache.cells_n2)
        view = view_layer(language_model, plan, cut_at.layer - 1, reached.asked_BTC, reached.made, *asked)
        with torch.no_grad():  # selection has no gradient; what is kept carries its own
            scores = score_layer(view, settings.scorer())
        held_BT = held[number] if held else None
        cut, order_BW, hidden_BTC = decide(scores, view, reached.hidden_BTC, cut_at, cache, images_B, held_BT)
        columns = columns.shortened(hidden_BTC, order_BW, cut)
        if settings.positions == "renumbered":
            cut = replace(cut, shift_B=cuts[-1].shift_B if cuts else None)
            columns, cut = renumbered(language_model, plan, columns, cut)
        cuts.append(cut)
        found.append(scores)
    return Pruned(columns, tuple(cuts), found[0])


def keep_all(columns: Columns, hidden_BTC: Tensor, layer: int) -> Pruned:
    """The cut that drops nothing, as long as nothing has been chosen: columns stay where they are."""
    prompt = columns.prompt
    places_BT = torch.arange(hidden_BTC.shape[1], device=hidden_BTC.device).expand_as(prompt.attended_BT)
    index_BT = places_BT.to(prompt.attended_BT.device).masked_fill(~prompt.attended_BT, -1)
    cut = Cut(layer, prompt.attended_BT, index_BT, prompt.visual_BT.sum(dim=1), prompt.padded)
    none_BT = torch.zeros(prompt.visual_BT.shape, device=prompt.visual_BT.device)
    nobody_B0 = torch.zeros(len(none_BT), 0, device=none_BT.device)
    first = VisualScores(none_BT, none_BT.sum(dim=1), nobody_B0.long(), nobody_B0)
    above = Columns(hidden_BTC, prompt, columns.rotary, columns.position_ids_BW, layer)
    return Pruned(above, (cut,), first)


def decision_of(prompt: Prompt, pruned: Pruned, *, everywhere: bool = False) -> Decision:
    """What was decided on the columns of a prompt."""
    return Decision(
        attended_BT=prompt.attended_BT,
        visual_BT=prompt.visual_BT,
        cuts=pruned.cuts,
        mass_B=pruned.first.mass_B.to(prompt.visual_BT.device),
        heads_Bk=pruned.first.heads_Bk,
        lower_padded=prompt.padded,
        everywhere=everywhere,
    )


def images_of(visual_BT: Tensor, per_image: int | None) -> Tensor:
    """Images of each sample, (B,) float64; without `per_image` one where there are visual tokens."""
    visual_B = visual_BT.sum(dim=1)
    return visual_B.double() / per_image if per_image else (visual_B > 0).double()


def renumbered(language_model: PreTrainedModel, plan: DecoderPlan, columns: Columns, cut: Cut) -> tuple[Columns, Cut]:
    """The columns that a cut left, at positions counted anew over what is kept, and the cut with its shift."""
    kept_BW = cut.mask_BW
    position_ids_BW = (kept_BW.long().cumsum(dim=1) - 1).clamp(min=0)
    original_BW = columns.prompt.position_ids_BT.masked_fill(~kept_BW, -1)
    before_B = torch.zeros_like(position_ids_BW[:, 0]) if cut.shift_B is None else cut.shift_B
    shift_B = before_B + original_BW.amax(dim=1) - position_ids_BW.amax(dim=1)
    prompt = replace(columns.prompt, position_ids_BT=position_ids_BW)
    rotary = rotary_embeddings(language_model, plan, columns.hidden_BWC, position_ids_BW)
    return replace(columns, prompt=prompt, rotary=rotary), replace(cut, shift_B=shift_B)


def decide(
    scores: VisualScores,
    view: LayerView,
    hidden_BTC: Tensor,
    planned: PlannedCut,
    cache: MeteorCache,
    images_B: Tensor,
    held_BT: Tensor | None,
) -> tuple[Cut, Tensor, Tensor]:
    """The cut; the gather order (B, W): columns of the kept tokens, after those that pad the row; and hidden states."""
    attended_BT, visual_BT = view.prompt.attended_BT, view.prompt.visual_BT
    scores_BT, mass_B = scores.scores_BT.to(visual_BT.device), scores.mass_B.to(visual_BT.device)
    # The next token is read off the last one: where a prompt ends in an image, that is the first to be kept.
    columns_T = torch.arange(attended_BT.shape[1], device=attended_BT.device)
    scores_BT = scores_BT.masked_fill(columns_T == view.prompt.last_B1, torch.inf)
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
    if held_BT is not None:
        index_BT = view.prompt.index_BT
        held_BT = held_BT if index_BT is None else gather_tokens(held_BT, index_BT)
        visual_kept_BT = visual_kept_BT | (held_BT & visual_BT)
        counts_B = visual_kept_BT.sum(dim=1)
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
