"""benchmarks/ranks.py: what it concludes from ranks that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import ranks
from pipelines.calibration.ranks import measures_of
from tests.meteor_model.builders import config, model, pixels

MEASURES = measures_of(config())


def rows(scale: float, spread: float, seed: int, count: int = 40) -> np.ndarray:
    """Ranks that go up and down together on an image; `scale` multiplies CLIP's."""
    rng = np.random.default_rng(seed)
    means = np.array([30.0 * (scale if name == "clip" else 1.0) for _, name, _ in MEASURES])
    return means * (1 + spread * rng.standard_normal((count, 1))) * (1 + 0.01 * rng.standard_normal((count, 1)))


def test_what_moves_together_moves_no_shares() -> None:
    findings, reports = ranks.analyse(config(), {"a": rows(1.0, 0.2, 0), "b": rows(2.0, 0.2, 1)})
    found = findings["within"]["a"]["effective"]
    assert found["cv_of_ranks"]["clip"][0] == pytest.approx(0.2, rel=0.4)
    assert max(value for row in found["cv_of_shares"].values() for value in row) < 1e-6
    assert len(found["cv_of_shares"]["clip"]) == 3
    assert len(found["cv_of_shares"]["convnext"]) == 1
    between = findings["between"]["effective"]
    assert between["cv_of_means"]["clip"][0] == pytest.approx(2**0.5 / 3, rel=0.2)
    assert between["tokens_moved"]["a -> b"] > 5
    assert findings["between"]["verdicts"]["a -> b"].startswith("drift")
    assert list(reports) == ["a", "b"]
    assert "effective between sources" in ranks.summary(findings)


def test_sources_give_images_of_one_size(tmp_path: Path) -> None:
    Image.effect_noise((90, 60), 50).convert("RGB").save(tmp_path / "a.png")
    Image.linear_gradient("L").save(tmp_path / "b.png")
    for images in (ranks.text, ranks.noise, ranks.folder(tmp_path), ranks.crops(tmp_path, 2)):
        first, second = next(images()), next(images())
        assert first.shape == (3, ranks.SIDE, ranks.SIDE)
        assert first.dtype == torch.uint8
        assert torch.equal(first, second), "a source starts anew with the same image"
    assert len(list(ranks.crops(tmp_path, 2)())) == 4
    with pytest.raises(SystemExit, match="no image file"):
        ranks.folder(tmp_path / "nothing")


def test_measured_rows_follow_the_measures() -> None:
    built = model()
    measured = ranks.measure(built, iter(pixels(5)), 4, batch=3)
    assert measured.shape == (4, len(MEASURES))
    assert np.allclose(measured[:3], ranks.measure(built, iter(pixels(5)), 3))
