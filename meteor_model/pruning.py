"""Token pruning as pure functions on tensors: ranks, budgets, scores, selection, gather.

Nothing here knows a model. Every function takes tensors (or plain numbers) and returns new ones; scores are fp32
whatever the input's dtype, selections are deterministic (ties go to the lower index) and indices come back ascending,
so kept tokens stay in raster order.

Shape legend: B images or samples, E encoders, N tokens of one encoder, K kept tokens, Q query rows, T text + visual
tokens of one sequence, H heads, G key/value heads (G divides H), D encoder width, C language model width, d head width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import ParamSpec

import torch
from torch import Tensor

from meteor_model.checks import nearest

P = ParamSpec("P")


def in_full_precision(score: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """A score that autocast leaves alone: its matrix products would otherwise be rounded to half precision."""

    @functools.wraps(score)
    def run(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return score(*args, **kwargs)

    return run


# --------------------------------------------------------------------------------------------------------------------
# Selection
# --------------------------------------------------------------------------------------------------------------------


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


def select_visual(scores_BT: Tensor, visual_mask_BT: Tensor, counts_B: Tensor) -> Tensor:
    """Mask (B, T) of the `counts_B[b]` best-scored visual tokens of each row; ties go to the lower index.

    A row's count may differ from its neighbour's and may be 0. Raises ValueError when a count is larger than the row's
    number of visual tokens, or when a score is NaN.
    """
    refuse_nan(scores_BT)
    present_B = visual_mask_BT.sum(dim=-1)
    if bool((counts_B > present_B).any()):
        row = int((counts_B > present_B).nonzero()[0])
        raise ValueError(
            f"cannot keep {int(counts_B[row])} visual tokens of row {row}: it has only {int(present_B[row])}"
        )
    return _best_visual(scores_BT, visual_mask_BT, counts_B)


def _best_visual(scores_BT: Tensor, visual_mask_BT: Tensor, counts_B: Tensor) -> Tensor:
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


# --------------------------------------------------------------------------------------------------------------------
# Stage 1, encoding: scores of one encoder's tokens
# --------------------------------------------------------------------------------------------------------------------


def _unit(hidden: Tensor) -> Tensor:
    """fp32 unit vectors along the last axis; a zero vector stays zero, so its cosine with anything is 0."""
    hidden = hidden.float()
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return hidden / torch.where(norm > 0, norm, torch.ones_like(norm))


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


# --------------------------------------------------------------------------------------------------------------------
# Stage 1, encoding: ranks and the budgets they earn
# --------------------------------------------------------------------------------------------------------------------


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


def _budget_weights(ranks: Sequence[float], exponent: float) -> list[Fraction]:
    for index, rank in enumerate(ranks):
        if not math.isfinite(rank) or rank < 0 or (rank == 0 and exponent < 0):
            raise ValueError(f"encoder {index} has rank {rank}: cannot share tokens by rank to the power {exponent}")
    try:
        weights = [Fraction(rank**exponent) for rank in ranks]
    except OverflowError:
        raise ValueError(
            f"the ranks {list(ranks)} to the power {exponent} are too large to share tokens by: use a smaller exponent"
        ) from None
    if not any(ranks):
        raise ValueError(f"every encoder has rank 0 ({list(ranks)}): there is nothing to share tokens by")
    if not any(weights):
        raise ValueError(f"the ranks {list(ranks)} to the power {exponent} are all 0: use an exponent nearer to 0")
    return weights


def allocate_budgets(
    ranks: Sequence[float], total: int, capacities: Sequence[int], exponent: float = 1.0
) -> tuple[int, ...]:
    """Share `total` tokens among the encoders in proportion to rank ** exponent: k_l = total * r_l^t / sum r^t.

    Each encoder gets at least 1 token and at most its capacity; what a bound takes or leaves is re-shared in proportion
    among the others. Integers by largest remainder, ties to the lower index. The sum is exactly `total`. Exponent 1 is
    the paper's rule, 0 is uniform, -1 inverse. Exact rational arithmetic: the same input gives the same budgets on
    every machine.

    Raises ValueError when `total` is below one token each or above the capacities, or when a rank cannot be used.
    """
    if len(ranks) != len(capacities) or not ranks:
        raise ValueError(f"{len(ranks)} ranks for {len(capacities)} encoders: one rank each is needed")
    if min(capacities) < 1:
        raise ValueError(f"an encoder without tokens cannot take part: capacities {list(capacities)}")
    if total > sum(capacities):
        raise ValueError(
            f"a budget of {total} tokens is larger than the {sum(capacities)} tokens there are ({list(capacities)})"
        )
    if total < len(ranks):
        raise ValueError(f"a budget of {total} tokens does not give each of {len(ranks)} encoders at least one")
    weights = _budget_weights(ranks, exponent)

    shares: dict[int, Fraction] = {}  # decided: held by a bound
    free = list(range(len(ranks)))
    while free:
        left = total - sum(shares.values())
        scale = sum(weights[i] for i in free)
        wanted = {i: left * weights[i] / scale if scale else Fraction(left) / len(free) for i in free}
        bounded = {i: min(max(share, Fraction(1)), Fraction(capacities[i])) for i, share in wanted.items()}
        excess = sum(bounded.values()) - left
        # Hold only the bounds on the side that overshoots: holding the other side could leave it away from its bound.
        if excess > 0:
            held = [i for i in free if bounded[i] > wanted[i]]
        elif excess < 0:
            held = [i for i in free if bounded[i] < wanted[i]]
        else:
            held = list(free)
        shares.update({i: bounded[i] for i in held})
        free = [i for i in free if i not in shares]

    budgets = [math.floor(shares[i]) for i in range(len(ranks))]
    by_remainder = sorted(range(len(ranks)), key=lambda i: (budgets[i] - shares[i], i))
    for i in by_remainder[: total - sum(budgets)]:
        budgets[i] += 1
    return tuple(budgets)


# --------------------------------------------------------------------------------------------------------------------
# Stage 2, fusion
# --------------------------------------------------------------------------------------------------------------------


@in_full_precision
def mutual_redundancy(tokens: Sequence[Tensor]) -> Tensor:
    """How much the OTHER encoders already say of each token. `tokens`: E tensors (B, N_l, C) -> (B, sum N_l) fp32.

    METEOR's R_i^j = sum over l != j and m of cos(z_i^j, z_m^l); high = drop first. Since cosine is a product of unit
    vectors, the double sum is one product with the sum of the other encoders' unit tokens: O(N C), no N x N matrix.
    One encoder alone has redundancy 0; a zero token has similarity 0.

    Raises ValueError when there is no encoder or batch or width differ.
    """
    if not tokens:
        raise ValueError("mutual redundancy needs the tokens of at least one encoder")
    shapes = [tuple(hidden.shape) for hidden in tokens]
    if len({(shape[0], shape[2]) for shape in shapes}) > 1:
        raise ValueError(f"the encoders' tokens differ in batch or width: {shapes}")
    units = [_unit(hidden) for hidden in tokens]
    sums_EBC = torch.stack([unit_BNC.sum(dim=1) for unit_BNC in units])
    scores = []
    for j, unit_BNC in enumerate(units):
        others = [sums_EBC[i] for i in range(len(units)) if i != j]  # added up, not subtracted: no cancellation
        others_BC = torch.stack(others).sum(dim=0) if others else torch.zeros_like(sums_EBC[j])
        scores.append(torch.einsum("bnc,bc->bn", unit_BNC, others_BC))
    return torch.cat(scores, dim=1)


# --------------------------------------------------------------------------------------------------------------------
# Stage 3, decoding
# --------------------------------------------------------------------------------------------------------------------


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


def adaptive_counts(mass_B: Tensor, lam: float, num_visual_B: Tensor, k_min: int) -> Tensor:
    """Visual tokens to keep of each sample: K = lam * mass, rounded half up, clamped to [min(k_min, N), N]. (B,) int64.

    Rounding is floor(x + 0.5) in fp64. A sample without visual tokens (N = 0) has K = 0.

    Raises ValueError when a mass is NaN, or `lam` or `k_min` is negative.
    """
    if not (math.isfinite(lam) and lam >= 0) or k_min < 0:
        raise ValueError(f"lambda must be finite and not negative, k_min not negative; got lambda={lam}, k_min={k_min}")
    refuse_nan(mass_B)
    return _counts(mass_B, lam, num_visual_B, k_min)


def _counts(mass_B: Tensor, lam: float, num_visual_B: Tensor, k_min: int, k_max: int | None = None) -> Tensor:
    num_visual_B = num_visual_B.to(torch.int64)
    wanted_B = torch.floor(mass_B.double() * lam + 0.5)
    if k_max is not None:
        wanted_B = wanted_B.clamp(max=k_max)
    # The bound first, in fp64: a huge lambda must not overflow int64.
    wanted_B = torch.minimum(wanted_B, num_visual_B.double()).to(torch.int64)
    return torch.maximum(wanted_B, num_visual_B.clamp(max=k_min))


def adaptive_selection(
    scores_BT: Tensor, mass_B: Tensor, visual_mask_BT: Tensor, lam: float, k_min: int, k_max: int | None = None
) -> tuple[Tensor, Tensor]:
    """`adaptive_counts` and `select_visual` in one: which visual tokens stay (B, T), and how many of each sample (B,).

    With `k_max` no sample keeps more than so many (the larger of it and k_min).
    Reads no value back to the host, so that a GPU is not waited for: where `mass_B` is NaN the selection means nothing,
    and the caller has to look for it.
    """
    counts_B = _counts(mass_B, lam, visual_mask_BT.sum(dim=-1), k_min, k_max)
    return _best_visual(scores_BT, visual_mask_BT, counts_B), counts_B


def solve_lambda(mass_B: Tensor, num_visual_B: Tensor, target_mean: float, k_min: int) -> float:
    """The lambda whose `adaptive_counts` on these samples have the mean `target_mean`, as near as integers allow.

    Samples without visual tokens do not count in the mean. The mean is a step function of lambda that jumps where some
    lam * mass passes j + 1/2; the search bisects over the middles of its steps, so that the result is not on an edge.
    Of two equally near steps the lower is taken.

    Raises ValueError when no sample has a visual token, or the target is outside what any lambda reaches.
    """
    present_B = num_visual_B > 0
    if not bool(present_B.any()):
        raise ValueError("lambda needs a calibration batch with visual tokens: no sample has any")
    mass_B, num_visual_B = mass_B[present_B].double(), num_visual_B[present_B].to(torch.int64)
    lowest_B = num_visual_B.clamp(max=k_min)
    highest_B = torch.where(mass_B > 0, num_visual_B, lowest_B)
    lowest, highest = float(lowest_B.double().mean()), float(highest_B.double().mean())
    if not lowest <= target_mean <= highest:
        raise ValueError(
            f"a mean of {target_mean} visual tokens cannot be reached on these {len(mass_B)} samples: "
            f"any lambda keeps between {lowest:g} (k_min={k_min}) and {highest:g} (all tokens)"
        )

    edges = [
        (torch.arange(int(low) + 1, int(high) + 1, dtype=torch.float64) - 0.5) / mass.cpu()
        for mass, low, high in zip(mass_B, lowest_B, highest_B, strict=True)
    ]
    edges_S = torch.unique(torch.cat(edges))  # sorted
    if edges_S.numel() == 0:
        return 1.0  # every lambda keeps the same, and a configuration takes positive ones
    steps = list(chain([float(edges_S[0]) / 2], ((edges_S[:-1] + edges_S[1:]) / 2).tolist(), [float(edges_S[-1]) * 2]))

    def mean_count(lam: float) -> float:
        return float(adaptive_counts(mass_B, lam, num_visual_B, k_min).double().mean())

    low, high = 0, len(steps) - 1
    while low < high:  # the first step that reaches the target
        middle = (low + high) // 2
        low, high = (low, middle) if mean_count(steps[middle]) >= target_mean else (middle + 1, high)
    below = max(low - 1, 0)
    nearer_below = target_mean - mean_count(steps[below]) <= mean_count(steps[low]) - target_mean
    return steps[below] if nearer_below and mean_count(steps[low]) != target_mean else steps[low]
