"""The quick half of `make chaos`: faults into trainings on one real stack, compared with one undisturbed training."""

from collections.abc import Iterator

import pytest

from benchmarks.chaos.bench import Bench, choose, open_bench
from benchmarks.chaos.scenarios import BY_NAME, UNDISTURBED

pytestmark = pytest.mark.stack
QUICK = ("store-mixed",)
SLOW = ("kill-worker", "kill-driver", "replaced-shard")


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """SeaweedFS behind the fault proxy, Ray, and the undisturbed training."""
    with open_bench(choose([*QUICK, *SLOW]), seed=1) as opened:
        row = opened.play(BY_NAME[UNDISTURBED])
        assert row["wrong"] == []
        assert row["samples_dropped"] == 4
        yield opened


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_nothing_is_lost_repeated_or_changed(bench: Bench, name: str) -> None:
    row = bench.play(BY_NAME[name])
    assert row["wrong"] == [], row["note"]
    assert row["faults_injected"] > 0
    assert (row["samples_lost"], row["samples_repeated"]) == (0, {"0": 0, "1": 0})
    assert row["max_loss_difference"] == 0.0
    assert row["losses"] == [bench.reference.losses[step] for step in range(1, 16)]  # type: ignore[union-attr]


def test_an_unknown_scenario_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'kill-wrker'.*kill-worker"):
        choose(["kill-wrker"])
