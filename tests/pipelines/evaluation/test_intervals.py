"""Intervals cover what they say, over questions that share images, for sparse and for skewed differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from pipelines.evaluation.intervals import (
    FEWEST_GROUPS,
    UNKNOWN,
    Groups,
    Interval,
    Verdict,
    difference,
    equivalent,
    holm,
    level,
    mean,
    means,
    non_inferiority,
    paired_share,
    share,
    sign_flip,
    smallest_visible,
)

Draw = tuple[np.ndarray, np.ndarray]
COVERED = (0.93, 0.97)


def grouped(questions: int, largest: int, alike: float, random: np.random.Generator) -> Draw:
    """Uniform numbers of questions in groups of 1 to `largest`, and their groups; `alike` correlates a group."""
    sizes = random.integers(1, largest + 1, size=questions)
    groups = np.repeat(np.arange(questions), sizes)[:questions]
    common = random.normal(size=questions)[groups]
    latent = np.sqrt(alike) * common + np.sqrt(1 - alike) * random.normal(size=questions)
    return stats.norm.cdf(latent), groups


def repeatedly(
    questions: int,
    largest: int,
    alike: float,
    repetitions: int,
    random: np.random.Generator,
    groups: np.ndarray | None = None,
) -> Draw:
    """As `grouped`, [questions, repetitions] in the same groups."""
    if groups is None:
        groups = np.repeat(np.arange(questions), random.integers(1, largest + 1, size=questions))[:questions]
    common, own = random.normal(size=(2, questions, repetitions))
    return stats.norm.cdf(np.sqrt(alike) * common[groups] + np.sqrt(1 - alike) * own), groups


def coverage(interval: Callable[[np.ndarray, list[int]], Interval], truth: float, draws: list[Draw]) -> float:
    """Share of the draws whose interval holds the truth."""
    found = [interval(values, groups.tolist()) for values, groups in draws]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


def within(measured: float, repetitions: int, low: float = COVERED[0], high: float = COVERED[1]) -> bool:
    """Whether a measured coverage agrees with the stated range, two standard errors of the simulation aside."""
    error = 2 * np.sqrt(0.05 * 0.95 / repetitions)
    return bool(low - error <= measured <= high + error)


CELLS = [(64, 1, 0.0), (64, 4, 0.5), (256, 1, 0.0), (256, 8, 0.5), (1024, 4, 0.3), (1024, 8, 0.5)]


@pytest.mark.parametrize("accuracy", [0.6, 0.9])
@pytest.mark.parametrize("cell", CELLS)
def test_share_covers(cell: tuple[int, int, float], accuracy: float) -> None:
    random = np.random.default_rng(1)
    draws = [(values < accuracy, groups) for values, groups in (grouped(*cell, random) for _ in range(600))]
    assert within(coverage(share, accuracy, draws), 600)


@pytest.mark.parametrize("flips", [0.02, 0.06, 0.2])
@pytest.mark.parametrize("cell", CELLS)
def test_paired_share_covers_sparse_changes(cell: tuple[int, int, float], flips: float) -> None:
    random = np.random.default_rng(2)
    lost, gained = 0.7 * flips, 0.3 * flips

    def change(uniform: np.ndarray) -> np.ndarray:
        return np.where(uniform < lost, -1.0, np.where(uniform > 1 - gained, 1.0, 0.0))

    draws = [(change(values), groups) for values, groups in (grouped(*cell, random) for _ in range(400))]
    # Below a dozen changes their number is so coarse that no interval can cover 95 %: it may only cover more.
    high = COVERED[1] if flips * cell[0] > 12 else 1.0
    assert within(coverage(paired_share, gained - lost, draws), 400, high=high)


SIZES = [(64, 1, 0.0), (64, 4, 0.5), (256, 1, 0.0), (256, 2, 0.5), (256, 8, 0.5), (1024, 1, 0.0), (1024, 8, 0.5)]
SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "skewed": lambda uniform: -np.log1p(-uniform) / 10,  # mean 0.1, never a gain
    "both signs": lambda uniform: stats.laplace.ppf(uniform, loc=0.1, scale=0.3),
}
MEAN_OF_SHAPE = 0.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("cell", "changed"),
    # Without those in which fewer than FEWEST_GROUPS groups differ: they say too little (docs/LOG.md).
    [(cell, changed) for cell in SIZES for changed in (0.05, 0.2, 1.0) if cell[0] > 64 or changed > 0.05],
)
def test_mean_covers_sparse_and_skewed_differences(cell: tuple[int, int, float], shape: str, changed: float) -> None:
    """NLL of two models that keep the same tokens for most questions: a share of `changed` has another one."""
    repetitions, random = 300, np.random.default_rng(3)
    uniform, groups = repeatedly(*cell, repetitions, random)
    where, _ = repeatedly(*cell, repetitions, random, groups)
    values = np.where(where < changed, SHAPES[shape](uniform), 0.0)
    differing = np.mean([len(set(groups[column != 0])) for column in values.T])
    assert differing >= FEWEST_GROUPS - 2
    found = means(values, groups.tolist())
    covered = float(np.mean([one.low <= changed * MEAN_OF_SHAPE <= one.high for one in found]))
    # Of a few dozen changes the wider of two intervals may cover more.
    assert within(covered, repetitions, high=COVERED[1] if differing > 40 else 1.0)


def test_means_of_several_are_those_of_each() -> None:
    random = np.random.default_rng(12)
    values = np.where(random.random((90, 4)) < [0.02, 0.3, 1.0, 0.0], random.exponential(size=(90, 4)), 0.0)
    groups = random.integers(0, 40, size=90).tolist()
    together = means(values, groups)
    for one, column in zip(together, values.T, strict=True):
        alone = mean(column, groups)
        assert (one.low, one.high) == pytest.approx((alone.low, alone.high))
    assert together[3] == Interval(0.0, 0.0)


def test_questions_of_one_image_are_not_independent() -> None:
    random = np.random.default_rng(4)
    draws = [(values < 0.6, groups) for values, groups in (grouped(256, 8, 0.5, random) for _ in range(400))]
    ignored = coverage(lambda values, groups: share(values), 0.6, draws)
    assert ignored < 0.88, "this simulation must show the fault that groups mend"
    assert within(coverage(share, 0.6, draws), 400)


def test_single_questions_are_wilson_and_tango() -> None:
    right = np.array([True] * 37 + [False] * 11)
    expected = stats.binomtest(37, 48).proportion_ci(0.95, method="wilson")
    found = share(right)
    size = Groups.of(right, None).effective(37 / 48 * 11 / 48)
    assert size == pytest.approx(47)  # the variance has G / (G - 1)
    assert found.low == pytest.approx(expected.low, abs=2e-3)
    assert found.high == pytest.approx(expected.high, abs=2e-3)
    # Without any change Tango's ends are z^2 / (n + z^2).
    nothing = paired_share(np.zeros(50))
    assert nothing.high == pytest.approx(3.8414588 / (50 + 3.8414588), abs=1e-6)
    assert nothing.low == pytest.approx(-nothing.high)


def test_paired_share_is_antisymmetric_and_mean_shifts() -> None:
    random = np.random.default_rng(5)
    change = random.choice([-1.0, 0.0, 0.0, 0.0, 1.0, 1.0], size=90)
    groups = random.integers(0, 30, size=90).tolist()
    there, back = paired_share(change, groups), paired_share(-change, groups)
    assert there.low == pytest.approx(-back.high)
    assert there.high == pytest.approx(-back.low)
    values = random.exponential(size=90)
    one, other = mean(values, groups), mean(values + 3, groups)
    assert other.low == pytest.approx(one.low + 3)
    assert other.high == pytest.approx(one.high + 3)


def random_values() -> np.ndarray:
    return np.random.default_rng(10).exponential(size=64)


def test_few_groups_that_differ_give_a_wide_interval() -> None:
    sparse = np.zeros(64)
    sparse[:5] = [0.1, 0.2, 0.4, 2.0, 0.3]
    few = mean(sparse)
    assert few.low < 0 < few.high, "five groups that differ say no sign"
    assert few.high - few.low > 1.3 * 2 * 1.96 * Groups.of(sparse, None).error
    assert mean(np.full(64, 0.25)) == Interval(0.25, 0.25)
    shifted = random_values() + 0.1 - random_values()
    assert len(set(shifted.tolist())) > 1, "equal but for rounding"
    assert mean(shifted).low == pytest.approx(0.1)
    assert mean(np.array([0.5])) == mean(np.arange(4.0), ["a"] * 4) == UNKNOWN
    assert UNKNOWN.beside(0.5, "+") == "+0.5000 [unknown]"
    with pytest.raises(ValueError, match="no question was answered"):
        share(np.array([]))
    with pytest.raises(ValueError, match="3 values have 2 groups"):
        mean(np.zeros(3), ["a", "b"])


def test_sign_flip_rejects_at_its_level_over_groups() -> None:
    random = np.random.default_rng(6)
    null = [
        sign_flip(values - 0.5, groups.tolist()) for values, groups in (grouped(64, 4, 0.5, random) for _ in range(300))
    ]
    assert np.mean(np.array(null) <= 0.05) < 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)
    assert sign_flip(random.normal(0.8, 1, size=64)) < 0.01
    assert sign_flip(np.zeros(10)) == 1.0


def test_holm_as_published() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_verdicts_at_a_margin() -> None:
    assert non_inferiority(Interval(-0.005, 0.02), 0.01, larger_is_better=True) is Verdict.NON_INFERIOR
    assert non_inferiority(Interval(0.005, 0.02), 0.01, larger_is_better=True) is Verdict.BETTER
    assert non_inferiority(Interval(-0.02, -0.005), 0.01, larger_is_better=False) is Verdict.BETTER
    assert non_inferiority(Interval(-0.05, -0.02), 0.01, larger_is_better=True) is Verdict.INFERIOR
    assert non_inferiority(Interval(-0.05, 0.02), 0.01, larger_is_better=True) is Verdict.UNDECIDED
    assert non_inferiority(Interval(-0.05, 0.02), 0.03, larger_is_better=False) is Verdict.NON_INFERIOR
    assert non_inferiority(Interval(0.05, 0.09), 0.03, larger_is_better=False) is Verdict.INFERIOR
    assert non_inferiority(UNKNOWN, 0.03, larger_is_better=False) is Verdict.UNDECIDED
    with pytest.raises(ValueError, match="margin"):
        non_inferiority(Interval(0, 0), 0.0, larger_is_better=True)
    assert equivalent(Interval(0.96, 1.04), 0.95, 1.05)
    assert not equivalent(UNKNOWN, 0.95, 1.05)


def test_smallest_visible_difference_is_seen_in_four_of_five_cases() -> None:
    random = np.random.default_rng(7)
    shift = smallest_visible(mean(random.normal(size=2000))) * np.sqrt(2000 / 256)
    seen = sum(interval.low > 0 for interval in means(random.normal(shift, 1, size=(256, 200))))
    assert 0.72 < seen / 200 < 0.88
    assert smallest_visible(paired_share(np.zeros(50))) > 0.1, "where nothing flipped, little is visible"
    assert smallest_visible(UNKNOWN) == UNKNOWN.high


def test_the_rule_of_a_measure_is_by_its_values() -> None:
    random = np.random.default_rng(8)
    groups = random.integers(0, 40, size=120).tolist()
    right, other = random.integers(0, 2, size=120), random.integers(0, 2, size=120)
    assert level(right, groups) == share(right, groups)
    assert level(right * 0.5, groups) == mean(right * 0.5, groups)
    found = difference(right, other, groups)
    change = other.astype(float) - right
    assert found.interval == paired_share(change, groups)
    assert found.mean == pytest.approx(change.mean())
    assert found.differing == int((right != other).sum())
    assert found.p_value == sign_flip(change, groups)
    assert difference(right * 0.5, other, groups).interval == mean(other - right * 0.5, groups)


MARGIN = 0.02


def promoted(shift: float, repetitions: int = 250) -> tuple[float, float]:
    """How often a version whose NLL is higher by `shift` passes, and how often it is called better.

    600 questions in groups of 1 to 4; half of them are answered the same, the others differ by 0.1 nats.
    """
    random = np.random.default_rng(9)
    latent, groups = repeatedly(600, 4, 0.5, repetitions, random)
    changes = np.where(random.random(latent.shape) < 0.5, 0.1 * stats.norm.ppf(latent), 0.0)
    found = means(changes + shift, groups.tolist())
    verdicts = [non_inferiority(interval, MARGIN, larger_is_better=False) for interval in found]
    passed = [verdict in (Verdict.NON_INFERIOR, Verdict.BETTER) for verdict in verdicts]
    return float(np.mean(passed)), float(np.mean([verdict is Verdict.BETTER for verdict in verdicts]))


@pytest.mark.parametrize(
    ("shift", "least_passed", "most_passed", "least_better", "most_better"),
    [
        (MARGIN, 0.0, 0.045, 0.0, 0.0),  # worse by the margin: 2.5 %, two standard errors of the simulation aside
        (0.0, 0.9, 1.0, 0.0, 0.045),  # equal
        (-MARGIN, 1.0, 1.0, 0.9, 1.0),  # better
    ],
)
def test_a_worse_version_is_refused_an_equal_one_passes_a_better_one_wins(
    shift: float, least_passed: float, most_passed: float, least_better: float, most_better: float
) -> None:
    passed, better = promoted(shift)
    assert least_passed <= passed <= most_passed
    assert least_better <= better <= most_better
