"""Mean and spread of numbers that arrive in parts: running statistics, and the intervals that they give.

A part is a count, a mean and the sum of squared deviations from that mean. Parts merge exactly (Chan, Golub & LeVeque,
1979; for one number at a time it is Welford's update), so that workers keep sums and never the numbers themselves.

All intervals are 95 % and Student's: the mean of n numbers of standard deviation s is uncertain by t_{n-1} s / sqrt(n).

Legend: M numbers of a part, K measures side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.95
MOST_IMAGES = 10**9
"""Where the search for a sufficient number ends."""


@dataclass(frozen=True)
class RunningStatistics:
    """Count, mean and sum of squared deviations of K measures.

    Attributes:
        count: numbers of each measure.
        mean_K: float64.
        squares_K: float64, sum over the numbers of (x - mean)^2.
    """

    count: int
    mean_K: np.ndarray
    squares_K: np.ndarray

    @classmethod
    def of(cls, values_MK: np.ndarray) -> RunningStatistics:
        """The statistics of M >= 1 rows. Raises ValueError for none, and for values that are not finite."""
        values_MK = np.asarray(values_MK, dtype=np.float64)
        if values_MK.ndim != 2 or not len(values_MK):
            raise ValueError(f"statistics need rows of measures, got an array of shape {values_MK.shape}")
        if not np.isfinite(values_MK).all():
            raise ValueError(f"{int((~np.isfinite(values_MK)).sum())} of {values_MK.size} values are not finite")
        mean_K = values_MK.mean(axis=0)
        return cls(len(values_MK), mean_K, np.square(values_MK - mean_K).sum(axis=0))

    def merged(self, other: RunningStatistics) -> RunningStatistics:
        """The statistics of both parts together. Raises ValueError where they are of different measures."""
        if self.mean_K.shape != other.mean_K.shape:
            raise ValueError(f"statistics of {len(self.mean_K)} and of {len(other.mean_K)} measures do not merge")
        count = self.count + other.count
        difference_K = other.mean_K - self.mean_K
        mean_K = self.mean_K + difference_K * (other.count / count)
        between_K = np.square(difference_K) * (self.count * other.count / count)
        return RunningStatistics(count, mean_K, self.squares_K + other.squares_K + between_K)

    @property
    def std_K(self) -> np.ndarray:
        """Sample standard deviation; 0 for one number, of which nothing is known."""
        return np.sqrt(self.squares_K / max(1, self.count - 1))


def half_width(std: float, count: int, confidence: float = CONFIDENCE) -> float:
    """How far the mean of `count` numbers may be off; infinite for one number, also where the spread is unknown."""
    if count < 2:
        return math.inf
    return _quantile(count - 1, confidence) * std / math.sqrt(count)


def sufficient_count(std: float, wanted: float) -> int | None:
    """Smallest number (at least 2) whose `half_width` is at most `wanted`; None for a wanted width of 0 or less.

    The spread is taken as known and equal for other numbers of images.
    """
    if std == 0:
        return 2
    if wanted <= 0:
        return None
    return smallest(lambda count: half_width(std, count) <= wanted)


def smallest(holds: Callable[[int], bool]) -> int | None:
    """The smallest count from 2 on that `holds`, which stays true once it is; None where MOST_IMAGES are too few."""
    high = 2
    while not holds(high):
        if high >= MOST_IMAGES:
            return None
        high *= 2
    low = high // 2  # too few, or below 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class Difference:
    """Mean of a second sample minus that of a first, with the ends of its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def welch(
    first: tuple[float, float, int], second: tuple[float, float, int], confidence: float = CONFIDENCE
) -> Difference:
    """The difference of two means of samples with different spreads (Welch, 1947).

    Args:
        first: mean, standard deviation, count.
        second: the same of the other sample.
        confidence: of the interval.

    Raises ValueError for a sample of fewer than two numbers: its spread is not known.
    """
    (mean_a, std_a, count_a), (mean_b, std_b, count_b) = first, second
    if min(count_a, count_b) < 2:
        raise ValueError(f"means of {count_a} and {count_b} images cannot be compared: two of each are needed")
    error_a, error_b = std_a**2 / count_a, std_b**2 / count_b
    value, error = mean_b - mean_a, error_a + error_b
    if error == 0:
        return Difference(value, value, value)
    freedom = error**2 / (error_a**2 / (count_a - 1) + error_b**2 / (count_b - 1))
    width = _quantile(freedom, confidence) * math.sqrt(error)
    return Difference(value, value - width, value + width)


@lru_cache(maxsize=10_000)
def _quantile(freedom: float, confidence: float) -> float:
    """Two-sided quantile of Student's t."""
    return float(student.ppf(0.5 + confidence / 2, freedom))
