"""Choosing tokens by their scores: the best ones of each row, their gather, and what every score shares.

Scores are fp32 whatever the input's dtype; selections are deterministic (ties go to the lower index) and indices come
back ascending, so kept tokens stay in raster order.

Legend: B images or samples, N tokens, K tokens kept, T text + visual tokens of one sequence.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def in_full_precision(score: Callable[P, R]) -> Callable[P, R]:
    """A score that autocast leaves alone: its matrix products would otherwise be rounded to half precision."""

    @functools.wraps(score)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return score(*args, **kwargs)

    return run


def refuse_nan(*scores: Tensor) -> None:
    """ValueError where a score is NaN: it sorts as the largest value and would be kept silently.

    Reads one value back from the device for all `scores` together. Data cannot be read while compiling or on meta, so
    there nothing is checked.
    """
    if not scores or any(item.is_meta for item in scores) or torch.compiler.is_compiling():
        return
    if bool(torch.stack([torch.isnan(item).any() for item in scores]).any()):
        count = sum(int(torch.isnan(item).sum()) for item in scores)
        raise ValueError(
            f"{count} of {sum(item.numel() for item in scores)} token scores are NaN; the features they were computed "
            "from are not finite"
        )


def select_top(scores_BN: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest scores of each row: int64 (B, k), ascending; ties go to the lower index.

    `k == N` gives exactly `arange(N)`. To keep the smallest, negate the scores.

    Raises ValueError when `k` is outside 1..N or a score is NaN.
    """
    refuse_nan(scores_BN)
    return top_indices(scores_BN, k)


def top_indices(scores_BN: Tensor, k: int) -> Tensor:
    """`select_top` for a caller that looks for NaN itself (`refuse_nan`), so that a GPU is not waited for here."""
    count = scores_BN.shape[-1]
    if not 1 <= k <= count:
        raise ValueError(f"cannot keep {k} of {count} tokens: the number kept must be between 1 and {count}")
    order_BN = torch.sort(scores_BN, dim=-1, descending=True, stable=True).indices
    return torch.sort(order_BN[..., :k], dim=-1).values


def best_visual(scores_BT: Tensor, visual_mask_BT: Tensor, counts_B: Tensor) -> Tensor:
    """Mask (B, T) of the `counts_B[b]` best-scored visual tokens of each row; ties go to the lower index.

    A row's count may differ from its neighbour's and may be 0. Reads no value back to the host: a score that is NaN
    counts as the largest, and the caller has to look for it.
    """
    ranked_BT = scores_BT.masked_fill(~visual_mask_BT, -math.inf)
    order_BT = torch.sort(ranked_BT, dim=-1, descending=True, stable=True).indices
    rank_BT = torch.empty_like(order_BT).scatter_(
        -1, order_BT, torch.arange(order_BT.shape[-1], device=order_BT.device).expand_as(order_BT)
    )
    return visual_mask_BT & (rank_BT < counts_B[:, None])


def gather_tokens(tokens_BN: Tensor, keep_BK: Tensor) -> Tensor:
    """The tokens at `keep_BK`: (B, N, ...) -> (B, K, ...). Serves features (B, N, D) and positions (B, N) alike.

    Differentiable in the tokens; a token that is not kept gets gradient zero.
    """
    trailing = tokens_BN.shape[2:]
    index = keep_BK.reshape(*keep_BK.shape, *(1 for _ in trailing)).expand(*keep_BK.shape, *trailing)
    return torch.gather(tokens_BN, 1, index)


def unit(hidden: Tensor) -> Tensor:
    """fp32 unit vectors along the last axis; a zero vector stays zero, so its cosine with anything is 0."""
    hidden = hidden.float()
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return hidden / torch.where(norm > 0, norm, torch.ones_like(norm))
