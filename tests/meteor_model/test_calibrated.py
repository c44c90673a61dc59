"""Calibrated numbers and the settings that they belong to: every setting against every number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from meteor_model.architectures import build_config
from meteor_model.calibrated import StaleCalibrationError
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig

RANKS = {"clip": [9.0, 8.0, 7.0], "pix2struct": [5.0, 4.0, 6.0], "convnext": [3.0]}
LAM = 20.9


def calibrated() -> MeteorConfig:
    """As a run makes it: ranks are measured first, lambda is solved last."""
    decode = DecodePruning(layer=2, target_mean=16.0)
    pruning = PruningConfig(EncodePruning(totals=(96, 64, 64)), FusePruning(keep=32), decode)
    config = build_config("tiny", pruning, 280, {}, 0).with_pruning(pruning, RANKS)
    return config.with_pruning(change(config, "decode", lam=LAM))


def change(config: MeteorConfig, stage: str, **values: Any) -> PruningConfig:
    return replace(config.pruning, **{stage: replace(getattr(config.pruning, stage), **values)})


DECODE = {
    "layer": 1, "num_heads": 2, "query": "all_text", "target_mean": 24.0, "k_min": 2, "criterion": "all_heads",
    "budget": "fixed",
}  # fmt: skip
FUSE = {"keep": 40, "enabled": False, "criterion": "random", "floor": 0.5, "merge": "nearest", "positions": "original"}
ENCODE_FOR_LAM = {
    "totals": (96, 70, 64), "first_deep_segment": 3, "rank_exponent": 0.0, "score_queries": 16, "enabled": False,
    "criterion": "random", "budget": "tokens", "masked": ("clip",),
}  # fmt: skip
#: Later prunings count tokens for themselves, and a choice after prefill goes by the prompt's lambda; numbers of
#: criteria: test_options_are_settings_too.
FREE = {("decode", "enabled"), ("decode", "lam"), ("decode", "later_layers"), ("decode", "later_keep")}
FREE |= {("encode", "usefulness")}  # goes with another budget; the budgets of stage 1 are compared
FREE |= {("decode", "equal_layers"), ("decode", "options"), ("fuse", "options"), ("encode", "options")}
FREE |= {("decode", "answer_tokens"), ("decode", "reselect_every"), ("decode", "later_turn")}
FREE |= {("decode", "positions"), ("decode", "train")}
LAM_ROWS = [
    *(("decode", name, value) for name, value in DECODE.items()),
    *(("fuse", name, value) for name, value in FUSE.items()),
    *(("encode", name, value) for name, value in ENCODE_FOR_LAM.items()),
]
RANKS_ROWS = [("encode", "rank_estimator", "energy"), ("encode", "totals", (96, 64))]


def test_every_setting_has_a_row() -> None:
    """A new setting of pruning is either one that a number belongs to, or said to be none."""
    stages = {"encode": EncodePruning, "fuse": FusePruning, "decode": DecodePruning}
    known = {(stage, name) for stage, name, _ in [*LAM_ROWS, *RANKS_ROWS]} | FREE
    assert known == {(stage, item.name) for stage, cls in stages.items() for item in fields(cls)}


@pytest.mark.parametrize(("stage", "name", "value"), LAM_ROWS)
def test_lambda_does_not_outlive_a_setting(stage: str, name: str, value: object) -> None:
    config = calibrated()
    changed = change(config, stage, **{name: value})
    before = config.to_dict()
    with pytest.raises(StaleCalibrationError, match=r"lam 20\.9 was solved for .*python jobs/calibrate\.py"):
        config.with_pruning(changed)
    with pytest.raises(StaleCalibrationError):
        config.pruning = changed
    assert config.to_dict() == before
    solved = config.with_pruning(replace(changed, decode=replace(changed.decode, lam=None)))
    assert "lam" not in solved.calibrated
    anew = solved.with_pruning(replace(changed, decode=replace(changed.decode, lam=LAM)))
    with pytest.raises(StaleCalibrationError):
        anew.with_pruning(config.pruning)


@pytest.mark.parametrize("stage", ["encode", "fuse", "decode"])
def test_options_are_settings_too(stage: str) -> None:
    config = calibrated()
    pruning = change(config, "decode", lam=None)
    seeded = replace(pruning, **{stage: replace(getattr(pruning, stage), criterion="random", options={"seed": 1})})
    solved = config.with_pruning(seeded).with_pruning(replace(seeded, decode=replace(seeded.decode, lam=LAM)))
    with pytest.raises(StaleCalibrationError, match=r"lam 20\.9 was solved for"):
        solved.with_pruning(change(solved, stage, options={"seed": 2}))


@pytest.mark.parametrize(("stage", "name", "value"), RANKS_ROWS)
def test_ranks_do_not_outlive_a_setting(stage: str, name: str, value: object) -> None:
    config = calibrated()
    pruning = change(config, "decode", lam=None)
    uncalibrated = config.with_pruning(pruning)
    changed = change(uncalibrated, stage, **{name: value})
    with pytest.raises(ValueError, match=r"ranks were measured for .*python jobs/calibrate\.py|ranks\['clip'\] has 3"):
        uncalibrated.with_pruning(changed)
    fresh = {encoder: values[: len(changed.encode.totals)] for encoder, values in RANKS.items()}
    fresh["clip"] = [value + 1 for value in fresh["clip"]]
    assert uncalibrated.with_pruning(changed, fresh).ranks == fresh
    assert uncalibrated.with_pruning(changed, None).ranks is None


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [row for row in LAM_ROWS if (row[0], row[1]) != ("encode", "enabled")],
)
def test_ranks_stay_where_a_setting_does_not_touch_them(stage: str, name: str, value: object) -> None:
    config = calibrated()
    config = config.with_pruning(change(config, "decode", lam=None))
    assert config.with_pruning(change(config, stage, **{name: value})).ranks == RANKS


def test_ranks_that_are_given_are_new_also_where_they_equal_the_old_ones() -> None:
    config = calibrated()
    config = config.with_pruning(change(config, "decode", lam=None))
    other = change(config, "encode", rank_estimator="energy")
    assert config.with_pruning(other, config.ranks).ranks == config.ranks
    with pytest.raises(StaleCalibrationError, match="ranks were measured for"):
        config.with_pruning(other)


def test_ranks_wait_while_stage_1_is_off() -> None:
    config = calibrated()
    config = config.with_pruning(change(config, "decode", lam=None))
    off = config.with_pruning(change(config, "encode", enabled=False, rank_estimator="energy"))
    with pytest.raises(StaleCalibrationError, match='rank_estimator "effective", now it is "energy"'):
        off.with_pruning(change(off, "encode", enabled=True))
    assert off.with_pruning(config.pruning).ranks == RANKS


OTHER_MODEL: dict[str, Callable[[MeteorConfig], object]] = {
    "image_size": lambda config: setattr(config, "image_size", config.image_size * 2),
    "encoders": lambda config: setattr(
        config,
        "encoders",
        [replace(config.encoders[0], tower={**config.encoders[0].tower, "hidden_act": "gelu"}), *config.encoders[1:]],
    ),
    "ranks": lambda config: setattr(config, "ranks", {**RANKS, "clip": [1.0, 1.0, 1.0]}),
    "text_config": lambda config: setattr(
        config, "text_config", {**config.text_config.to_dict(), "hidden_size": 2 * config.text_config.hidden_size}
    ),
}


@pytest.mark.parametrize("what", OTHER_MODEL)
def test_lambda_does_not_outlive_the_model_around_it(what: str) -> None:
    with pytest.raises(StaleCalibrationError, match=r"lam 20\.9 was solved"):
        OTHER_MODEL[what](calibrated())


@pytest.mark.parametrize("what", ["image_size", "encoders"])
def test_ranks_do_not_outlive_towers_and_images(what: str) -> None:
    config = calibrated()
    config.pruning = change(config, "decode", lam=None)
    with pytest.raises(StaleCalibrationError, match="ranks were measured"):
        OTHER_MODEL[what](config)


def test_stage_3_can_be_switched_off_and_on_again() -> None:
    config = calibrated()
    config.pruning = change(config, "decode", enabled=False)
    config.pruning = change(config, "decode", enabled=True)
    assert config.pruning.decode.lam == LAM


def test_the_record_lies_in_the_folder(tmp_path: Path) -> None:
    config = calibrated()
    config.save_pretrained(tmp_path)
    loaded = MeteorConfig.from_pretrained(tmp_path)
    assert loaded.calibrated == config.calibrated
    assert loaded.calibrated["lam"]["settings"]["pruning.decode.target_mean"] == 16.0
    with pytest.raises(StaleCalibrationError):
        loaded.with_pruning(change(loaded, "decode", target_mean=24.0))
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"target_mean": 16.0', '"target_mean": 24.0'))
    with pytest.raises(StaleCalibrationError, match=r"pruning\.decode\.target_mean 16\.0, now it is 24\.0"):
        MeteorConfig.from_pretrained(tmp_path)


def test_a_folder_from_before_is_taken_at_its_word() -> None:
    plain = calibrated().to_dict()
    plain.pop("calibrated")
    old = MeteorConfig(**plain)
    assert old.calibrated == calibrated().calibrated
    with pytest.raises(StaleCalibrationError):
        old.with_pruning(change(old, "fuse", keep=40))
