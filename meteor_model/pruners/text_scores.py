"""How text looks at visual tokens in one layer of the language model.

Legend: B samples, Q query rows, T text + visual tokens, H heads, G key/value heads (G divides H), k heads listened to,
d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meteor_model.pruners.select import gather_tokens, in_full_precision


@in_full_precision
def attention_rows(
    query_BHQd: Tensor,
    key_BGTd: Tensor,
    allowed_BQT: Tensor,
    scaling: float,
    softcap: float | None = None,
    chunk: int = 128,
) -> Tensor:
    """Attention of each head to each key, averaged over the query rows. (B, H, T) fp32.

    `allowed_BQT` says which keys a row may see (causality, padding). A row that may see none is left out of the mean;
    a sample without any row has attention 0. Key heads may be fewer than query heads (grouped-query attention): query
    head h reads key head h // (H / G), as in every Hugging Face decoder. `softcap` bounds the logits as in Gemma 2:
    softcap * tanh(logits / softcap).
    """
    batch, heads, _, width = query_BHQd.shape
    groups = key_BGTd.shape[1]
    key_BGTd = key_BGTd.float()
    total_BHT = key_BGTd.new_zeros(batch, heads, key_BGTd.shape[2])
    for query_BHcd, allowed_BcT in zip(query_BHQd.split(chunk, dim=2), allowed_BQT.split(chunk, dim=1), strict=True):
        query_BGRcd = query_BHcd.float().reshape(batch, groups, heads // groups, -1, width)
        logits_BHcT = (torch.einsum("bgrcd,bgtd->bgrct", query_BGRcd, key_BGTd) * scaling).flatten(1, 2)
        if softcap is not None:
            logits_BHcT = softcap * torch.tanh(logits_BHcT / softcap)
        blocked_B1cT = ~allowed_BcT[:, None]
        # finfo.min, not -inf: a row that may see nothing stays finite and is zeroed right after.
        logits_BHcT = logits_BHcT.masked_fill(blocked_B1cT, torch.finfo(torch.float32).min)
        total_BHT = total_BHT + logits_BHcT.softmax(dim=-1).masked_fill(blocked_B1cT, 0.0).sum(dim=2)
    rows_B = allowed_BQT.any(dim=-1).sum(dim=-1).clamp(min=1)
    return total_BHT / rows_B[:, None, None]


def select_heads(visual_mass_BH: Tensor, num_heads: int) -> Tensor:
    """The `num_heads` heads of each sample with the largest attention mass on visual tokens (VAV). (B, k) ascending.

    Ties go to the lower index. A NaN counts as the largest mass, so that it comes to light in what is summed over the
    heads; no value is read back to the host. Raises ValueError when `num_heads` is outside 1..H.
    """
    heads = visual_mass_BH.shape[-1]
    if not 1 <= num_heads <= heads:
        raise ValueError(f"cannot listen to {num_heads} of {heads} heads: the number must be between 1 and {heads}")
    order_BH = torch.sort(visual_mass_BH, dim=-1, descending=True, stable=True).indices
    return torch.sort(order_BH[..., :num_heads], dim=-1).values


@dataclass(frozen=True)
class VisualScores:
    """How much the text looks at each visual token.

    Attributes:
        scores_BT: fp32, attention summed over the heads that are listened to, 0 off the visual tokens.
        mass_B: fp32, the sum of `scores_BT` over the row: between 0 and the number of heads.
        heads_Bk: int64 ascending, the heads of each sample that are listened to.
        mass_BH: fp32, attention mass on visual tokens of every head, the visual attention value (VAV).
    """

    scores_BT: Tensor
    mass_B: Tensor
    heads_Bk: Tensor
    mass_BH: Tensor


def text_guided_scores(
    query_BHQd: Tensor,
    key_BGTd: Tensor,
    visual_mask_BT: Tensor,
    allowed_BQT: Tensor,
    scaling: float,
    num_heads: int,
    softcap: float | None = None,
) -> VisualScores:
    """How much the text looks at each visual token, by the heads that look at the image most.

    The query rows are the last prompt token (Q = 1) or all text rows; see `attention_rows` for `allowed_BQT` and
    `softcap`. Of each sample the `num_heads` heads with the largest attention on visual tokens are used. NaN in a query
    or key shows as NaN in `mass_B`; nothing is read back to the host.
    """
    attention_BHT = attention_rows(query_BHQd, key_BGTd, allowed_BQT, scaling, softcap)
    visual_BHT = attention_BHT * visual_mask_BT[:, None]
    mass_BH = visual_BHT.sum(dim=-1)
    heads_Bk = select_heads(mass_BH, num_heads)
    scores_BT = gather_tokens(visual_BHT, heads_Bk).sum(dim=1)
    return VisualScores(scores_BT, scores_BT.sum(dim=-1), heads_Bk, mass_BH)
