"""Ranks from second moments against a direct SVD in float64 on the same images."""

from __future__ import annotations

import pytest
import torch

from meteor_model.encode import dense_maps
from meteor_model.pruners.spectra import RANK_ESTIMATORS, singular_values, spectrum_rank
from tests.meteor_model.builders import model, pixels


@pytest.mark.parametrize("shape", [(3, 40, 17), (3, 17, 40), (2, 12, 12), (1, 1, 5)])
def test_singular_values_equal_a_direct_svd(shape: tuple[int, int, int]) -> None:
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.logspace(0, -3, shape[2])
    )
    direct = torch.linalg.svdvals(hidden.double())
    found = singular_values(hidden)
    assert found.dtype == torch.float64
    assert found.shape == direct.shape
    assert torch.allclose(found, direct, rtol=1e-8, atol=1e-8 * float(direct.max()))


def test_a_zero_map_and_one_of_low_rank() -> None:
    zero = singular_values(torch.zeros(2, 9, 4))
    for estimator in RANK_ESTIMATORS:
        assert spectrum_rank(zero, estimator).tolist() == [0.0, 0.0]
    low = torch.randn(1, 50, 3) @ torch.randn(1, 3, 20)
    assert float(spectrum_rank(singular_values(low), "numerical")) == 3


def test_features_that_are_not_finite_have_no_rank() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        singular_values(torch.full((1, 3, 3), float("nan")))
    with pytest.raises(ValueError, match="unknown rank estimator 'energi'"):
        spectrum_rank(torch.ones(1, 3), "energi")


def test_a_model_s_ranks_equal_those_of_a_direct_svd_on_the_same_images() -> None:
    built, images = model(), pixels(5)
    measured = built.measure_ranks(images, tuple(RANK_ESTIMATORS))
    for name, encoder in built._towers():
        maps = dense_maps(encoder, built._pixels_of(name, images), 3)
        for boundary, hidden in enumerate(maps):
            direct = torch.linalg.svdvals(hidden.double())
            for estimator in RANK_ESTIMATORS:
                expected = spectrum_rank(direct, estimator)
                found = torch.from_numpy(measured[estimator][name][:, boundary])
                assert torch.allclose(found, expected, rtol=1e-6), (estimator, name, boundary)
                single = spectrum_rank(torch.linalg.svdvals(hidden.float()), estimator)
                # Counting ranks may differ by a value on the very threshold.
                assert float((found - single).abs().max()) <= (1.0 if estimator != "effective" else 1e-3)
