"""Encoders without a budget are not run: by their usefulness, or masked.

Legend: M images, K visual tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.flops import count_flops
from meteor_model.fusion import prune_pool
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.pruners.budgets import allocate_budgets
from tests.meteor_model.builders import DENSE, PRUNED, config, model, pixels

OFF = DecodePruning(enabled=False)


def shared(usefulness: dict[str, float], totals: tuple[int, ...] = (64, 48, 50), keep: int = 24) -> PruningConfig:
    encode = EncodePruning(totals=totals, budget="rank_usefulness", usefulness=usefulness)
    return PruningConfig(encode, FusePruning(keep=keep), OFF)


@given(
    st.integers(3, 40), st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.05, 1)), min_size=2, max_size=4), st.data()
)
@settings(deadline=None, max_examples=60)
def test_shares_are_in_proportion_to_rank_to_the_power_times_usefulness(
    total: int, encoders: list[tuple[float, float]], data: st.DataObject
) -> None:
    exponent = data.draw(st.sampled_from([-1.0, 0.0, 1.0, 2.0]))
    capacities = [40] * len(encoders)
    total = max(total, len(encoders))
    found = allocate_budgets(
        [rank for rank, _ in encoders], total, capacities, exponent, [useful for _, useful in encoders]
    )
    weights = [rank**exponent * useful for rank, useful in encoders]
    exact = [total * weight / sum(weights) for weight in weights]
    assert sum(found) == total
    if min(exact) >= 1 and max(exact) <= 40:  # no bound binds
        assert all(abs(share - each) < 1 + 1e-6 for share, each in zip(found, exact, strict=True))


def refuse_to_run(built: MeteorForConditionalGeneration, name: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError(f"{name} is run")

    for module in built.encoders[name].modules():
        module.register_forward_pre_hook(refuse)
    built.projectors[name].register_forward_pre_hook(refuse)


@pytest.mark.parametrize("name", ["clip", "convnext"])
@torch.no_grad()
def test_without_usefulness_a_model_is_the_one_of_the_other_encoders(name: str) -> None:
    totals = (64, 48, 50) if name == "clip" else (64, 48, 44)
    built = model(PRUNED)
    built.follow(built.config.with_pruning(shared({name: -0.2, "pix2struct": 0.5}, totals), None))
    refuse_to_run(built, name)
    others = [item for item in built.config.encoders if item.name != name]
    fewer = MeteorConfig(
        **{**built.config.to_dict(), "encoders": others, "pruning": shared({"pix2struct": 0.5}, totals)}
    )
    alone = MeteorForConditionalGeneration(fewer).eval()
    alone.load_state_dict({key: value for key, value in built.state_dict().items() if f".{name}." not in f".{key}"})
    visual, stats = built.encode_images(pixels(3))
    expected, known = alone.encode_images(pixels(3))
    assert torch.equal(visual, expected)
    assert torch.equal(stats.fuse, known.fuse)
    assert [kept.shape for kept in stats.encode[name]] == [(3, 0)] * len(stats.encode[name])
    assert {key: value for key, value in built.config.encode_budgets.items() if key != name} == fewer.encode_budgets
    assert not any(built.config.encode_budgets[name])


@torch.no_grad()
def test_a_masked_encoder_leaves_the_others_as_they_are() -> None:
    built = model(PRUNED)
    before = built.config.encode_budgets
    maps, _, _ = built._encode(pixels(2), None)
    projected = dict(zip(maps, built._project(maps), strict=True))
    encode = replace(PRUNED.encode, masked=("clip",))
    built.follow(built.config.with_pruning(replace(PRUNED, encode=encode, decode=OFF)))
    refuse_to_run(built, "clip")
    visual, stats = built.encode_images(pixels(2))
    after = built.config.encode_budgets
    assert after == before | {"clip": (0, 0, 0)}
    rest = [projected[name] for name in ("pix2struct", "convnext")]
    pool = built.pool_of(rest, [stats.encode[name][-1] for name in ("pix2struct", "convnext")])
    assert torch.equal(visual, prune_pool(pool, built.config.pruning.fuse)[0])
    assert MeteorConfig(**built.config.to_dict()).encode_budgets == after


@torch.no_grad()
def test_where_maps_are_joined_a_masked_one_is_zero() -> None:
    joined = config(DENSE, fusion="channel_concat", concat_grid=8)
    torch.manual_seed(0)
    built = MeteorForConditionalGeneration(joined).eval()
    whole: Callable[..., Any] = built._encode
    maps, _, _ = whole(pixels(2), None)
    maps["pix2struct"] = torch.zeros_like(maps["pix2struct"])
    expected = built._project(maps)[0]
    built.follow(joined.with_pruning(replace(DENSE, encode=EncodePruning(False, masked=("pix2struct",)))))
    for module in built.encoders["pix2struct"].modules():
        module.register_forward_pre_hook(lambda *_: pytest.fail("pix2struct is run"))
    assert torch.equal(built.encode_images(pixels(2))[0], expected)
    assert count_flops(built.config).encoders[1].tower == 0


def test_an_encoder_that_is_not_run_costs_nothing_and_learns_nothing() -> None:
    built = model(PRUNED).train()
    built.follow(built.config.with_pruning(shared({"convnext": 0.0}, (64, 48, 44)), None))
    report = count_flops(built.config)
    dense = count_flops(config(replace(PRUNED, decode=OFF)))
    assert (report.encoders[2].tower, report.encoders[2].selection, report.encoders[2].projector) == (0, 0, 0)
    assert dense.encoders[2].tower > 0
    assert [item.name for item in report.encoders] == ["clip", "pix2struct", "convnext"]
    ids = torch.tensor([[*[built.config.image_token_id] * 24, 7, 8, 9]])
    labels = ids.masked_fill(ids == built.config.image_token_id, -100)
    built(ids, pixel_values=pixels(1), labels=labels).loss.backward()
    assert all(parameter.grad is None for parameter in built.projectors["convnext"].parameters())
    assert all(parameter.grad is not None for parameter in built.projectors["clip"].parameters())


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        (shared({"vit": 1.0}), r"usefulness names \['vit'\]"),
        (shared({"clip": 0.0, "pix2struct": -1.0, "convnext": 0.0}), "no encoder of .* is run"),
        (shared({"clip": 0.0}, totals=(96, 64, 60)), "a budget of 96 tokens is larger than the 64 tokens there are"),
        (replace(DENSE, encode=EncodePruning(False, masked=("vit",))), r"masked names \['vit'\]"),
    ],
)
def test_tables_that_do_not_fit_the_model_are_refused(pruning: PruningConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(pruning)


def test_usefulness_that_nobody_looks_at_is_refused() -> None:
    with pytest.raises(ValueError, match="budget 'rank' does not look at it"):
        EncodePruning(totals=(8,), usefulness={"clip": 1.0})
    with pytest.raises(ValueError, match=r"usefulness\.clip must be finite"):
        EncodePruning(totals=(8,), budget="rank_usefulness", usefulness={"clip": float("nan")})
    with pytest.raises(ValueError, match="masked must be a list"):
        EncodePruning(totals=(8,), masked="clip")  # type: ignore[arg-type]
