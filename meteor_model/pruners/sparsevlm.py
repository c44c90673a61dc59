"""SparseVLM (arXiv 2410.04417): visual tokens by the attention of the text that speaks of the image; the rest recycled.

Defaults are the paper's. What is ours:

- Text means the text after the images, the rows of `query="all_text"`. Raters are chosen once, from the embeddings that
  enter the language model: text whose share of the softmax over text, averaged over visual tokens, is at least the mean
  share (the paper's "at least"; the public code has "above").
- How many tokens stay is given layer by layer, as in the public code, and not by the rank of an attention map, which
  would take the map of all text rows of all heads to the host. The number includes the recycled ones.
- A recycled token takes the place and position of its cluster's centre, where the public code appends it behind the
  visual tokens; members are averaged, as in the public code (the paper writes a sum, which would change the scale of
  the hidden state).
- Clusters are found by density peaks over the 5 nearest neighbours (DPC-KNN) without the code's random tie-breaking:
  equal scores go to the lower column.

Legend: B samples, T tokens present, R rows that ask, or tokens that are recycled, C language model width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meteor_model.pruners.decode_criteria import DECODE_CRITERIA
from meteor_model.pruners.select import best_visual, gather_tokens, in_full_precision

if TYPE_CHECKING:
    from meteor_model.decoder.prompt import Prompt
    from meteor_model.decoder.view import LayerView

NEIGHBOURS = 5


@in_full_precision
def raters(prompt: Prompt) -> Tensor:
    """Which of the rows that ask rate the image, (B, R) bool."""
    embeds_BTC = prompt.embeds_BTC.float()
    text_BRC = gather_tokens(embeds_BTC, prompt.asking_BR)
    logits_BTR = torch.bmm(embeds_BTC, text_BRC.transpose(1, 2))
    asks_B1R = prompt.asks_BR[:, None]
    shares_BTR = logits_BTR.masked_fill(~asks_B1R, torch.finfo(torch.float32).min).softmax(dim=-1)
    visual_BT1 = prompt.visual_BT[:, :, None]
    share_BR = (shares_BTR * visual_BT1).sum(dim=1) / visual_BT1.sum(dim=1).clamp(min=1)
    mean_B1 = 1.0 / prompt.asks_BR.sum(dim=1, keepdim=True).clamp(min=1)  # the shares of a row sum to 1
    # (A single rater's share is 1 up to rounding.)
    rates_BR = prompt.asks_BR & (share_BR >= mean_B1 * (1 - 1e-6))
    return torch.where(prompt.visual_BT.any(dim=1, keepdim=True), rates_BR, prompt.asks_BR)


def recycle(
    view: LayerView,
    hidden_BTC: Tensor,
    scores_BT: Tensor,
    counts_B: Tensor,
    *,
    recycled: float = 0.3,
    clusters: float = 0.1,
) -> tuple[Tensor, Tensor]:
    """The best-scored tokens stay; the best `recycled` share of the others is merged into clusters, which stay, too."""
    visual_BT = view.prompt.visual_BT
    visual_B = visual_BT.sum(dim=1)
    centres_B = torch.floor(clusters * torch.floor(recycled * (visual_B - counts_B).double())) + 1
    centres_B = torch.where(counts_B < visual_B, centres_B.long(), 0)
    centres_B = torch.minimum(centres_B, (counts_B - 1).clamp(min=0))
    best_B = counts_B - centres_B
    best_BT = best_visual(scores_BT, visual_BT, best_B)
    others_BT = visual_BT & ~best_BT
    wanted_B = torch.maximum(torch.floor(recycled * (visual_B - best_B).double()).long(), centres_B)
    merged_BT = best_visual(scores_BT, others_BT, wanted_B)
    width = min(visual_BT.shape[1], math.floor(recycled * visual_BT.shape[1]) + 1)
    index_BR = torch.sort(merged_BT.to(torch.uint8), dim=1, descending=True, stable=True).indices[:, :width]
    index_BR = index_BR.to(hidden_BTC.device)
    valid_BR = gather_tokens(merged_BT.to(hidden_BTC.device), index_BR)
    centre_BR, means_BRC = merge_clusters(gather_tokens(hidden_BTC, index_BR), valid_BR, centres_B)
    is_centre_BT = torch.zeros_like(visual_BT).scatter(1, index_BR.to(visual_BT.device), centre_BR.to(visual_BT.device))
    means_BTC = hidden_BTC.scatter(1, index_BR[..., None].expand(-1, -1, hidden_BTC.shape[2]), means_BRC)
    hidden_BTC = torch.where(is_centre_BT[..., None].to(hidden_BTC.device), means_BTC, hidden_BTC)
    return best_BT | is_centre_BT, hidden_BTC


@in_full_precision
def merge_clusters(tokens_BRC: Tensor, valid_BR: Tensor, centres_B: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster each row's valid tokens by density peaks.

    Returns:
        which tokens are centres, (B, R) bool; and at each centre the mean of its cluster, (B, R, C).
    """
    tokens_BRc = tokens_BRC.float()
    distance_BRR = torch.cdist(tokens_BRc, tokens_BRc, compute_mode="donot_use_mm_for_euclid_dist")
    distance_BRR = distance_BRR / tokens_BRC.shape[2] ** 0.5
    far_BRR = distance_BRR.masked_fill(~(valid_BR[:, :, None] & valid_BR[:, None, :]), torch.inf)
    near_BRk = far_BRR.topk(min(NEIGHBOURS, far_BRR.shape[2]), dim=-1, largest=False).values
    known_BRk = torch.isfinite(near_BRk)
    squares_BRk = torch.where(known_BRk, near_BRk, 0.0).square()
    density_BR = torch.exp(-squares_BRk.sum(dim=-1) / known_BRk.sum(dim=-1).clamp(min=1))
    denser_BRR = density_BR[:, None, :] > density_BR[:, :, None]
    to_denser_BR = far_BRR.masked_fill(~denser_BRR, torch.inf).amin(dim=-1)
    farthest_B1 = torch.where(torch.isfinite(far_BRR), far_BRR, 0.0).flatten(1).amax(dim=1, keepdim=True)
    peak_BR = torch.where(torch.isfinite(to_denser_BR), to_denser_BR, farthest_B1) * density_BR
    centre_BR = best_visual(peak_BR, valid_BR, centres_B.to(valid_BR.device))
    to_centre_BRR = far_BRR.masked_fill(~centre_BR[:, None, :], torch.inf)
    own_R = torch.arange(centre_BR.shape[1], device=centre_BR.device)
    cluster_BR = torch.where(centre_BR, own_R, to_centre_BRR.argmin(dim=-1))
    index_BRC = cluster_BR[..., None].expand_as(tokens_BRc)
    sums_BRC = torch.zeros_like(tokens_BRc).scatter_add(1, index_BRC, tokens_BRc * valid_BR[..., None])
    sizes_BR = torch.zeros_like(peak_BR).scatter_add(1, cluster_BR, valid_BR.float())
    return centre_BR, (sums_BRC / sizes_BR.clamp(min=1)[..., None]).to(tokens_BRC.dtype)


@DECODE_CRITERIA.register("sparsevlm", select=recycle)
def sparsevlm(view: LayerView, *, recycled: float = 0.3, clusters: float = 0.1) -> Tensor:
    """SparseVLM (arXiv 2410.04417): attention of the text that rates the image, heads averaged; the rest recycled."""
    rates_BR = raters(view.prompt.whole or view.prompt)
    return view.attention(rates_BR).mean(dim=1)
