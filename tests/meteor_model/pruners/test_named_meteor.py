"""METEOR under its own name is METEOR as its configuration has always been written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.flops import TOTALS, meteor_config
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, PruningConfig
from meteor_model.pruners.cost import solve_pruner
from meteor_model.pruners.named import with_pruner
from tests.meteor_model.builders import DENSE, PRUNED, config, model, pixels


def test_the_published_counts_come_from_the_final_number_alone() -> None:
    written = meteor_config()
    named = with_pruner(written, "meteor", 242, layer=2, lam=0.5)
    expected = replace(written.pruning, decode=replace(written.pruning.decode, lam=0.5))
    assert written.pruning.encode.totals == TOTALS
    assert named.pruning == expected
    scaled = with_pruner(written, "meteor", 121)
    assert (scaled.pruning.encode.totals, scaled.pruning.fuse.keep) == ((1299, 649, 596), 288)
    assert scaled.pruning.decode == DecodePruning(layer=2, target_mean=121.0, budget="fixed")


@torch.no_grad()
def test_it_runs_as_the_stages_do() -> None:
    stages = PruningConfig(
        EncodePruning(totals=(102, 51, 47)), FusePruning(keep=23), DecodePruning(layer=2, target_mean=12.0, lam=30.0)
    )
    named = with_pruner(config(DENSE), "meteor", 12, fused=23, leave=47, layer=2, lam=30.0)
    assert named.pruning == stages
    net, same = model(DENSE), model(stages)
    net.follow(named)
    assert torch.equal(net.encode_images(pixels(2))[0], same.encode_images(pixels(2))[0])


def test_it_can_be_solved_for_a_cost() -> None:
    target = 24.0
    found = solve_pruner(config(DENSE), "meteor", "layer_mean", target)
    assert found.reached == pytest.approx(target, abs=2)
    assert found.config.pruning.decode.enabled
    assert found.config.pruning.encode.enabled


def test_eagle_s_joint_map_leaves_no_encoders_to_compare() -> None:
    joint = config(DENSE, fusion="channel_concat", concat_grid=4)
    with pytest.raises(ValueError, match="needs every token of every grid"):
        with_pruner(joint, "meteor", 8)
    assert PRUNED.fuse.enabled
