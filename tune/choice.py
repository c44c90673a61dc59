"""Which trials become finalists, and what is chosen among them: all statistics of a sweep's decision, on plain arrays.

1. `nearest_to_front`  of the search: NLL on the search questions against cost, the nearest to the front, none that is
                       worse than the paper's settings by more than the margin for certain
2. `judged`            each finalist against the paper's settings on the final questions: paired difference, p-value of
                       "it is worse by the margin", adjusted over all that cost less (Holm)
3. `cheapest`          the cheapest that is no worse after that adjustment, if it is cheaper than the paper's at all
4. `best_within`       of each budget: the one-standard-error rule, the cheapest whose paired interval against the best
                       in the budget holds 0, so that a tie within noise never registers the dearer one

Nothing here knows of models or storage, so that `python -m tune.redo` makes every number again from `sweep.json`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.evaluation.intervals import Difference, Verdict, difference, holm, mean, non_inferiority, sign_flip
from tune.pareto import Point, front

LEVEL = 0.025
"""One-sided level of a non-inferiority test: that of a 95 % interval."""


@dataclass(frozen=True)
class Answers:
    """One configuration on one suite.

    Attributes:
        id: of the trial.
        cost: what the sweep lowers, per image.
        budgeted: what its budgets count, per image.
        nll: of each question.
    """

    id: str
    cost: float
    budgeted: float
    nll: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the questions."""
        return float(np.mean(self.nll))


@dataclass(frozen=True)
class Judgement:
    """A finalist against the paper's settings on the final questions.

    Attributes:
        id: of the finalist.
        cost: per image.
        saved: share of the paper's cost that it does not have; negative where it is dearer.
        nll: difference to the paper's.
        p_margin: one-sided, of "it is worse than the paper's by the margin or more".
        p_adjusted: over all finalists that cost less than the paper's (Holm); of others the same.
        verdict: by its interval at the margin, without adjustment.
    """

    id: str
    cost: float
    saved: float
    nll: Difference
    p_margin: float
    p_adjusted: float
    verdict: Verdict

    @property
    def no_worse(self) -> bool:
        """Whether that it is worse by the margin is refuted, with all finalists in view."""
        return self.p_adjusted <= LEVEL


def nearest_to_front(
    trials: Sequence[Answers], paper: Answers, groups: Sequence[str], count: int, margin: float
) -> list[Answers]:
    """The finalists beside the paper's settings, the nearest to the front first.

    Those that are worse than the paper's by more than the margin for certain are left out. The distance to the front is
    the NLL that the best trial of no higher cost has less.
    """
    others = [trial for trial in trials if trial.id != paper.id]
    kept = [trial for trial in others if _worst_case_allowed(trial, paper, groups, margin)]

    def gap(trial: Answers) -> float:
        return trial.mean - min(other.mean for other in kept if other.cost <= trial.cost)

    return sorted(kept, key=lambda trial: (gap(trial), trial.cost))[:count]


def with_budgets(chosen: Sequence[Answers], trials: Sequence[Answers], budgets: Sequence[float]) -> list[Answers]:
    """The finalists, and of each budget the best trial of the search where none of them is within it."""
    found = list(chosen)
    for budget in budgets:
        fitting = [trial for trial in trials if trial.budgeted <= budget]
        if fitting and not any(trial.budgeted <= budget for trial in found):
            found.append(min(fitting, key=lambda trial: (trial.mean, trial.cost)))
    return found


def _worst_case_allowed(trial: Answers, paper: Answers, groups: Sequence[str], margin: float) -> bool:
    change = np.array(trial.nll) - np.array(paper.nll)
    return non_inferiority(mean(change, groups), margin, larger_is_better=False) is not Verdict.INFERIOR


def judged(finalists: Sequence[Answers], paper: Answers, groups: Sequence[str], margin: float) -> list[Judgement]:
    """Every finalist but the paper's settings against these."""
    others = [finalist for finalist in finalists if finalist.id != paper.id]
    found = []
    for finalist in others:
        nll = difference(np.array(paper.nll), np.array(finalist.nll), groups)
        shifted = np.array(finalist.nll) - np.array(paper.nll) - margin
        two_sided = sign_flip(shifted, groups)
        found.append((finalist, nll, two_sided / 2 if shifted.mean() < 0 else 1 - two_sided / 2))
    family = [place for place, (finalist, _, _) in enumerate(found) if finalist.cost < paper.cost]
    adjusted = [p for _, _, p in found]
    for place, p in zip(family, holm([adjusted[place] for place in family]), strict=True):
        adjusted[place] = p
    return [
        Judgement(
            id=finalist.id,
            cost=finalist.cost,
            saved=1 - finalist.cost / paper.cost,
            nll=nll,
            p_margin=p,
            p_adjusted=p_adjusted,
            verdict=non_inferiority(nll.interval, margin, larger_is_better=False),
        )
        for (finalist, nll, p), p_adjusted in zip(found, adjusted, strict=True)
    ]


def cheapest(judgements: Sequence[Judgement]) -> Judgement | None:
    """The cheapest finalist that is no worse than the paper's settings, where it is cheaper; None: no better found."""
    passed = [one for one in judgements if one.no_worse and one.saved > 0]
    return min(passed, key=lambda one: one.cost, default=None)


def best_within(
    finalists: Sequence[Answers], groups: Sequence[str], budget: float
) -> tuple[Answers, Answers, Difference] | None:
    """The choice within a budget, the best of it by NLL, and their difference (choice - best); None where none fits."""
    fitting = [finalist for finalist in finalists if finalist.budgeted <= budget]
    if not fitting:
        return None
    best = min(fitting, key=lambda finalist: finalist.mean)
    ties = []
    for finalist in fitting:
        nll = difference(np.array(best.nll), np.array(finalist.nll), groups)
        if nll.interval.low <= 0:
            ties.append((finalist, nll))
    chosen, nll = min(ties, key=lambda tie: (tie[0].cost, tie[0].mean))
    return chosen, best, nll


def front_of(finalists: Sequence[Answers]) -> list[str]:
    """Names of the finalists that no other one dominates, by rising cost."""
    return [point.id for point in front(Point(one.id, one.cost, -one.mean) for one in finalists)]


def saving(points: Mapping[str, tuple[float, float]], paper: str, margin: float) -> float:
    """Share of the paper's cost that the cheapest setting does not have whose NLL is within the margin, at no noise.

    Args:
        points: by name, cost and NLL.
        paper: name of the paper's settings.
        margin: in nats.
    """
    cost, nll = points[paper]
    return max(1 - other / cost for other, its in points.values() if its <= nll + margin)
