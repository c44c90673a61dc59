"""Where Ray is asked to put the workers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.config.settings import SettingsError, TrainingSettings
from pipelines.training.trainer import _demand, _scaling

H100 = {"ray.io/accelerator-type": "H100"}


def test_settings_reach_the_placement_of_the_workers() -> None:
    settings = TrainingSettings(workers=2, gpus_per_worker=1.0, placement="STRICT_PACK", node_labels=H100)
    asked = _scaling(settings, frozenset())
    assert (asked.num_workers, asked.use_gpu) == (2, True)
    assert asked.resources_per_worker == {"CPU": 1.0, "GPU": 1.0}
    assert asked.placement_strategy == "STRICT_PACK"
    assert asked.label_selector == H100
    assert "ray.io/accelerator-type" in str(_demand(settings)), "who waits is told what for"


def test_by_default_any_node_will_do() -> None:
    asked = _scaling(TrainingSettings(), frozenset())
    assert (asked.placement_strategy, asked.label_selector) == ("PACK", None)


def test_an_elastic_training_keeps_them_and_leaves_out_what_was_stuck() -> None:
    settings = TrainingSettings(workers=4, min_workers=1, node_labels=H100)
    asked = _scaling(settings, frozenset({"dead"}))
    assert asked.num_workers == (1, 4)
    assert asked.label_selector == {**H100, "ray.io/node-id": "!in(dead)"}


@pytest.mark.parametrize("value", ["", "!H100", "in(a,b)", "a b", "-a", "a" * 64])
def test_a_label_is_one_plain_value(value: str) -> None:
    with pytest.raises(SettingsError, match=r"training\.node_labels"):
        replace(TrainingSettings(), node_labels={"ray.io/accelerator-type": value})
