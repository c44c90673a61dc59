"""Usefulness by masking: the table that scores give, and the model that is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.calibration.image_plan import CalibrationError
from pipelines.calibration.masking import masked_pruning, masking_report
from pipelines.evaluation.intervals import Interval
from pipelines.evaluation.scores import Score
from tests.meteor_model.builders import PRUNED, config


def score(accuracy: float) -> Score:
    return Score("suite", 40, 40, {}, accuracy, Interval(0.0, 1.0), 1.0, Interval(0.0, 2.0), 8, 8.0, 1.0)


def test_usefulness_is_the_share_of_accuracy_that_is_lost() -> None:
    report = masking_report("suite", score(0.8), {"clip": score(0.2), "pix2struct": score(0.8), "convnext": score(0.9)})
    assert report.usefulness == pytest.approx({"clip": 0.75, "pix2struct": 0.0, "convnext": -0.125})
    assert report.to_dict()["without"]["clip"]["accuracy"] == 0.2
    assert report.lines()[-1].endswith("--pruning.encode.usefulness clip 0.75 pix2struct 0 convnext 0")
    with pytest.raises(CalibrationError, match="answers none of 40 questions right"):
        masking_report("suite", score(0.0), {"clip": score(0.0)})


def test_a_masked_model_keeps_the_budgets_of_the_others() -> None:
    whole = config(replace(PRUNED, fuse=replace(PRUNED.fuse, keep=50)))
    for name in whole.encode_budgets:
        without = whole.with_pruning(masked_pruning(whole, name))
        left = {other: budgets for other, budgets in whole.encode_budgets.items() if other != name}
        assert {other: without.encode_budgets[other] for other in left} == left
        assert not any(without.encode_budgets[name])
        assert without.tokens_per_image == min(50, sum(budgets[-1] for budgets in left.values()))
        assert not without.pruning.decode.enabled
    assert masked_pruning(whole, None) == replace(whole.pruning, decode=masked_pruning(whole, "clip").decode)
