"""How encoders share a total of tokens: exact shares, so the same input gives the same budgets on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


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
    ranks: Sequence[float],
    total: int,
    capacities: Sequence[int],
    exponent: float = 1.0,
    factors: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """Share `total` tokens among the encoders in proportion to rank ** exponent: k_l = total * r_l^t / sum r^t.

    With `factors`, positive, in proportion to rank ** exponent * factor.

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
    if factors is not None:
        weights = [weight * Fraction(factor) for weight, factor in zip(weights, factors, strict=True)]

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
