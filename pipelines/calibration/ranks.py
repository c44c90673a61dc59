"""Expected ranks of feature maps: statistics over images, and what they decide.

1. measures    every estimator at every boundary of every encoder, in one order: a row of numbers per image
2. statistics  mean, spread, interval and sufficient number of images for each of them
3. budgets     what the means decide (`MeteorConfig.encode_budgets`), and what they could within their intervals

Legend: M images, K measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.encoders import encoder_class
from meteor_model.foreign import foreign
from meteor_model.pruners.spectra import RANK_ESTIMATORS
from pipelines.calibration.image_plan import CalibrationError
from pipelines.calibration.settings import RELATIVE_TOLERANCE
from pipelines.calibration.statistics import RunningStatistics, half_width, smallest, sufficient_count

TOKEN_TOLERANCE = 1
"""Tokens by which a budget may move within the intervals when images are enough."""
ESTIMATORS = tuple(RANK_ESTIMATORS)

Measure = tuple[str, str, int]
"""Estimator, encoder, boundary (counted from 0)."""
Ranks = Mapping[str, Sequence[float]]
"""Encoder -> one number per boundary."""


# ------------------------------------------------------------------------------------------------------------ measures


def measures_of(config: MeteorConfig) -> tuple[Measure, ...]:
    """What is measured on a model.

    An encoder that is pruned at its output alone has one boundary, as has every encoder of a model without totals.
    """
    segments = len(config.pruning.encode.totals) or 1
    return tuple(
        (estimator, item.name, boundary)
        for estimator in ESTIMATORS
        for item in config.encoders
        for boundary in range(segments if encoder_class(item.family).prunes_between_blocks else 1)
    )


def as_rows(measured: Mapping[str, Mapping[str, np.ndarray]]) -> np.ndarray:
    """(M, K) float64 in the order of `measures_of`.

    From what `MeteorForConditionalGeneration.measure_ranks` gives for ESTIMATORS.
    """
    parts = [measured[estimator][name] for estimator in ESTIMATORS for name in measured[estimator]]
    return np.concatenate(parts, axis=1).astype(np.float64)


# ----------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class RankStatistic:
    """Rank of one encoder's feature map at one boundary, over images.

    Attributes:
        mean: the expected rank.
        std: over images (sample standard deviation).
        cv: coefficient of variation, std / mean; None for a mean of 0.
        low: lower end of the 95 % interval of the mean; None for one image.
        high: upper end.
        images_enough: smallest number of images whose interval has a half width of at most the relative tolerance times
            the mean, if the spread is what was measured.
    """

    mean: float
    std: float
    cv: float | None = None
    low: float | None = None
    high: float | None = None
    images_enough: int | None = None


def rank_statistic(mean: float, std: float, images: int, tolerance: float = RELATIVE_TOLERANCE) -> RankStatistic:
    """The statistic of ranks with this mean and spread."""
    width = half_width(std, images)
    known = math.isfinite(width)
    return RankStatistic(
        mean,
        std,
        std / mean if mean > 0 and known else None,
        mean - width if known else None,
        mean + width if known else None,
        sufficient_count(std, tolerance * mean) if known else None,
    )


@dataclass(frozen=True)
class RankReport:
    """What was measured on the images of one dataset.

    Attributes:
        images: how many images.
        skipped: samples before the last image whose image cannot be used, by reason.
        text_only: samples before it that have none.
        ranks: estimator -> encoder -> one statistic per boundary.
    """

    images: int
    skipped: dict[str, int]
    text_only: int
    ranks: dict[str, dict[str, tuple[RankStatistic, ...]]]

    @classmethod
    def of(
        cls,
        measured: RunningStatistics,
        measures: Sequence[Measure],
        skipped: Mapping[str, int],
        text_only: int = 0,
        tolerance: float = RELATIVE_TOLERANCE,
    ) -> RankReport:
        """From statistics in the order of `measures_of`."""
        ranks: dict[str, dict[str, list[RankStatistic]]] = {}
        for (estimator, name, _), mean, std in zip(measures, measured.mean_K, measured.std_K, strict=True):
            statistic = rank_statistic(float(mean), float(std), measured.count, tolerance)
            ranks.setdefault(estimator, {}).setdefault(name, []).append(statistic)
        frozen = {e: {name: tuple(items) for name, items in by_name.items()} for e, by_name in ranks.items()}
        return cls(measured.count, dict(skipped), text_only, frozen)

    def expected(self, estimator: str) -> dict[str, list[float]]:
        """Mean rank of each encoder at each boundary: `MeteorConfig.ranks`."""
        return self._numbers(estimator, lambda item: item.mean)

    def spread(self, estimator: str) -> dict[str, list[float]]:
        """Standard deviation over images, likewise."""
        return self._numbers(estimator, lambda item: item.std)

    def _numbers(self, estimator: str, read: Callable[[RankStatistic], float]) -> dict[str, list[float]]:
        return {name: [read(item) for item in items] for name, items in self.ranks[estimator].items()}

    def to_dict(self) -> dict[str, Any]:
        """`ranks.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> RankReport:
        """From `to_dict`, also from a `ranks.json` that holds nothing but means and spreads.

        Raises:
            CalibrationError: naming `where`.
        """
        with foreign(lambda what: CalibrationError(f"{where} holds no ranks ({what}): calibrate anew")):
            ranks = {
                estimator: {
                    name: tuple(rank_statistic(float(i["mean"]), float(i["std"]), int(data["images"])) for i in items)
                    for name, items in by_name.items()
                }
                for estimator, by_name in data["ranks"].items()
            }
            return cls(int(data["images"]), dict(data.get("skipped", {})), int(data.get("text_only", 0)), ranks)


# ------------------------------------------------------------------------------------------------------------- budgets


def budgets_of(config: MeteorConfig, ranks: Ranks) -> dict[str, tuple[int, ...]]:
    """Tokens that each encoder keeps at each boundary under these ranks. Raises ValueError where they do not fit."""
    decode = replace(config.pruning.decode, lam=None)  # that of other budgets
    return config.with_pruning(replace(config.pruning, decode=decode), ranks).encode_budgets


@dataclass(frozen=True)
class BudgetReport:
    """What one estimator's ranks decide.

    Attributes:
        estimator: of the ranks.
        budgets: under the mean ranks.
        lowest: fewest tokens under any ranks within the intervals (`budget_range`).
        highest: most tokens likewise.
        images_enough: smallest number of images under whose intervals no budget moves by more than TOKEN_TOLERANCE;
            None where no number is, or nothing is known.
    """

    estimator: str
    budgets: dict[str, tuple[int, ...]]
    lowest: dict[str, tuple[int, ...]]
    highest: dict[str, tuple[int, ...]]
    images_enough: int | None


def report_budgets(config: MeteorConfig, report: RankReport, estimator: str) -> BudgetReport | None:
    """Budgets and how certain they are; None for a model whose stage 1 is off, or ranks of 0 that share nothing."""
    if not config.pruning.encode.enabled:
        return None
    means, spreads = report.expected(estimator), report.spread(estimator)
    try:
        budgets = budgets_of(config, means)
    except ValueError:
        return None
    if report.images < 2:
        return BudgetReport(estimator, budgets, budgets, budgets, None)
    lowest, highest = budget_range(config, means, spreads, report.images)

    def enough(images: int) -> bool:
        low, high = budget_range(config, means, spreads, images)
        return all(
            most - TOKEN_TOLERANCE <= budget <= least + TOKEN_TOLERANCE
            for name, row in budgets.items()
            for budget, least, most in zip(row, low[name], high[name], strict=True)
        )

    return BudgetReport(estimator, budgets, lowest, highest, smallest(enough))


def budget_range(
    config: MeteorConfig, means: Ranks, spreads: Ranks, images: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Fewest and most tokens where each encoder's ranks lie at either end of their intervals, every combination.

    All boundaries of an encoder lie at the same end. A share grows with the encoder's own rank and falls with the
    others' (the other way round for a negative exponent), so its extremes are among the combinations; rounding and
    capacities keep it there to within a token.
    """
    names = list(means)
    rows = []
    for signs in product((-1, 1), repeat=len(names)):
        ranks = {
            name: [
                max(mean + sign * half_width(std, images), 1e-6 * mean)
                for mean, std in zip(means[name], spreads[name], strict=True)
            ]
            for name, sign in zip(names, signs, strict=True)
        }
        rows.append(budgets_of(config, ranks))
    return _each(rows, min), _each(rows, max)


def _each(rows: Sequence[Mapping[str, Sequence[int]]], choose: Callable[[Iterable[int]], int]) -> dict[str, Any]:
    return {
        name: tuple(choose(column) for column in zip(*(row[name] for row in rows), strict=True)) for name in rows[0]
    }
