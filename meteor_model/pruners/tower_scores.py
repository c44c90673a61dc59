"""Scores of one encoder's tokens: similarity to the mean token, and attention from CLS or received.

Legend: B images, N tokens, T = P + N with P prefix tokens, Q query rows, H heads, D encoder width, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meteor_model.pruners.select import in_full_precision


@in_full_precision
def mean_similarity(hidden_BND: Tensor) -> Tensor:
    """Redundancy of each token: its cosine similarity to the mean token of its map. (B, N) fp32, high = drop first.

    METEOR's shallow criterion: the mean token is the low-frequency background. A zero token, and every token of a map
    whose mean is zero, has similarity 0.
    """
    hidden_BND = hidden_BND.float()
    mean_BD1 = hidden_BND.mean(dim=1).unsqueeze(2)
    product_BN = torch.bmm(hidden_BND, mean_BD1).squeeze(2)
    norms_BN = torch.linalg.vector_norm(hidden_BND, dim=2) * torch.linalg.vector_norm(mean_BD1, dim=1)
    return product_BN / norms_BN.clamp_min(torch.finfo(torch.float32).tiny)  # where a norm is zero, so is the product


@in_full_precision
def prefix_attention(query_BHQd: Tensor, key_BHNd: Tensor, scaling: float, num_prefix: int) -> Tensor:
    """Importance of each patch token: the attention that CLS (prefix token 0) pays it, heads averaged. (B, N - P) fp32.

    METEOR's deep criterion. `key_BHNd` holds all tokens, the P = `num_prefix` prefix tokens first; the softmax runs
    over all of them. Of the queries only row 0 is used, so the caller may pass CLS alone (Q = 1).

    Raises ValueError when there is no prefix token.
    """
    if num_prefix < 1:
        raise ValueError("attention from CLS needs at least one prefix token; use received_attention without one")
    logits_BHN = torch.einsum("bhd,bhnd->bhn", query_BHQd[:, :, 0].float(), key_BHNd.float()) * scaling
    return logits_BHN.softmax(dim=-1).mean(dim=1)[:, num_prefix:]


@in_full_precision
def absorbed_prefix_attention(
    query_BHd: Tensor, hidden_BTD: Tensor, key_weight: Tensor, scaling: float, num_prefix: int
) -> Tensor:
    """`prefix_attention` without the keys of the tokens. (B, T - P) fp32.

    Where keys are a linear layer k = W x + b of the (normed) tokens, the logit q . k is (W^T q) . x + q . b: one vector
    of width D a head instead of one key a token, O(T H D) instead of O(T D^2). The last term is the same for every
    token of a head, so it drops out of the softmax and `b` is not needed.

    Args:
        query_BHd: the query of CLS, its bias included.
        hidden_BTD: what the key layer would be given, the P prefix tokens first.
        key_weight: (H * d, D), rows by head.
        scaling: of the logits.
        num_prefix: P.
    """
    weight_HdD = key_weight.unflatten(0, (query_BHd.shape[1], -1)).float()
    absorbed_BHD = torch.einsum("bhd,hde->bhe", query_BHd.float() * scaling, weight_HdD)
    logits_BHT = torch.bmm(absorbed_BHD, hidden_BTD.float().transpose(1, 2))
    return logits_BHT.softmax(dim=-1).mean(dim=1)[:, num_prefix:]


def evenly_spaced(count: int, wanted: int | None, device: torch.device) -> Tensor:
    """`wanted` of the indices 0..count-1, ascending, at even distances: the middle of each of as many equal parts.

    All of them when `wanted` is None or not below `count`. Deterministic; int64.
    """
    if wanted is None or wanted >= count:
        return torch.arange(count, device=device)
    return (2 * torch.arange(wanted, device=device) + 1) * count // (2 * wanted)


@in_full_precision
def received_attention(
    query_BHQd: Tensor, key_BHNd: Tensor, scaling: float, num_prefix: int = 0, chunk: int = 32
) -> Tensor:
    """Importance of each patch token where no CLS is usable: the attention it receives. (B, N - P) fp32.

    The column mean of the attention map over the queries given (all of them, or those at `evenly_spaced` tokens: then
    the cost is linear in N), heads averaged; the softmax of a query runs over all keys. Queries are taken `chunk` rows
    at a time, so at most B x H x chunk x N attention values live at once.
    """
    keys_BHdN = key_BHNd.float().transpose(2, 3)
    total_BN = keys_BHdN.new_zeros(keys_BHdN.shape[0], keys_BHdN.shape[3])
    for query_BHcd in query_BHQd.split(chunk, dim=2):
        total_BN = total_BN + torch.matmul(query_BHcd.float() * scaling, keys_BHdN).softmax(dim=-1).sum(dim=(1, 2))
    return total_BN[:, num_prefix:] / (query_BHQd.shape[1] * query_BHQd.shape[2])
