"""Do the ranks of one dataset hold on another: differences of means, what the budgets would change by, a verdict.

Each difference of two means has Welch's interval. It counts as certain where the interval of the whole family leaves 0
out: 95 % for all boundaries of an estimator together (Bonferroni), so that many boundaries make no finding of chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from meteor_model.configuration_meteor import MeteorConfig
from pipelines.calibration.image_plan import CalibrationError
from pipelines.calibration.ranks import TOKEN_TOLERANCE, RankReport, budgets_of
from pipelines.calibration.statistics import CONFIDENCE, Difference, welch

Verdict = Literal["same", "ranks_only", "undecided", "drift"]


@dataclass(frozen=True)
class Shift:
    """Other mean minus this mean of one encoder at one boundary.

    Attributes:
        difference: in ranks.
        low: lower end of its own 95 % interval.
        high: upper end.
        certain: whether 0 is outside of the interval of the whole family.
    """

    difference: float
    low: float
    high: float
    certain: bool


@dataclass(frozen=True)
class Drift:
    """Another dataset beside this one.

    Attributes:
        against: what it is: a dataset with its split, or an earlier calibration.
        images: of the other one.
        verdict: "same" (no rank differs for certain, budgets hold), "ranks_only" (ranks differ, budgets hold),
            "undecided" (budgets would move, but no difference is certain) or "drift" (both). Budgets hold where none
            moves by more than TOKEN_TOLERANCE. It is of the model's own estimator; with stage 1 off, where no budget
            hangs on ranks, it is "same" or "ranks_only".
        reason: the verdict for people.
        tokens_moved: the largest change of a budget; None with stage 1 off.
        budgets: under the other ranks; None with stage 1 off.
        ranks: estimator -> encoder -> a shift per boundary.
        report: what was measured on the other images.
    """

    against: str
    images: int
    verdict: Verdict
    reason: str
    tokens_moved: int | None
    budgets: dict[str, tuple[int, ...]] | None
    ranks: dict[str, dict[str, tuple[Shift, ...]]]
    report: RankReport

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_ranks(config: MeteorConfig, here: RankReport, there: RankReport, against: str) -> Drift:
    """This dataset's ranks against another's.

    Args:
        config: of the model that both were measured on.
        here: what its budgets are made from.
        there: the other.
        against: name of the other.

    Raises:
        CalibrationError: for other encoders, boundaries or estimators, or fewer than two images of one.
    """
    _check_same_measures(here, there, against)
    shifts = {
        estimator: _shifts(by_name, there.ranks[estimator], here.images, there.images)
        for estimator, by_name in here.ranks.items()
    }
    estimator = config.pruning.encode.rank_estimator
    certain = sum(shift.certain for row in shifts[estimator].values() for shift in row)
    total = sum(len(row) for row in shifts[estimator].values())
    found = f"{certain} of {total} expected {estimator} ranks differ for certain"
    if not config.pruning.encode.enabled:
        verdict: Verdict = "ranks_only" if certain else "same"
        reason = f"{found}; stage 1 is off, so no budget hangs on them"
        return Drift(against, there.images, verdict, reason, None, None, shifts, there)
    mine, budgets = (budgets_of(config, report.expected(estimator)) for report in (here, there))
    moved = max(abs(a - b) for name in mine for a, b in zip(mine[name], budgets[name], strict=True))
    verdict, meaning = _judge(bool(certain), moved)
    reason = f"{found}, and budgets would move by up to {moved} tokens: {meaning}"
    return Drift(against, there.images, verdict, reason, moved, budgets, shifts, there)


def _judge(certain: bool, moved: int) -> tuple[Verdict, str]:
    if moved > TOKEN_TOLERANCE:
        if certain:
            return "drift", "calibrate on data like the other, or on a mixture"
        return "undecided", "chance may explain it; measure more images of both"
    if certain:
        return "ranks_only", "the budgets hold"
    return "same", "nothing to do"


def _shifts(
    here: Mapping[str, Sequence[Any]], there: Mapping[str, Sequence[Any]], images: int, others: int
) -> dict[str, tuple[Shift, ...]]:
    family = 1 - (1 - CONFIDENCE) / sum(len(items) for items in here.values())

    def shift(mine: Any, other: Any) -> Shift:
        first, second = (mine.mean, mine.std, images), (other.mean, other.std, others)
        own: Difference = welch(first, second)
        return Shift(own.value, own.low, own.high, welch(first, second, family).certain)

    return {
        name: tuple(shift(mine, other) for mine, other in zip(items, there[name], strict=True))
        for name, items in here.items()
    }


def _check_same_measures(here: RankReport, there: RankReport, against: str) -> None:
    def shape(report: RankReport) -> dict[str, dict[str, int]]:
        return {e: {name: len(items) for name, items in by_name.items()} for e, by_name in report.ranks.items()}

    if shape(here) != shape(there):
        raise CalibrationError(
            f"{against} has ranks of {shape(there)} (estimator -> encoder -> boundaries), this model of {shape(here)}: "
            "compare datasets on one model"
        )
    for report, name in ((here, "this dataset"), (there, against)):
        if report.images < 2:
            raise CalibrationError(f"{name} has {report.images} measured image: drift needs at least 2")
