"""Singular values of feature maps, and the ranks that are read off them.

Legend: B images, N tokens, D width, R = min(N, D).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meteor_model.checks import nearest
from meteor_model.pruners.select import in_full_precision


@in_full_precision
def singular_values(hidden_BND: Tensor) -> Tensor:
    """Singular values (B, min(N, D)), float64, largest first, of each map: much faster than its SVD.

    They are the roots of the eigenvalues of the second moment X^T X, or of X X^T where that is smaller, summed in
    float64. Squaring halves the digits: values below 1e-8 of the largest are noise, far below what an estimator looks
    at (`numerical_rank`: 1e-3 of the largest).

    Raises ValueError on non-finite features.
    """
    hidden_BND = hidden_BND.detach().double()
    if not bool(torch.isfinite(hidden_BND).all()):
        raise ValueError("the feature map has NaN or infinite values, so it has no rank")
    turned_BDN = hidden_BND.transpose(1, 2)
    tokens, width = hidden_BND.shape[1:]
    moment_BRR = torch.bmm(turned_BDN, hidden_BND) if width <= tokens else torch.bmm(hidden_BND, turned_BDN)
    return torch.linalg.eigvalsh(moment_BRR).clamp_min(0).flip(-1).sqrt()


def numerical_rank(spectrum_BR: Tensor, rtol: float = 1e-3) -> Tensor:
    """Number of singular values above `rtol` times the largest. (B,) fp32; a zero map has rank 0."""
    return (spectrum_BR > rtol * spectrum_BR[:, :1]).sum(dim=-1).float()


def energy_rank(spectrum_BR: Tensor, tau: float = 0.99) -> Tensor:
    """Smallest r whose r largest squared singular values hold at least the share `tau` of them all. (B,) fp32.

    A zero map has rank 0. Raises ValueError when `tau` is outside (0, 1].
    """
    if not 0 < tau <= 1:
        raise ValueError(f"the energy share tau must be in (0, 1], not {tau}")
    energy_BR = spectrum_BR.double().square()
    held_BR = energy_BR.cumsum(dim=-1)
    total_B1 = held_BR[:, -1:]
    # The r-th value is needed when the ones before it do not reach the share yet.
    before_BR = torch.cat([torch.zeros_like(total_B1), held_BR[:, :-1]], dim=-1)
    return ((before_BR < tau * total_B1) & (energy_BR > 0)).sum(dim=-1).float()


def effective_rank(spectrum_BR: Tensor) -> Tensor:
    """Exp of the entropy of the singular values normalised to sum 1 (Roy & Vetterli, 2007). (B,) fp32; zero map: 0."""
    spectrum_BR = spectrum_BR.double()
    total_B1 = spectrum_BR.sum(dim=-1, keepdim=True)
    share_BR = spectrum_BR / torch.where(total_B1 > 0, total_B1, torch.ones_like(total_B1))
    entropy_B = -torch.xlogy(share_BR, share_BR).sum(dim=-1)
    return torch.where(total_B1[:, 0] > 0, entropy_B.exp(), torch.zeros_like(entropy_B)).float()


RANK_ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "numerical": numerical_rank,
    "energy": energy_rank,
    "effective": effective_rank,
}


def spectrum_rank(spectrum_BR: Tensor, estimator: str, **options: float) -> Tensor:
    """Rank (B,) fp32 of maps from their singular values (B, R), largest first, by the named estimator.

    One decomposition serves every estimator; `options` are the estimator's own (`rtol`, `tau`).

    Raises ValueError for an unknown estimator, naming the nearest one.
    """
    if estimator not in RANK_ESTIMATORS:
        hint = nearest(estimator, RANK_ESTIMATORS)
        raise ValueError(f"unknown rank estimator {estimator!r}, choose one of {sorted(RANK_ESTIMATORS)}{hint}")
    return RANK_ESTIMATORS[estimator](spectrum_BR, **options)
