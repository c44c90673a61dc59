"""Costs of pruners, and the number of tokens that gives a cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.pruners.cost import MEASURES, kept_at_the_end, mean_over_layers, solve_pruner, solve_share, tflops
from meteor_model.pruners.named import PRUNERS, numbers_of, with_pruner
from meteor_model.pruners.spectra import energy_rank, singular_values
from tests.meteor_model.pruners.build import PER_IMAGE, dense_model
from tests.meteor_model.test_pruning import randn

CONFIG = dense_model().config


def test_the_mean_over_layers_is_that_of_the_layers() -> None:
    config = with_pruner(CONFIG, "pyramiddrop", 4)  # after layers 2, 4, 6 of 8: 16, 8, 4
    assert mean_over_layers(config) == (2 * 32 + 2 * 16 + 2 * 8 + 2 * 4) / 8
    assert kept_at_the_end(config) == 4
    assert mean_over_layers(with_pruner(CONFIG, "stride", 5)) == kept_at_the_end(with_pruner(CONFIG, "stride", 5)) == 5


@pytest.mark.parametrize("measure", ["kept", "layer_mean"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("random", {}), ("fastv", {"layer": 3}), ("pyramiddrop", {}), ("vscan", {}), ("smaller_image", {})],
)
def test_no_number_comes_nearer_to_the_target(name: str, settings: dict[str, Any], measure: Any) -> None:
    cost = MEASURES[measure]
    by_number = {keep: cost(with_pruner(CONFIG, name, keep, **settings)) for keep in numbers_of(CONFIG, name)}
    reached = list(by_number.values())
    assert reached == sorted(reached), "cost grows with what is kept"
    for target in (reached[0], (reached[0] + reached[-1]) / 2.1, reached[-1]):
        found = solve_pruner(CONFIG, name, measure, target, **settings)
        assert abs(found.reached - target) == min(abs(value - target) for value in reached)
        assert by_number[found.keep] == found.reached == cost(found.config)


@pytest.mark.parametrize("name", list(PRUNERS))
def test_every_pruner_has_its_flops_counted_and_they_are_fewer(name: str) -> None:
    keep = PER_IMAGE if name == "none" else 8
    spent, dense = tflops(with_pruner(CONFIG, name, keep)), tflops(CONFIG)
    assert spent == dense if name == "none" else spent < dense


def test_two_pruners_meet_at_the_same_tflops() -> None:
    target = tflops(with_pruner(CONFIG, "pyramiddrop", 4))
    found = solve_pruner(CONFIG, "fastv", "tflops", target)
    assert found.reached == pytest.approx(target, rel=0.03)
    assert 1 < found.keep < PER_IMAGE


def test_what_cannot_be_reached_says_what_can() -> None:
    with pytest.raises(ValueError, match=r"'fastv' reaches kept 1 \(keeping 1\) to 32 \(keeping 32\) .* not 40"):
        solve_pruner(CONFIG, "fastv", "kept", 40)
    with pytest.raises(ValueError, match="measure 'tokens' is unknown; known: kept, layer_mean, tflops"):
        solve_pruner(CONFIG, "fastv", "tokens", 4)  # type: ignore[arg-type]
    adaptive = CONFIG.with_pruning(
        type(CONFIG.pruning)(CONFIG.pruning.encode, CONFIG.pruning.fuse, DecodePruning(layer=2, lam=1.0))
    )
    with pytest.raises(ValueError, match="target_mean is not set"):
        kept_at_the_end(adaptive)


@pytest.mark.parametrize("target", [1, 3.4, 7, 10])
def test_a_share_gives_the_mean_that_is_asked_for(target: float) -> None:
    spectra = singular_values(randn(9, 12, 10) * torch.linspace(0.1, 1, 10))
    share = solve_share(spectra, target)
    means = [float(energy_rank(spectra, step / 5000).mean()) for step in range(1, 5001)]
    assert float(energy_rank(spectra, share).mean()) == min(mean for mean in means if mean >= target)
    with pytest.raises(ValueError, match="between 1 and 10"):
        solve_share(spectra, 11)
