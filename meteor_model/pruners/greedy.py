"""Picking tokens one after another: farthest points, determinants, coverage.

Every function returns picks (M, K) int64 in the order of picking; equal gains go to the lower index. None of them reads
a value back to the host. All but `cover` keep O(N K) numbers at most, beside the tokens; `cover` keeps the N x N
similarities.

Legend: M images, N tokens, K tokens picked, C width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meteor_model.pruners.select import gather_tokens, in_full_precision, unit

CHUNK = 256
TINY = torch.finfo(torch.float32).tiny


def _row(tokens_MNC: Tensor, pick_M: Tensor) -> Tensor:
    """Products (M, N) of every token with the picked one."""
    picked_M1C = gather_tokens(tokens_MNC, pick_M[:, None])
    return torch.bmm(tokens_MNC, picked_M1C.transpose(1, 2)).squeeze(2)


@in_full_precision
def farthest(tokens_MNC: Tensor, keep: int) -> Tensor:
    """Max-min cosine distance: each pick is the token whose nearest picked one is farthest.

    The first is the token whose nearest other token is farthest.
    """
    units_MNC = unit(tokens_MNC)
    count = units_MNC.shape[1]
    nearest = []
    for start in range(0, count, CHUNK):
        similar_McN = torch.bmm(units_MNC[:, start : start + CHUNK], units_MNC.transpose(1, 2))
        own = torch.arange(similar_McN.shape[1], device=similar_McN.device)
        similar_McN[:, own, own + start] = -torch.inf
        nearest.append(similar_McN.amax(dim=2))
    gain_MN = -torch.cat(nearest, dim=1)
    closest_MN = torch.full_like(gain_MN, -torch.inf)
    picks, taken_MN = [], torch.zeros_like(gain_MN, dtype=torch.bool)
    for _ in range(keep):
        pick_M = gain_MN.masked_fill(taken_MN, -torch.inf).argmax(dim=1)
        picks.append(pick_M)
        taken_MN = taken_MN.scatter(1, pick_M[:, None], True)
        closest_MN = torch.maximum(closest_MN, _row(units_MNC, pick_M))
        gain_MN = -closest_MN
    return torch.stack(picks, dim=1)


@in_full_precision
def largest_determinant(diagonal_MN: Tensor, row: Callable[[Tensor], Tensor], keep: int) -> Tensor:
    """Greedy maximum of the determinant of a kernel's principal minor, by its incremental Cholesky factor.

    Source: Chen, Zhang, Zhou, "Fast greedy MAP inference for determinantal point process", 2018: O(N K) per pick.

    Args:
        diagonal_MN: of the kernel, fp32.
        row: (M,) picked tokens -> that row of the kernel, (M, N).
        keep: K.
    """
    left_MN = diagonal_MN
    factors: list[Tensor] = []
    picks, taken_MN = [], torch.zeros_like(left_MN, dtype=torch.bool)
    for _ in range(keep):
        pick_M = left_MN.masked_fill(taken_MN, -torch.inf).argmax(dim=1)
        picks.append(pick_M)
        taken_MN = taken_MN.scatter(1, pick_M[:, None], True)
        pivot_M1 = left_MN.gather(1, pick_M[:, None]).clamp_min(TINY).sqrt()
        factor_MN = row(pick_M)
        if factors:
            factors_MkN = torch.stack(factors, dim=1)
            at_pick_Mk = factors_MkN.gather(2, pick_M[:, None, None].expand(-1, len(factors), 1)).squeeze(2)
            factor_MN = factor_MN - torch.einsum("mkn,mk->mn", factors_MkN, at_pick_Mk)
        # A kernel without rank left has nothing to tell: its pivots are rounding, and so would be what they divide.
        factor_MN = torch.where(pivot_M1 > 1e-6, factor_MN / pivot_M1, torch.zeros_like(factor_MN))
        factors.append(factor_MN)
        left_MN = left_MN - factor_MN.square()
    return torch.stack(picks, dim=1)


@in_full_precision
def relevant_and_diverse(tokens_MNC: Tensor, relevance_MN: Tensor, keep: int) -> Tensor:
    """Greedy MAP of the kernel r_i cos(z_i, z_j) r_j."""
    units_MNC = unit(tokens_MNC)
    own_MN = units_MNC.square().sum(dim=2) * relevance_MN.square()

    def row(pick_M: Tensor) -> Tensor:
        return relevance_MN * _row(units_MNC, pick_M) * relevance_MN.gather(1, pick_M[:, None])

    return largest_determinant(own_MN, row, keep)


@in_full_precision
def transport(tokens_MNC: Tensor, gamma: float, keep: int) -> Tensor:
    """Greedy maximum of logdet(I + gamma W_S W_S^T), where W = V V^T / C of tokens V scaled to unit variance."""
    tokens_MNC = tokens_MNC.float()
    deviation_MN1 = tokens_MNC.std(dim=2, unbiased=False, keepdim=True)
    scaled_MNC = tokens_MNC / deviation_MN1.clamp_min(TINY).mul(tokens_MNC.shape[2] ** 0.5)
    squares = []
    for start in range(0, scaled_MNC.shape[1], CHUNK):
        gram_McN = torch.bmm(scaled_MNC[:, start : start + CHUNK], scaled_MNC.transpose(1, 2))
        squares.append(gram_McN.square().sum(dim=2))

    def row(pick_M: Tensor) -> Tensor:
        """W W_j: both products are with vectors."""
        gram_MN = _row(scaled_MNC, pick_M)
        mixed_MC1 = torch.bmm(scaled_MNC.transpose(1, 2), gram_MN[:, :, None])
        identity_MN = torch.zeros_like(gram_MN).scatter(1, pick_M[:, None], 1.0)
        return gamma * torch.bmm(scaled_MNC, mixed_MC1).squeeze(2) + identity_MN

    return largest_determinant(1.0 + gamma * torch.cat(squares, dim=1), row, keep)


@in_full_precision
def cover(
    tokens_MNC: Tensor,
    saliency_MN: Tensor,
    keep: int,
    owner_N: Tensor | None = None,
    floors: Sequence[int] = (),
) -> Tensor:
    """Each pick gains most of the sum over tokens of max(0, cosine to it - best cosine to those picked) * saliency.

    With `floors` at least so many picks are of each owner: where no more picks are left than are still owed, only
    tokens of owners below their floor may be picked.

    Args:
        tokens_MNC: the tokens.
        saliency_MN: their weights, fp32.
        keep: K.
        owner_N: whose each token is, counted from 0.
        floors: least picks of each owner; their sum is at most K, each at most the owner's tokens.
    """
    owed_ME: Tensor | None = None
    if owner_N is not None and any(floors):
        owed_ME = torch.tensor(floors, device=saliency_MN.device).expand(len(saliency_MN), -1)
    units_MNC = unit(tokens_MNC)
    similar_MNN = torch.bmm(units_MNC, units_MNC.transpose(1, 2))
    covered_MN = torch.zeros_like(saliency_MN)
    picks, taken_MN = [], torch.zeros_like(saliency_MN, dtype=torch.bool)
    for number in range(keep):
        gain_MN = (similar_MNN - covered_MN[:, :, None]).clamp_min(0).sum(dim=1) * saliency_MN
        barred_MN = taken_MN
        if owed_ME is not None and owner_N is not None:
            bound_M1 = owed_ME.sum(dim=1, keepdim=True) >= keep - number
            barred_MN = taken_MN | (bound_M1 & (owed_ME[:, owner_N] == 0))
        pick_M = gain_MN.masked_fill(barred_MN, -torch.inf).argmax(dim=1)
        if owed_ME is not None and owner_N is not None:
            paid_ME = owner_N[pick_M][:, None] == torch.arange(owed_ME.shape[1], device=owner_N.device)
            owed_ME = (owed_ME - paid_ME.long()).clamp_min(0)
        picks.append(pick_M)
        taken_MN = taken_MN.scatter(1, pick_M[:, None], True)
        covered_MN = torch.maximum(covered_MN, gather_tokens(similar_MNN, pick_M[:, None]).squeeze(1))  # symmetric
    return torch.stack(picks, dim=1)
