"""Moments that merge, intervals, sufficient numbers of images, and what budgets make of uncertain ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.calibration.image_plan import CalibrationError
from pipelines.calibration.ranks import (
    RankReport,
    as_rows,
    budget_range,
    budgets_of,
    measures_of,
    rank_statistic,
    report_budgets,
)
from pipelines.calibration.statistics import RunningStatistics, half_width, sufficient_count, welch
from tests.meteor_model.builders import DENSE, PRUNED, config, model, pixels


@given(st.integers(1, 40), st.integers(0, 2**31), st.lists(st.integers(1, 39), max_size=5))
@settings(max_examples=60, deadline=None)
def test_parts_merge_to_the_moments_of_the_whole(count: int, seed: int, cuts: list[int]) -> None:
    values = np.random.default_rng(seed).normal(300.0, 4.0, (count, 3))
    edges = sorted({0, count, *(cut for cut in cuts if cut < count)})
    parts = [RunningStatistics.of(values[a:b]) for a, b in pairwise(edges)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merged(part)
    whole = RunningStatistics.of(values)
    assert merged.count == count
    assert np.allclose(merged.mean_K, values.mean(axis=0), rtol=1e-13)
    assert np.allclose(merged.squares_K, whole.squares_K, rtol=1e-9, atol=1e-9)
    if count > 1:
        assert np.allclose(merged.std_K, values.std(axis=0, ddof=1), rtol=1e-9)
    else:
        assert not merged.std_K.any()


def test_moments_of_nothing_or_of_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="need rows"):
        RunningStatistics.of(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="1 of 4 values are not finite"):
        RunningStatistics.of(np.array([[1.0, 2.0], [np.nan, 3.0]]))
    with pytest.raises(ValueError, match="2 and of 3 measures"):
        RunningStatistics.of(np.ones((2, 2))).merged(RunningStatistics.of(np.ones((2, 3))))


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    rng, inside = np.random.default_rng(0), 0
    for _ in range(2000):
        moments = RunningStatistics.of(rng.normal(50.0, 9.0, (12, 1)))
        inside += abs(float(moments.mean_K[0]) - 50.0) <= half_width(float(moments.std_K[0]), 12)
    assert 0.935 <= inside / 2000 <= 0.965


def test_the_sufficient_number_is_the_first_whose_interval_is_narrow_enough() -> None:
    enough = sufficient_count(10.0, 1.0)
    assert enough is not None
    assert half_width(10.0, enough) <= 1.0 < half_width(10.0, enough - 1)
    assert enough == pytest.approx(1.96**2 * 100, rel=0.02)
    assert sufficient_count(0.0, 0.1) == 2
    assert sufficient_count(1.0, 0.0) is None
    assert half_width(3.0, 1) == math.inf


def test_welch_agrees_with_scipy() -> None:
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(1)
    a, b = rng.normal(10, 1, 30), rng.normal(10.9, 3, 11)
    found = welch((a.mean(), a.std(ddof=1), 30), (b.mean(), b.std(ddof=1), 11))
    reference = ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert not welch((1.0, 1.0, 5), (1.5, 1.0, 5)).certain
    assert welch((1.0, 0.0, 5), (1.5, 0.0, 5)).certain
    with pytest.raises(ValueError, match="1 and 5 images"):
        welch((1.0, 0.0, 1), (1.0, 0.0, 5))


def test_measures_are_in_the_order_of_the_rows() -> None:
    built = model()
    measures = measures_of(built.config)
    measured = built.measure_ranks(pixels(3), ("numerical", "energy", "effective"))
    rows = as_rows(measured)
    assert rows.shape == (3, len(measures)) == (3, 3 * (3 + 3 + 1))
    for column, (estimator, name, boundary) in enumerate(measures):
        assert np.array_equal(rows[:, column], measured[estimator][name][:, boundary])


REPORT = RankReport(
    images=40,
    skipped={},
    text_only=0,
    ranks={
        "effective": {
            "clip": tuple(rank_statistic(mean, 4.0, 40) for mean in (30.0, 24.0, 20.0)),
            "pix2struct": tuple(rank_statistic(mean, 2.0, 40) for mean in (15.0, 20.0, 20.0)),
            "convnext": (rank_statistic(30.0, 9.0, 40),),
        }
    },
)


def test_budgets_come_from_the_configuration_and_leave_it_alone() -> None:
    built = config(PRUNED)
    before = built.encode_budgets
    budgets = budgets_of(built, REPORT.expected("effective"))
    assert budgets["clip"][0] == 64
    assert [sum(row[i] for row in budgets.values() if len(row) == 3) for i in range(2)] == [96, 64]
    assert sum(row[-1] for row in budgets.values()) == 60
    assert built.ranks is None
    assert built.encode_budgets == before


def test_images_are_enough_when_budgets_stay_within_a_token() -> None:
    built = config(PRUNED)
    report = report_budgets(built, REPORT, "effective")
    assert report is not None
    assert report.images_enough is not None
    means, spreads = REPORT.expected("effective"), REPORT.spread("effective")

    def moves(images: int) -> int:
        low, high = budget_range(built, means, spreads, images)
        return max(
            max(most - budget, budget - least)
            for name, row in report.budgets.items()
            for budget, least, most in zip(row, low[name], high[name], strict=True)
        )

    assert moves(report.images_enough) <= 1 < moves(report.images_enough - 1)
    assert moves(40) > moves(40_000)
    for name, row in report.budgets.items():
        assert all(a <= b <= c for a, b, c in zip(report.lowest[name], row, report.highest[name], strict=True))


def test_one_image_and_a_model_without_stage_1_know_nothing() -> None:
    assert report_budgets(config(DENSE), REPORT, "effective") is None
    single = replace(REPORT, images=1)
    report = report_budgets(config(PRUNED), single, "effective")
    assert report is not None
    assert report.images_enough is None
    assert rank_statistic(3.0, 0.0, 1).low is None


def test_a_report_survives_its_file_and_an_older_one_is_read() -> None:
    assert RankReport.from_dict(REPORT.to_dict(), "here") == REPORT
    old = {"images": 40, "skipped": {}, "ranks": {"effective": {"clip": [{"mean": 30.0, "std": 4.0}]}}}
    assert RankReport.from_dict(old, "here").ranks["effective"]["clip"][0] == REPORT.ranks["effective"]["clip"][0]
    with pytest.raises(CalibrationError, match=r"old\.json holds no ranks"):
        RankReport.from_dict({"images": 3}, "old.json")
