"""Intervals, tests and verdicts over questions that come in groups: questions of one image are no independent draws.

Every function takes one value a question and the question's group, and treats the group as the sampled unit
(E. Miller, "Adding Error Bars to Evals", arXiv 2411.00640). Without groups every question is its own.

    level           one model's measure          `share` where all values are 0 or 1, else `mean`
    difference      second - first, paired       `paired_share` where all values are 0 or 1, else `mean`

    share           one model's accuracy         Wilson's score interval at the effective sample size
    mean            one model's or a paired mean  wider of a studentised bootstrap and Student's t, over groups
    paired_share    accuracy, second - first     Tango's score interval at the effective sample size
    sign_flip       p-value of a paired mean     random signs of whole groups, studentised
    holm            p-values of one family       Holm's step-down adjustment

Intervals are 95 %. Their coverage is simulated in tests/pipelines/evaluation/test_intervals.py.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

CONFIDENCE = 0.95
POWER = 0.8
Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
Z_POWER = 0.8416212335729143
"""80 % quantile of the normal distribution."""
RESAMPLES = 2000
FEWEST_GROUPS = 8
"""Over fewer groups that differ a bootstrap says nothing: its ends are anywhere."""
BISECTIONS = 60
ROUNDING = 1e-12
"""Relative spread that comes of rounding alone."""


@dataclass(frozen=True)
class Interval:
    """Ends of a 95 % confidence interval."""

    low: float
    high: float

    def beside(self, value: float, sign: str = "") -> str:
        """The value with its interval, for people: `0.7500 [0.3006, 0.9544]`; `sign` "+" shows a plus, too."""
        if self == UNKNOWN:
            return f"{value:{sign}.4f} [unknown]"
        return f"{value:{sign}.4f} [{self.low:{sign}.4f}, {self.high:{sign}.4f}]"


UNKNOWN = Interval(-sys.float_info.max, sys.float_info.max)
"""What a single group says of a mean. Finite, for JSON and MLflow know no infinity."""


class Verdict(StrEnum):
    """What an interval says of a margin that was stated before."""

    BETTER = "better"
    NON_INFERIOR = "non-inferior"
    INFERIOR = "inferior"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Difference:
    """A paired difference, second minus first, over the questions of one suite.

    Attributes:
        mean: over questions.
        interval: of it, 95 %.
        p_value: two-sided, of "it is 0" (`sign_flip`).
        differing: questions whose two values differ.
        visible: smallest true difference that such a comparison finds in four of five cases.
    """

    mean: float
    interval: Interval
    p_value: float
    differing: int
    visible: float


@dataclass(frozen=True)
class Groups:
    """Sums over the groups of one value a question: all that the linearised variance needs.

    Attributes:
        sums: [G] of the values.
        sizes: [G] questions.
    """

    sums: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, groups: Sequence[Hashable] | None) -> Groups:
        """Add up [n] values by group.

        Raises:
            ValueError: for no value, or another number of groups than of values.
        """
        values = np.asarray(values, dtype=np.float64)
        if not len(values):
            raise ValueError("no question was answered, so there is nothing to give an interval for")
        if groups is None:
            return cls(values, np.ones(len(values)))
        if len(groups) != len(values):
            raise ValueError(f"{len(values)} values have {len(groups)} groups; each question has one")
        numbers: dict[Hashable, int] = {}
        index = np.array([numbers.setdefault(group, len(numbers)) for group in groups])
        return cls(np.bincount(index, values), np.bincount(index).astype(np.float64))

    @property
    def mean(self) -> float:
        """Mean over the questions."""
        return float(self.sums.sum() / self.sizes.sum())

    @property
    def error(self) -> float:
        """Standard error of the mean, linearised over groups (G / (G - 1) corrected); 0 for one group."""
        count = len(self.sums)
        if count < 2:
            return 0.0
        residuals = self.sums - self.mean * self.sizes
        return float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / self.sizes.sum())

    def effective(self, variance: float) -> float:
        """How many independent questions would give this standard error, at most those that were asked.

        Korn and Graubard (Survey Methodology 24, 1998), with their correction for few groups. Where nothing varies,
        the number of groups: nothing is known of how alike the questions of one group are.

        Args:
            variance: of one question's value.
        """
        if len(self.sums) < 2 or variance <= 0 or self.error == 0:
            return float(len(self.sums))
        from scipy import stats  # here: its import costs 0.7 s, and who reads stored scores measures none

        level = (1 + CONFIDENCE) / 2
        asked = self.sizes.sum()
        correction = stats.t.ppf(level, asked - 1) / stats.t.ppf(level, len(self.sums) - 1)
        return float(min(asked, variance / self.error**2 * correction**2))


def level(values: np.ndarray, groups: Sequence[Hashable]) -> Interval:
    """Interval of one model's measure, one value a question."""
    return share(values, groups) if _whole(values, (0.0, 1.0)) else mean(values, groups)


def difference(first: np.ndarray, second: np.ndarray, groups: Sequence[Hashable]) -> Difference:
    """A paired difference with all that is said of it.

    Args:
        first: [n], one value a question.
        second: [n], of the same questions.
        groups: [n] of the questions.
    """
    change = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    whole = _whole(first, (0.0, 1.0)) and _whole(second, (0.0, 1.0))
    interval = paired_share(change, groups) if whole else mean(change, groups)
    return Difference(
        mean=float(change.mean()),
        interval=interval,
        p_value=sign_flip(change, groups),
        differing=int(np.count_nonzero(change)),
        visible=smallest_visible(interval),
    )


def _whole(values: np.ndarray, of: tuple[float, ...]) -> bool:
    return bool(np.isin(np.asarray(values, dtype=np.float64), of).all())


def share(right: np.ndarray, groups: Sequence[Hashable] | None = None) -> Interval:
    """Interval of a share: Wilson's (J. Am. Stat. Assoc. 22, 1927) at the effective sample size.

    Args:
        right: [n] booleans.
        groups: [n] of the questions.
    """
    found = Groups.of(right, groups)
    value = found.mean
    size = found.effective(value * (1 - value))
    middle = (value + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * np.sqrt(value * (1 - value) / size + Z**2 / (4 * size**2))
    return Interval(max(0.0, float(middle - half)), min(1.0, float(middle + half)))


def paired_share(change: np.ndarray, groups: Sequence[Hashable] | None = None) -> Interval:
    """Interval of a paired difference of shares: Tango's (Statistics in Medicine 17, 1998) at the effective size.

    It is right for sparse changes and has a width where nothing changed.

    Args:
        change: [n] of 1 (second right alone), -1 (first right alone), 0 (equal).
        groups: [n] of the questions.
    """
    found = Groups.of(change, groups)
    asked = found.sizes.sum()
    gained, lost = float(np.sum(np.asarray(change) > 0)), float(np.sum(np.asarray(change) < 0))
    size = found.effective((gained + lost) / asked - found.mean**2)
    gained, lost = gained * size / asked, lost * size / asked
    return Interval(-_tango_high(lost, gained, size), _tango_high(gained, lost, size))


def _tango_high(gained: float, lost: float, size: float) -> float:
    """Upper end: the largest difference whose score statistic is at least -Z, by bisection."""
    low, high = (gained - lost) / size, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        # The share of losses that is likeliest under this difference: the root of Tango's quadratic.
        b = -gained - lost + (2 * size - gained + lost) * middle
        losses = (np.sqrt(max(b * b + 8 * size * lost * middle * (1 - middle), 0.0)) - b) / (4 * size)
        deviation = np.sqrt(max(size * (2 * losses + middle * (1 - middle)), 0.0))
        if gained - lost - size * middle >= -Z * deviation:
            low = middle
        else:
            high = middle
    return high


def mean(values: np.ndarray, groups: Sequence[Hashable] | None = None) -> Interval:
    """Interval of a mean: `means` of one."""
    return means(np.asarray(values, dtype=np.float64)[:, None], groups)[0]


def means(values: np.ndarray, groups: Sequence[Hashable] | None = None) -> list[Interval]:
    """Intervals of means over the same questions: each end the wider of two, so that both kinds of data are covered.

    1. studentised bootstrap over groups (B. Efron, R. Tibshirani 1993, ch. 12), fixed seed: right for skewed values,
       too narrow for few changes of both signs
    2. Student's t, one degree of freedom less than groups that differ from the most frequent value: right for few
       changes, too narrow for skewed ones. It stands alone below FEWEST_GROUPS such groups

    Equal values everywhere give an interval without width, a single group UNKNOWN. Below FEWEST_GROUPS groups that
    differ coverage falls (to 84 % at two, in simulation): sizes of changes that were not seen are not known.

    Args:
        values: [n, R], one a question; for a paired comparison, second minus first.
        groups: [n] of the questions.
    """
    columns = [Groups.of(column, groups) for column in values.T]
    if len(columns[0].sums) < 2:
        return [UNKNOWN] * len(columns)
    from scipy import stats  # here: its import costs 0.7 s, and who reads stored scores measures none

    statistics = _bootstrap_statistics(columns, np.random.default_rng(0))
    found = []
    for column, own, largest in zip(columns, statistics.T, np.abs(values).max(axis=0), strict=True):
        if column.error <= ROUNDING * float(largest):
            found.append(Interval(column.mean, column.mean))
            continue
        differing = _differing(column)
        high = float(stats.t.ppf((1 + CONFIDENCE) / 2, max(1, differing - 1)))
        low = -high
        if differing >= FEWEST_GROUPS:
            ends = np.nanquantile(own, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
            low, high = min(low, float(ends[0])), max(high, float(ends[1]))
        found.append(Interval(column.mean - high * column.error, column.mean - low * column.error))
    return found


def _differing(found: Groups) -> int:
    """Groups whose mean is not the most frequent one."""
    _, counts = np.unique(found.sums / found.sizes, return_counts=True)
    return len(found.sums) - int(counts.max()) if counts.max() > 1 else len(found.sums)


def _bootstrap_statistics(columns: Sequence[Groups], random: np.random.Generator) -> np.ndarray:
    """Studentised means of resampled groups: [RESAMPLES, R], NaN where a resample held no spread."""
    sizes, sums = columns[0].sizes[:, None], np.stack([column.sums for column in columns], axis=1)
    count = len(sizes)
    drawn = random.integers(count, size=(RESAMPLES, count)) + count * np.arange(RESAMPLES)[:, None]
    times = np.bincount(drawn.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(np.float64)
    asked = times @ sizes
    drawn_means = times @ sums / asked
    spread = (
        times @ np.square(sums)
        - 2 * drawn_means * (times @ (sums * sizes))
        + np.square(drawn_means) * (times @ np.square(sizes))
    )
    errors = np.sqrt(np.maximum(spread, 0.0) * count / (count - 1)) / asked
    own = np.array([column.error for column in columns])
    middle = np.array([column.mean for column in columns])
    spread_out = errors > 1e-9 * own
    return np.where(spread_out, (drawn_means - middle) / np.where(spread_out, errors, 1.0), np.nan)


def sign_flip(differences: np.ndarray, groups: Sequence[Hashable] | None = None) -> float:
    """Two-sided p-value of "the paired mean is 0": whole groups change sign at random, studentised, fixed seed.

    1 where nothing differs.
    """
    found = Groups.of(differences, groups)
    if not np.any(found.sums):
        return 1.0
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(RESAMPLES, len(found.sums)))
    squares = np.square(found.sums).sum()

    def studentised(total: np.ndarray) -> np.ndarray:
        # The sum of squares does not change with the signs, so this orders like Student's statistic.
        return np.abs(total) / np.sqrt(squares)

    seen = studentised(np.array(found.sums.sum()))
    reached = int(np.sum(studentised(signs @ found.sums) >= seen * (1 - 1e-12)))
    return (reached + 1) / (RESAMPLES + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for one family (S. Holm, Scand. J. Stat. 6, 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(order)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def smallest_visible(interval: Interval) -> float:
    """Smallest true difference that a repetition would call different from 0 in four of five cases.

    (z at 97.5 % + z at 80 %) standard errors, as the interval's width has them: it has one where nothing flipped, too.
    """
    if interval == UNKNOWN:
        return UNKNOWN.high
    return (Z + Z_POWER) / Z * (interval.high - interval.low) / 2


def non_inferiority(interval: Interval, margin: float, *, larger_is_better: bool) -> Verdict:
    """Verdict on second minus first at a margin stated before: one-sided at 2.5 %, the end of the 95 % interval.

    Args:
        interval: of the paired difference.
        margin: positive; the loss that is still accepted, in the unit of the difference.
        larger_is_better: True for accuracy, False for NLL.

    Raises:
        ValueError: for a margin that is not positive.
    """
    if not margin > 0:
        raise ValueError(f"the margin of a non-inferiority test is positive, got {margin}")
    worst, best = (interval.low, interval.high) if larger_is_better else (-interval.high, -interval.low)
    if worst > 0:
        return Verdict.BETTER
    if worst > -margin:
        return Verdict.NON_INFERIOR
    return Verdict.INFERIOR if best < -margin else Verdict.UNDECIDED


def equivalent(interval: Interval, low: float, high: float) -> bool:
    """Whether a value is inside [low, high]: its whole interval is, so less data never makes it easier."""
    return low <= interval.low and interval.high <= high
