"""Published rules that choose inside the language model, from one layer's queries, keys and values.

Each entry names its paper and what is ours. Ours in all of them: `layer` counts the layers that have run, and what is
read is what the last of them made; a prompt of several images keeps that many times the tokens, chosen among all.

Legend: B samples, T tokens present, R rows that ask, G key/value heads, d head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meteor_model.pruners.decode_criteria import DECODE_BUDGETS, DECODE_CRITERIA, FIRST_IN_SCORES, Asked
from meteor_model.pruners.select import best_visual, gather_tokens, in_full_precision, unit
from meteor_model.pruners.spectra import energy_rank, singular_values
from meteor_model.pruners.text_scores import attention_rows

if TYPE_CHECKING:
    from meteor_model.decoder.view import LayerView

# ------------------------------------------------------------------------------------------------------------ FEATHER


@DECODE_CRITERIA.register("feather", grid=True)
@in_full_precision
def feather(view: LayerView, *, stride: float = 3) -> Tensor:
    """FEATHER (ICCV 2025): attention without rotary positions, over image tokens only; a grid of tokens stays, too.

    Early rotary scores favour the end of the image; without them nothing does. At the first pruning every `stride`-th
    row and column of each grid stays before any other. Ours: these count into the number that is kept (the paper unites
    them with its top 30%), so that the number is as promised; where it is smaller than the grid, the grid's own best
    stay. Keys are turned back by the layer's own rotary embedding.
    """
    query_BHRd, allowed_BRT = view.asking_without_rotary()
    visual_BT = view.visual_BT
    seen_BRT = allowed_BRT & visual_BT[:, None]
    keys_BGTd = view.keys_without_rotary()
    scores_BT = attention_rows(query_BHRd, keys_BGTd, seen_BRT, view.scaling, view.softcap).mean(dim=1)
    if view.prompt.whole is None and stride > 0:
        places_BT = view.grid_cells()
        on_grid_BT = (places_BT % int(stride) == 0).all(dim=-1) & visual_BT
        scores_BT = scores_BT + on_grid_BT * FIRST_IN_SCORES
    return scores_BT


# ---------------------------------------------------------------------------------------------------------- IVC-Prune


@in_full_precision
def _value_rows(view: LayerView, index_BR: Tensor, valid_BR: Tensor) -> Tensor:
    """softmax(V V^T / sqrt d) of these rows over what they may see, heads and rows averaged: (B, T)."""
    values_BGTd = view.value_BGTd
    rows_BGRd = values_BGTd.gather(
        2, index_BR[:, None, :, None].expand(-1, values_BGTd.shape[1], -1, values_BGTd.shape[3])
    )
    columns_T = torch.arange(values_BGTd.shape[2], device=values_BGTd.device)
    allowed_BRT = valid_BR[:, :, None] & (columns_T <= index_BR[:, :, None])
    allowed_BRT = allowed_BRT & view.prompt.attended_BT.to(values_BGTd.device)[:, None]
    return attention_rows(rows_BGRd, values_BGTd, allowed_BRT, values_BGTd.shape[3] ** -0.5).mean(dim=1)


def keep_positions_too(
    view: LayerView, hidden_BTC: Tensor, scores_BT: Tensor, counts_B: Tensor, *, places: float = 1 / 6, **_: float
) -> tuple[Tensor, Tensor]:
    """The tokens of largest mean rotary cosine, those of largest mean sine, and the best-scored of the others."""
    visual_BT = view.prompt.visual_BT
    cos_BTd, sin_BTd = (part.to(visual_BT.device) for part in view.rotary[view.plan.rotary[view.index]])
    each_B = torch.floor(counts_B * places).long()
    kept_BT = best_visual(cos_BTd.float().mean(dim=2), visual_BT, each_B)
    kept_BT = kept_BT | best_visual(sin_BTd.float().mean(dim=2), visual_BT & ~kept_BT, each_B)
    return kept_BT | best_visual(scores_BT, visual_BT & ~kept_BT, counts_B - kept_BT.sum(dim=1)), hidden_BTC


@DECODE_CRITERIA.register("ivc_prune", select=keep_positions_too)
def ivc_prune(view: LayerView, *, seeds: float = 0.01, places: float = 1 / 6) -> Tensor:
    """IVC-Prune (ICLR 2026): similarity of values to the question and its seeds; tokens of telling positions stay, too.

    softmax(V V^T / sqrt d), heads averaged. Seeds are the top 1% of the image's tokens by the mean over the question's
    rows; then tokens rank by the mean over rows of question and seeds. Published: 20% by this score, 5% by the mean
    rotary cosine of the position, 5% by its sine; here these are 4, 1 and 1 sixths of the number that is kept, without
    repetition. Ours: rows see what lies before them, as in the layer's own attention; there is at least one seed.
    """
    prompt, device = view.prompt, view.device
    asking_BR, asks_BR = prompt.asking_BR.to(device), prompt.asks_BR.to(device)
    first_BT = _value_rows(view, asking_BR, asks_BR)
    visual_BT = view.visual_BT
    seeds_B = torch.floor(visual_BT.sum(dim=1) * seeds).clamp(min=1).long()
    seed_BT = best_visual(first_BT, visual_BT, seeds_B)
    width = max(int(seeds * visual_BT.shape[1]), 1)
    seed_BS = torch.sort(seed_BT.to(torch.uint8), dim=1, stable=True, descending=True).indices[:, :width]
    rows = torch.cat([asking_BR, seed_BS], dim=1)
    valid = torch.cat([asks_BR, gather_tokens(seed_BT, seed_BS)], dim=1)
    return _value_rows(view, rows, valid)


# --------------------------------------------------------------------------------------------------------------- DART


@in_full_precision
def least_like_pivots(
    view: LayerView, hidden_BTC: Tensor, scores_BT: Tensor, counts_B: Tensor, *, image: float = 4, text: float = 4
) -> tuple[Tensor, Tensor]:
    """Image pivots stay; then each pivot in turn keeps its share of the tokens whose keys are least similar to its."""
    visual_BT, home = view.visual_BT, view.prompt.visual_BT.device
    text_BT = view.prompt.attended_BT.to(view.device) & ~visual_BT
    counts_B = counts_B.to(view.device)
    image_B = counts_B.clamp(max=int(image))
    kept_BT = best_visual(scores_BT.to(view.device), visual_BT, image_B)
    asked_BT = best_visual(_key_norms(view), text_BT, torch.full_like(counts_B, int(text)))
    of_image_BP, of_text_BP = _first(kept_BT, int(image)), _first(asked_BT, int(text))
    pivots_BP = torch.cat([of_image_BP, of_text_BP], dim=1)
    valid_BP = torch.cat([gather_tokens(kept_BT, of_image_BP), gather_tokens(asked_BT, of_text_BP)], dim=1)
    units_BTc = unit(view.key_BGTd.transpose(1, 2).flatten(2))
    wanted_B, turns_B = counts_B - image_B, valid_BP.sum(dim=1).clamp(min=1)
    turn_B = torch.zeros_like(counts_B)
    for pivot, valid_B in enumerate(valid_BP.long().unbind(dim=1)):
        share_B = wanted_B * (turn_B + valid_B) // turns_B - wanted_B * turn_B // turns_B
        turn_B = turn_B + valid_B
        pivot_B1c = gather_tokens(units_BTc, pivots_BP[:, pivot : pivot + 1])
        like_BT = torch.bmm(units_BTc, pivot_B1c.transpose(1, 2)).squeeze(2)
        kept_BT = kept_BT | best_visual(-like_BT, visual_BT & ~kept_BT, share_B)
    return kept_BT.to(home), hidden_BTC


def _key_norms(view: LayerView) -> Tensor:
    """L1 norm of each token's keys, all heads together, (B, T) fp32."""
    return view.key_BGTd.float().abs().sum(dim=(1, 3))


def _first(mask_BT: Tensor, count: int) -> Tensor:
    """Columns of the true entries, ascending, then of others, (B, count)."""
    return torch.sort(mask_BT.to(torch.uint8), dim=1, stable=True, descending=True).indices[:, :count]


@DECODE_CRITERIA.register("dart", select=least_like_pivots)
def dart(view: LayerView, *, image: float = 4, text: float = 4) -> Tensor:
    """DART (EMNLP 2025): tokens whose keys are least similar to a few pivots of largest key norm.

    Pivots are the 4 image and the 4 text tokens whose keys have the largest L1 norm; image pivots stay, and each pivot
    keeps an equal share of the tokens least similar to it. Ours: keys as the layer caches them, all heads as one
    vector, cosine; pivots take turns, image first, and a token kept by one is not counted again; text is all that is
    attended and no image.
    """
    return _key_norms(view)


# ---------------------------------------------------------------------------------------------------------- E-AdaPrune


@DECODE_BUDGETS.register("spectral_energy")
def by_spectral_energy(asked: Asked, *, share: float = 0.99) -> Tensor:
    """E-AdaPrune (arXiv 2603.05950): the smallest number whose singular values hold `share` of the spectral energy.

    Of the visual tokens that enter the language model, for every prompt; any criterion then picks the tokens. Ours: all
    images of a prompt together, exact singular values (the paper's are randomised), and the share 0.99, which a
    calibration may solve for a target mean.
    """
    prompt = asked.view.prompt.whole or asked.view.prompt
    visual_BTC = prompt.embeds_BTC * prompt.visual_BT[..., None]
    rank_B = energy_rank(singular_values(visual_BTC), share).long().to(asked.visual_B.device)
    return torch.maximum(torch.minimum(rank_B, asked.visual_B), asked.visual_B.clamp(max=asked.k_min))
