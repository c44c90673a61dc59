"""Every contradiction in a configuration fails when it is built, and names the field."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from meteor_model.architectures import architecture
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from tests.meteor_model.builders import DENSE, PRUNED, UNSOLVED, config, model, pixels


def test_budgets_share_the_totals_by_rank_and_respect_the_tokens_present() -> None:
    ranks = {"clip": [30.0, 20.0, 10.0], "pix2struct": [10.0, 20.0, 10.0], "convnext": [40.0]}
    built = config(PRUNED, ranks=ranks)
    # Boundary 1: 96 in proportion 3:1 would be 72:24; CLIP has only 64, the rest goes to Pix2Struct.
    assert built.encode_budgets["clip"] == (64, 32, 10)
    assert built.encode_budgets["pix2struct"] == (32, 32, 10)
    assert built.encode_budgets["convnext"] == (40,)
    assert built.tokens_per_image == 24


def test_equal_ranks_before_calibration() -> None:
    assert config(PRUNED).encode_budgets == {"clip": (48, 32, 20), "pix2struct": (48, 32, 20), "convnext": (20,)}


def test_a_disabled_stage_keeps_everything() -> None:
    built = config(DENSE)
    assert built.encode_budgets == {"clip": (64,), "pix2struct": (64,), "convnext": (64,)}
    assert built.tokens_per_image == 192


def test_config_survives_json(tmp_path: object) -> None:
    built = config(PRUNED, ranks={"clip": [3.0, 2.0, 1.0], "pix2struct": [1.0, 1.0, 1.0], "convnext": [2.5]})
    built.save_pretrained(str(tmp_path))
    loaded = MeteorConfig.from_pretrained(str(tmp_path))
    assert loaded.to_dict() == built.to_dict()
    assert loaded.pruning == built.pruning
    assert loaded.encoders == built.encoders
    assert loaded.encode_budgets == built.encode_budgets


RANKS = {"clip": [3.0, 2.0, 1.0], "pix2struct": [1.0, 1.0, 1.0], "convnext": [2.5]}


def test_another_pruning_is_another_configuration() -> None:
    built = config(PRUNED, ranks=RANKS)
    fewer = replace(PRUNED, fuse=FusePruning(keep=8), decode=replace(PRUNED.decode, target_mean=4.0, lam=9.0))
    changed = built.with_pruning(fewer)
    assert changed.pruning == fewer
    assert changed.ranks == RANKS, "ranks stay"
    assert changed.tokens_per_image == 8, "and what follows from the settings is worked out anew"
    own = {"pruning": None, "calibrated": None}
    assert {**changed.to_dict(), **own} == {**built.to_dict(), **own}
    assert built.pruning == PRUNED
    assert built.tokens_per_image == 24


def test_another_pruning_may_come_with_other_ranks_or_none() -> None:
    built = config(UNSOLVED, ranks=RANKS)
    other = {name: [1.0] for name in RANKS}
    assert built.with_pruning(UNSOLVED, ranks=other).ranks == other
    assert built.with_pruning(UNSOLVED, ranks=None).encode_budgets == config(PRUNED).encode_budgets
    with pytest.raises(ValueError, match=r"fuse\.keep 61 exceeds the 60 tokens"):
        built.with_pruning(replace(UNSOLVED, fuse=FusePruning(keep=61)))


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"encode": {"totals": (200, 64, 60)}}, r"totals\[0\]: .*200.*128"),
        ({"encode": {"totals": (96, 64, 2)}}, r"totals\[2\]: .*2"),
        ({"encode": {"totals": (64, 96, 60)}}, r"totals must not grow.*\(64, 96, 60\)"),
        (
            {"encode": {"totals": (96, 64, 129)}},
            r"totals\[2\]: a budget of 129 .* than the 128 tokens there are",
        ),
        ({"encode": {"totals": ()}}, "totals is empty"),
        ({"encode": {"totals": (96, 64, 62, 60)}}, "totals has 4 segments, encoder 'clip' 3 blocks"),
        ({"encode": {"totals": (96,), "rank_estimator": "efective"}}, "rank_estimator 'efective' is unknown"),
        ({"encode": {"totals": (96,), "first_deep_segment": 0}}, "first_deep_segment counts from 1, got 0"),
        ({"encode": {"totals": (96,), "first_deep_segment": 3}}, r"first_deep_segment 3 is past the 1 .*use 1\.\.2"),
        ({"encode": {"first_deep_segment": 9}}, r"first_deep_segment 9 is past the 3 segments.*use 1\.\.4"),
        ({"encode": {"first_deep_segment": 1.5}}, "first_deep_segment must be a whole number, got 1.5"),
        ({"encode": {"totals": (96.9, 64, 60)}}, r"totals\[0\] must be a whole number, got 96.9"),
        ({"encode": {"totals": 96}}, "totals must be a list of whole numbers, one a segment, got 96"),
        ({"encode": {"totals": "96"}}, "totals must be a list of whole numbers, one a segment, got '96'"),
        ({"encode": {"totals": ("a",)}}, r"totals\[0\] must be a whole number, got 'a'"),
        ({"encode": {"score_queries": 1.5}}, r"score_queries \(or None\) must be a whole number, got 1.5"),
        ({"encode": {"score_queries": 0}}, r"score_queries \(or None\) must be at least 1, got 0"),
        ({"encode": {"rank_exponent": float("nan")}}, "rank_exponent must be finite and a number, got nan"),
        ({"encode": {"enabled": "false"}}, "encode.enabled must be true or false, got 'false'"),
        ({"encode": [96, 64]}, r"pruning.encode must be a mapping of settings, got \[96, 64\]"),
        ({"fuse": {"keep": 24.5}}, "fuse.keep must be a whole number, got 24.5"),
        ({"fuse": {"keep": True}}, "fuse.keep must be a whole number, got True"),
        ({"decode": {"layer": 1.5}}, "decode.layer must be a whole number, got 1.5"),
        ({"decode": {"k_min": 25}}, "k_min 25 exceeds an image's 24 tokens"),
        ({"decode": {"lam": "3"}}, "decode.lam must be finite and a number, got '3'"),
        ({"fuse": {"keep": 61}}, "fuse.keep 61 exceeds the 60 tokens"),
        ({"fuse": {"keep": 0}}, "fuse.keep must be at least 1, got 0"),
        ({"decode": {"layer": 4}}, "decode.layer 4 must be below the LLM's 4 layers"),
        ({"decode": {"layer": 0}}, "decode.layer must be at least 1"),
        ({"decode": {"num_heads": 5}}, "decode.num_heads 5 is not in 1..4"),
        ({"decode": {"target_mean": 25.0}}, "target_mean 25.0 exceeds an image's 24 tokens"),
        ({"decode": {"target_mean": 2.0, "k_min": 3}}, "target_mean 2.0 is below k_min 3"),
        ({"decode": {"lam": -1.0}}, "decode.lam must be positive"),
        ({"decode": {"lam": float("nan")}}, "decode.lam must be finite and a number, got nan"),
        ({"decode": {"lam": float("inf")}}, "decode.lam must be finite and a number, got inf"),
        ({"decode": {"target_mean": float("nan")}}, "decode.target_mean must be finite and a number, got nan"),
        ({"decode": {"query": "first"}}, "decode.query must be"),
        ({"decode": {"layers": 2}}, r"pruning.decode has unknown keys \['layers'\]"),
        ({"fusion": {}}, r"pruning has unknown keys \['fusion'\]"),
    ],
)
def test_contradictions_name_the_field(pruning: dict, message: str) -> None:
    plain: dict[str, Any] = {"encode": {"totals": (96, 64, 60)}, "fuse": {"keep": 24}, "decode": {"layer": 2}}
    merged = {
        **plain,
        **{
            stage: {**plain.get(stage, {}), **values} if isinstance(values, dict) else values
            for stage, values in pruning.items()
        },
    }
    with pytest.raises(ValueError, match=message):
        MeteorConfig(**{**config(PRUNED).to_dict(), "pruning": merged})


CLIP, PIX2STRUCT, CONVNEXT = (item.to_dict() for item in config(PRUNED).encoders)
EVEN = {"clip": [1.0], "pix2struct": [1.0] * 3, "convnext": [1.0]}


def renamed(**changes: Any) -> list[dict[str, Any]]:
    """The encoders, the first of them changed."""
    return [{**CLIP, **changes}, PIX2STRUCT, CONVNEXT]


@pytest.mark.parametrize(
    ("pruning", "changes", "message"),
    [
        (PRUNED, {"ranks": {"clip": [1.0]}}, "ranks are for encoders"),
        (PRUNED, {"ranks": {**EVEN, "clip": [1.0, 1.0]}}, r"ranks\['clip'\] has 2 values, the encoder has 3"),
        (PRUNED, {"ranks": {**EVEN, "clip": [float("nan")]}}, r"ranks\['clip'\]\[0\] is nan: a rank is finite"),
        (PRUNED, {"ranks": {**EVEN, "pix2struct": [1.0, -2.0, 1.0]}}, r"ranks\['pix2struct'\]\[1\] is -2.0"),
        (PRUNED, {"ranks": {**EVEN, "clip": 3.0}}, "ranks must map each encoder's name to a list of numbers"),
        (DENSE, {"ranks": {**EVEN, "clip": [float("nan")]}}, r"ranks\['clip'\]\[0\] is nan"),
        (DENSE, {"ranks": {**EVEN, "clip": [1.0, 1.0]}}, r"ranks\['clip'\] has 2 values, the encoder has 3"),
        (DENSE, {"ranks": {**EVEN, "clip": []}}, r"ranks\['clip'\] has 0 values"),
        (
            replace(PRUNED, encode=replace(PRUNED.encode, rank_exponent=1000.0)),
            {"ranks": {**EVEN, "clip": [30.0]}},
            r"rank_exponent 1000.0: ranks\['clip'\]\[0\] = 30.0 has no such power",
        ),
        (
            replace(PRUNED, encode=replace(PRUNED.encode, rank_exponent=-1.0)),
            {"ranks": {**EVEN, "clip": [0.0]}},
            r"rank_exponent -1.0: ranks\['clip'\]\[0\] = 0.0 has no such power",
        ),
        (PRUNED, {"encoders": [CLIP, CLIP]}, "encoder names must differ"),
        (PRUNED, {"encoders": renamed(name="keys")}, "encoder name 'keys' is taken by torch.nn.ModuleDict"),
        (PRUNED, {"encoders": renamed(name="type")}, "encoder name 'type' is taken by torch.nn.ModuleDict"),
        (PRUNED, {"encoders": renamed(name="training")}, "encoder name 'training' is taken"),
        (PRUNED, {"encoders": renamed(name=7)}, "encoder name 7 must be letters"),
        (PRUNED, {"encoders": renamed(image_size=64.5)}, "encoder 'clip': image_size must be a whole number, got 64.5"),
        (PRUNED, {"encoders": renamed(image_size=0)}, "encoder 'clip': image_size must be at least 1, got 0"),
        (PRUNED, {"encoders": renamed(fold=0)}, "encoder 'clip': fold must be at least 1, got 0"),
        (PRUNED, {"encoders": renamed(size=3)}, r"encoders\[0\] has unknown keys \['size'\]"),
        (PRUNED, {"encoders": [CLIP, {"name": "a", "image_size": 64}]}, r"encoders\[1\] lacks the keys \['family'\]"),
        (PRUNED, {"encoders": ["clip"]}, r"encoders\[0\] must be a mapping of settings, got 'clip'"),
        (PRUNED, {"image_size": 0}, "image_size must be at least 1, got 0"),
        (PRUNED, {"image_size": -5}, "image_size must be at least 1, got -5"),
        (PRUNED, {"image_token_id": 0}, "image_token_id 0 is pad_token_id too"),
        (PRUNED, {"image_token_id": 0, "pad_token_id": None}, "image_token_id 0 is text_config.pad_token_id too"),
        (PRUNED, {"image_token_id": 300}, "image_token_id 300 is outside the vocabulary 300"),
    ],
)
def test_settings_that_do_not_fit_the_model_name_themselves(
    pruning: PruningConfig, changes: dict[str, Any], message: str
) -> None:
    plain = config(pruning).to_dict()
    with pytest.raises(ValueError, match=message):
        MeteorConfig(**{**plain, **changes})


def test_a_model_without_encoders_is_refused() -> None:
    """A bare configuration itself is none: transformers builds one to compare with."""
    with pytest.raises(ValueError, match="encoders is empty"):
        MeteorForConditionalGeneration(MeteorConfig(text_config=config().text_config))


CALIBRATED = {"clip": [30.0, 20.0, 10.0], "pix2struct": [10.0, 20.0, 10.0], "convnext": [40.0]}
TWO_SEGMENTS = PruningConfig(EncodePruning(totals=(64, 30)), FusePruning(keep=20), DecodePruning(False))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("ranks", CALIBRATED),
        ("pruning", TWO_SEGMENTS),
        ("pruning", asdict(TWO_SEGMENTS)),
        ("pruning", DENSE),
        ("encoders", [CONVNEXT, PIX2STRUCT, CLIP]),
        ("text_config", {"num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 500}),
        ("image_token_id", 9),
    ],
)
def test_a_changed_setting_counts_in_the_model_and_in_what_it_saves(setting: str, value: Any) -> None:
    changed, fresh = config(UNSOLVED), MeteorConfig(**{**config(UNSOLVED).to_dict(), setting: value})
    setattr(changed, setting, value)
    for saved in (changed, MeteorConfig.from_dict(changed.to_dict())):
        assert saved.to_dict() == fresh.to_dict()
        assert saved.encode_budgets == fresh.encode_budgets
        assert saved.tokens_per_image == fresh.tokens_per_image


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("ranks", {**CALIBRATED, "clip": [float("nan")]}, r"ranks\['clip'\]\[0\] is nan"),
        ("pruning", replace(PRUNED, fuse=FusePruning(keep=61)), "fuse.keep 61 exceeds"),
        ("fusion", "channel_concat", "encode.enabled is true with fusion='channel_concat'"),
        ("encoders", (), "encoders is empty"),
        ("image_size", 0, "image_size must be at least 1"),
    ],
)
def test_a_change_that_contradicts_is_refused_and_changes_nothing(setting: str, value: Any, message: str) -> None:
    built = config(PRUNED)
    with pytest.raises(ValueError, match=message):
        setattr(built, setting, value)
    assert built.__dict__ == config(PRUNED).__dict__ | {"text_config": built.text_config}
    assert built.to_dict() == config(PRUNED).to_dict()


def test_a_live_model_keeps_the_tokens_of_its_changed_configuration(tmp_path: Path) -> None:
    net = model(UNSOLVED)
    net.encode_images(pixels(1))
    net.config.ranks = CALIBRATED
    _, stats = net.encode_images(pixels(1))
    counts = {name: tuple(kept.shape[1] for kept in boundaries) for name, boundaries in stats.encode.items()}
    assert counts == {"clip": (64, 32, 10), "pix2struct": (32, 32, 10), "convnext": (40,)}
    net.save_pretrained(tmp_path)
    assert MeteorConfig.from_pretrained(tmp_path).encode_budgets == net.config.encode_budgets


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        architecture("tinny")


def test_pruning_settings_are_values() -> None:
    stages = PruningConfig(EncodePruning(totals=(9, 3)), FusePruning(keep=3), DecodePruning())
    assert replace(stages, fuse=FusePruning(keep=2)) != stages
    assert PruningConfig.from_dict({"encode": {"totals": [9, 3]}, "fuse": {"keep": 3}, "decode": {}}) == stages
