"""Every contradiction in a configuration fails when it is built, and names the field."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meteor_model.architectures import architecture
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from tests.model.builders import DENSE, PRUNED, config


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


@pytest.mark.parametrize(
    ("pruning", "message"),
    [
        ({"encode": {"totals": (200, 64, 60)}}, r"totals\[0\]: .*200.*128"),
        ({"encode": {"totals": (96, 64, 2)}}, r"totals\[2\]: .*2"),
        ({"encode": {"totals": (64, 96, 60)}}, r"totals must not grow.*\(64, 96, 60\)"),
        ({"encode": {"totals": ()}}, "totals is empty"),
        ({"encode": {"totals": (96, 64, 62, 60)}}, "totals has 4 segments, encoder 'clip' 3 blocks"),
        ({"encode": {"totals": (96,), "rank_estimator": "efective"}}, "rank_estimator 'efective' is unknown"),
        ({"encode": {"totals": (96,), "first_deep_segment": 0}}, "first_deep_segment counts from 1, got 0"),
        ({"fuse": {"keep": 61}}, "fuse.keep 61 exceeds the 60 tokens"),
        ({"fuse": {"keep": 0}}, "fuse.keep must be positive"),
        ({"decode": {"layer": 4}}, "decode.layer 4 must be below the LLM's 4 layers"),
        ({"decode": {"layer": 0}}, "decode.layer must be at least 1"),
        ({"decode": {"num_heads": 5}}, "decode.num_heads 5 is not in 1..4"),
        ({"decode": {"target_mean": 25.0}}, "target_mean 25.0 exceeds an image's 24 tokens"),
        ({"decode": {"target_mean": 2.0, "k_min": 3}}, "target_mean 2.0 is below k_min 3"),
        ({"decode": {"lam": -1.0}}, "decode.lam must be positive"),
        ({"decode": {"lam": float("nan")}}, "decode.lam must be positive and finite, got nan"),
        ({"decode": {"lam": float("inf")}}, "decode.lam must be positive and finite, got inf"),
        ({"decode": {"target_mean": float("nan")}}, "decode.target_mean must be finite, got nan"),
        ({"decode": {"query": "first"}}, "decode.query must be"),
        ({"decode": {"layers": 2}}, r"pruning.decode has unknown keys \['layers'\]"),
        ({"fusion": {}}, r"pruning has unknown keys \['fusion'\]"),
    ],
)
def test_contradictions_name_the_field(pruning: dict, message: str) -> None:
    plain = {"encode": {"totals": (96, 64, 60)}, "fuse": {"keep": 24}, "decode": {"layer": 2}}
    merged = {**plain, **{stage: {**plain.get(stage, {}), **values} for stage, values in pruning.items()}}
    with pytest.raises(ValueError, match=message):
        MeteorConfig(**{**config(PRUNED).to_dict(), "pruning": merged})


def test_ranks_must_fit_the_encoders() -> None:
    with pytest.raises(ValueError, match="ranks are for encoders"):
        config(PRUNED, ranks={"clip": [1.0, 1.0, 1.0]})
    with pytest.raises(ValueError, match=r"ranks\['clip'\] has 2 values, the encoder has 3"):
        config(PRUNED, ranks={"clip": [1.0, 1.0], "pix2struct": [1.0] * 3, "convnext": [1.0]})


def test_two_encoders_of_one_name_are_refused() -> None:
    data = config(PRUNED).to_dict()
    with pytest.raises(ValueError, match="encoder names must differ"):
        MeteorConfig(**{**data, "encoders": [data["encoders"][0], data["encoders"][0]]})


def test_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'tiny'"):
        architecture("tinny")


def test_pruning_settings_are_values() -> None:
    stages = PruningConfig(EncodePruning(totals=(9, 3)), FusePruning(keep=3), DecodePruning())
    assert replace(stages, fuse=FusePruning(keep=2)) != stages
    assert PruningConfig.from_dict({"encode": {"totals": [9, 3]}, "fuse": {"keep": 3}, "decode": {}}) == stages
