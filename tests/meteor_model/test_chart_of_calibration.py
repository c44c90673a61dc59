"""The chart of a calibration: a bar per dataset, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from PIL import Image

from meteor_model.visualize import draw_calibration


def report(mean: float, images: int = 9) -> dict[str, Any]:
    item = {"mean": mean, "std": 2.0, "low": mean - 1, "high": mean + 1}
    ranks = {"clip": [item, item], "convnext": [item]}
    return {"images": images, "ranks": {"effective": ranks, "energy": copy.deepcopy(ranks)}}


def coloured(chart: Image.Image, blue: bool) -> int:
    """Pixels in which blue outweighs red, or the other way round, by far."""
    pixels = np.asarray(chart).astype(int)
    difference = pixels[..., 2] - pixels[..., 0]
    return int((difference > 60).sum() if blue else (difference < -60).sum())


def test_each_dataset_has_bars_as_high_as_its_means() -> None:
    alone = draw_calibration({"here": report(20.0)})
    assert alone.mode == "RGB"
    assert coloured(alone, blue=True) > 5000
    assert coloured(alone, blue=False) == 0
    both = draw_calibration({"here": report(20.0), "there": report(10.0)}, "drift: words " * 30)
    assert 1.5 < coloured(both, blue=True) / coloured(both, blue=False) < 2.6
    assert draw_calibration({"here": report(20.0, images=1)}).size == alone.size


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(ValueError, match="no calibration to draw"):
        draw_calibration({})
    with pytest.raises(ValueError, match="here has no ranks"):
        draw_calibration({"here": {"images": 3, "ranks": {}}})
    other = report(1.0)
    del other["ranks"]["energy"]["convnext"]
    with pytest.raises(ValueError, match="there has ranks of"):
        draw_calibration({"here": report(1.0), "there": other})
