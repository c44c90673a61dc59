"""Milliseconds of a setting: a ratio to the model's own settings, whatever else the machine does meanwhile."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.encoders import VisionEncoder
from meteor_model.towers import of_towers, with_towers
from pipelines.io import storage
from pipelines.registry.variants import apply_pruning
from tests.meteor_model.builders import PRUNED, model, processor
from tests.pipelines.evaluation.test_evaluate import _asked
from tests.tune.test_trial import OF_TWO
from tune import timing
from tune.timing import TURNS, ms_per_image

# Lambda 31: one that was solved for these settings, and not the base model's.
TWELVE = replace(PRUNED, fuse=replace(PRUNED.fuse, keep=12), decode=replace(PRUNED.decode, lam=31.0))


def test_a_machine_that_slows_down_changes_no_setting_s_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, made, table = model(), processor(), str(tmp_path / "latency.json")
    own, asked = built.config, _asked().asked[:3]
    images = sum(len(question.images) for question in asked)
    slowness, turn = [1.0, 1.0, 1.0, 9.0, 3.0, 2.0, 5.0, 4.0, 6.0, 8.0, 7.0] * 4, [0]

    def planted(of: Any, config: MeteorConfig, *rest: Any) -> float:
        turn[0] += 1
        return slowness[turn[0] // 2] * config.tokens_per_image * 1e-3

    monkeypatch.setattr(timing, "_seconds", planted)
    apply_pruning(built, made, TWELVE, None)
    turn[0] = -1  # the turns of one pass meet the same machine
    first = ms_per_image(built, made, (built, own), asked, table)
    stored = storage.read_json(table)
    assert first == pytest.approx(stored["reference_ms"] / 2)
    turn[0] = 9
    assert ms_per_image(built, made, (built, own), asked, table) == pytest.approx(first)
    usual = statistics.median(slowness[1 : TURNS + 1])  # the first turn warms up
    assert storage.read_json(table) == stored == {"reference_ms": pytest.approx(usual * 24 / images), "turns": TURNS}


@pytest.mark.parametrize("some", [False, True])
def test_it_is_measured_and_the_model_is_left_as_it_was(tmp_path: Path, some: bool) -> None:
    whole, made = model(), processor()
    own = whole.config
    pruned = own.with_pruning(TWELVE)
    if some:
        pruned = with_towers(own, {"clip": 64, "pix2struct": 40}).with_pruning(OF_TWO)
    built = of_towers(whole, pruned)
    ms = ms_per_image(built, made, (whole, own), _asked().asked[:3], str(tmp_path / "latency.json"))
    assert ms > 0
    assert built.config is pruned
    assert made.tokens_per_image == pruned.tokens_per_image
    assert cast(VisionEncoder, built.encoders["pix2struct"]).config.image_size == (40 if some else 64)
