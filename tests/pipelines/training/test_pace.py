"""Who is slowest, how far apart, and how long the longest wait for data was."""

import pytest

from pipelines.job.summary import pace_text
from pipelines.training.pace import _added, pace_metrics, slowest, spread


def test_figures_of_workers_of_different_speed() -> None:
    metrics = pace_metrics(data_s=(0.5, 2.0, 0.0), own_s=(8.0, 12.0, 10.0), steps_s=20.0)
    assert metrics == {"workers/slowest": 1.0, "workers/spread": pytest.approx(0.4), "workers/data_wait_share": 0.1}
    assert (slowest((1.0,)), spread((1.0,)), spread((0.0, 0.0))) == (0, 0.0, 0.0)


def test_sums_go_on_and_begin_anew_with_another_number_of_workers() -> None:
    assert _added((), (1.0, 2.0)) == (1.0, 2.0)
    assert _added((1.0, 2.0), (0.5, 0.5)) == (1.5, 2.5)
    assert _added((1.0, 2.0), (0.5,)) == (0.5,)


def test_the_summary_names_the_slowest_and_the_longest_wait_and_older_ones_have_no_line() -> None:
    workers = {"data_seconds": [0.5, 3.0], "own_seconds": [10.0, 10.5]}
    assert pace_text({"workers": workers}) == (
        "slowest worker 1 of 2, 5% behind the quickest; longest wait for data 3.0 s (worker 1)"
    )
    assert pace_text({}) == pace_text({"workers": {"data_seconds": [1.0], "own_seconds": [1.0]}}) == ""
