"""AutoPrune (NeurIPS 2025, arXiv 2509.23931): a curve over the layers for every prompt, at the same total of tokens.

The more the attention of the text tells which visual token it is about, the flatter the curve:

    slope  k = max(k0 - gamma * MI, 0)
    curve  h / (1 + exp(k * (l - x0 - k))) of the tokens after layer l of 32

MI is the mutual information in bits of text and visual tokens: the text tokens after the images are equally likely, and
p(visual | text) is the attention of the first layer that is asked. The height h is bisected until all layers together
keep exactly what was asked for, so that h drops out of what is published (0.75).

What is ours: attention is normalised over the visual tokens and MI is averaged over heads, so that it does not grow
with their number (the public code adds heads up); layers of a model of another depth are scaled to 32; counts are whole
by largest remainder and at least 1. Tokens rank by the attention of all text after the images, heads averaged. The
public code also pools dropped tokens as SparseVLM does and begins with a cut by the tower's attention: both are left
out.

Legend: B samples, R rows that ask, T tokens present, H heads, G key/value heads, d head width, P prunings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meteor_model.pruners.decode_criteria import DECODE_BUDGETS, Asked
from meteor_model.pruners.select import in_full_precision

if TYPE_CHECKING:
    from meteor_model.decoder.view import LayerView

X0, K0, GAMMA = 14.9, 0.4, 0.2
DEPTH = 32
CHUNK = 128


@in_full_precision
def mutual_information(view: LayerView) -> Tensor:
    """Of the text that asks and the visual tokens, in bits, heads averaged: (B,) fp64; 0 without visual tokens.

    H(mean over rows of p) - mean over rows of H(p); rows in chunks, so that no map of all rows exists.
    """
    query_BHRd, allowed_BRT = view.asking()
    seen_BRT = allowed_BRT & view.visual_BT[:, None]
    asks_BR = seen_BRT.any(dim=-1)
    rows_B = asks_BR.sum(dim=1).clamp(min=1).double()
    batch, heads, _, width = query_BHRd.shape
    key_BGTd = view.key_BGTd.float()
    groups = key_BGTd.shape[1]
    mean_BHT = key_BGTd.new_zeros(batch, heads, key_BGTd.shape[2], dtype=torch.float64)
    told_BH = mean_BHT.new_zeros(batch, heads)
    for query_BHcd, seen_BcT in zip(query_BHRd.split(CHUNK, dim=2), seen_BRT.split(CHUNK, dim=1), strict=True):
        query_BGqcd = query_BHcd.float().reshape(batch, groups, heads // groups, -1, width)
        logits_BHcT = (torch.einsum("bgqcd,bgtd->bgqct", query_BGqcd, key_BGTd) * view.scaling).flatten(1, 2)
        if view.softcap is not None:
            logits_BHcT = view.softcap * torch.tanh(logits_BHcT / view.softcap)
        blocked_B1cT = ~seen_BcT[:, None]
        logits_BHcT = logits_BHcT.masked_fill(blocked_B1cT, torch.finfo(torch.float32).min)
        p_BHcT = logits_BHcT.softmax(dim=-1).masked_fill(blocked_B1cT, 0.0).double()
        mean_BHT += p_BHcT.sum(dim=2)
        told_BH += torch.special.entr(p_BHcT).sum(dim=(2, 3))
    mean_BHT = mean_BHT / rows_B[:, None, None]
    bits_BH = (torch.special.entr(mean_BHT).sum(dim=2) - told_BH / rows_B[:, None]) / torch.log(
        mean_BHT.new_tensor(2.0)
    )
    return bits_BH.mean(dim=1).clamp(min=0)


def curve_counts(
    slope_B: Tensor, layers: Sequence[int], depth: int, total_B: Tensor, most_B: Tensor, x0: float
) -> Tensor:
    """Whole numbers of tokens after each of `layers`, never growing, that add up to `total_B` exactly.

    Args:
        slope_B: fp64, k of each sample.
        layers: layers that have run at each pruning.
        depth: layers of the model.
        total_B: int64, tokens of all of them together, from 1 a layer to `most_B` a layer.
        most_B: int64, visual tokens of each sample; 0 gives none.
        x0: the published middle of the curve, in layers of 32.

    Returns:
        (B, P) int64.
    """
    place_P = slope_B.new_tensor([layer * DEPTH / depth for layer in layers])
    slope_B1, most_B1 = slope_B[:, None], most_B[:, None].double()
    curve_BP = torch.sigmoid(-slope_B1 * (place_P - x0 - slope_B1))
    least_B1 = most_B1.clamp(max=1)

    def at(height_B1: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(height_B1 * curve_BP, most_B1), least_B1)

    low_B1 = torch.zeros_like(slope_B1)
    high_B1 = most_B1.clamp(min=1) / curve_BP.amin(dim=1, keepdim=True)
    for _ in range(80):  # fp64: nothing is left to halve
        middle_B1 = (low_B1 + high_B1) / 2
        over_B1 = at(middle_B1).sum(dim=1, keepdim=True) > total_B[:, None]
        low_B1, high_B1 = torch.where(over_B1, low_B1, middle_B1), torch.where(over_B1, middle_B1, high_B1)
    exact_BP = at(low_B1) + 1e-9  # what is whole up to rounding counts as whole
    whole_BP = exact_BP.floor()
    order_BP = torch.sort(exact_BP - whole_BP, dim=1, descending=True, stable=True).indices
    ranks_P = torch.arange(len(layers), device=order_BP.device).expand_as(order_BP)
    rank_BP = torch.empty_like(order_BP).scatter_(1, order_BP, ranks_P)
    missing_B1 = total_B[:, None] - whole_BP.sum(dim=1, keepdim=True)
    counts_BP: Tensor = (whole_BP + (rank_BP < missing_B1)).long()
    return counts_BP


def nominal_counts(layers: Sequence[int], depth: int, mean: int, most: int, *, x0: float, slope: float) -> list[int]:
    """`curve_counts` of one image at a slope, for `mean` tokens a layer."""
    total_1, most_1 = torch.tensor([mean * len(layers)]), torch.tensor([most])
    counts: list[int] = curve_counts(torch.tensor([slope]).double(), layers, depth, total_1, most_1, x0)[0].tolist()
    return counts


@DECODE_BUDGETS.register("information_curve", keep=True, through=True)
def by_information(
    asked: Asked,
    plan: Sequence[tuple[int, float]],
    memo: dict[str, Tensor],
    *,
    x0: float = X0,
    k0: float = K0,
    gamma: float = GAMMA,
) -> Tensor:
    """AutoPrune (arXiv 2509.23931): a curve over the layers by mutual information, at the same total for every prompt.

    `plan` holds the (layer, tokens an image) of all prunings: their sum, times the images, is the total.
    """
    if "counts_BP" not in memo:
        config = asked.view.language_model.config
        slope_B = (k0 - gamma * mutual_information(asked.view)).clamp(min=0).to(asked.visual_B.device)
        total_B = torch.floor(asked.images_B * sum(keep for _, keep in plan) + 0.5).to(torch.int64)
        total_B = torch.minimum(total_B, asked.visual_B * len(plan))
        layers = [layer for layer, _ in plan]
        memo["counts_BP"] = curve_counts(slope_B, layers, config.num_hidden_layers, total_B, asked.visual_B, x0)
    counts_B = memo["counts_BP"][:, [layer for layer, _ in plan].index(asked.view.index + 1)]
    return torch.maximum(torch.minimum(counts_B, asked.visual_B), asked.visual_B.clamp(max=asked.k_min))
