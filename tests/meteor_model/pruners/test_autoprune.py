"""AutoPrune against slow, literal readings: its curve, its mutual information, and both in a padded batch.

Legend: B samples, H heads, T prompt tokens, P prunings.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.decoder.cache import MeteorCache
from meteor_model.pruners.autoprune import GAMMA, K0, X0, curve_counts, nominal_counts
from meteor_model.pruners.named import with_pruner
from tests.meteor_model.decoder.batches import build_prompts, prefill
from tests.meteor_model.decoder.oracle import LISTENING, build_model, library_attention
from tests.meteor_model.pruners.build import PER_IMAGE, dense_model

DEPTH, LAYERS, PLAN = 6, (1, 2, 3, 4, 5), (6, 5, 4, 3, 2)


def counts_literally(slope: float, layers: tuple[int, ...], depth: int, total: int, most: int) -> list[int]:
    """Height by Brent's method; then whole numbers, the largest remainders first."""
    curve = [0.75 / (1 + math.exp(slope * (layer * 32 / depth - X0 - slope))) for layer in layers]

    def kept(height: float) -> list[float]:
        return [min(max(height * share, 1), most) for share in curve]

    if total in (len(layers), len(layers) * most):
        return [total // len(layers)] * len(layers)
    height = brentq(lambda h: sum(kept(h)) - total, 0, 2 * most / min(curve), xtol=1e-13, rtol=1e-13)
    exact = kept(height)
    whole = [math.floor(value + 1e-9) for value in exact]
    order = sorted(range(len(layers)), key=lambda p: (-round(exact[p] + 1e-9 - whole[p], 7), p))
    for p in order[: total - sum(whole)]:
        whole[p] += 1
    return whole


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_curve_holds_the_total_exactly_and_never_grows(data: st.DataObject) -> None:
    depth = data.draw(st.integers(2, 40))
    layers = tuple(range(data.draw(st.integers(1, depth - 1)), depth))
    most = data.draw(st.integers(1, 700))
    total = data.draw(st.integers(len(layers), len(layers) * most))
    slope = data.draw(st.sampled_from([0.0, 0.05, 0.1234, 0.3, 0.4]))
    # Beside it a prompt without images and one that keeps all.
    total_B, most_B = torch.tensor([total, 0, len(layers) * 5]), torch.tensor([most, 0, 5])
    counts_BP = curve_counts(torch.full((3,), slope).double(), layers, depth, total_B, most_B, X0)
    found = counts_BP[0].tolist()
    assert sum(found) == total
    assert found == sorted(found, reverse=True)
    assert 1 <= found[-1] <= found[0] <= most
    assert counts_BP[1:].tolist() == [[0] * len(layers), [5] * len(layers)]
    expected = counts_literally(slope, layers, depth, total, most)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= int(slope == 0)


def information_literally(attention_HTT: Any, text: list[int], visual: list[int]) -> float:
    """Sum over text t and token v of p(t) p(v|t) log2(p(v|t) / p(v)), heads averaged."""
    bits = 0.0
    for map_TT in attention_HTT.double():
        told = [[float(map_TT[t, v]) for v in visual] for t in text]
        told = [[value / sum(row) for value in row] for row in told]
        prior = [sum(row[v] for row in told) / len(text) for v in range(len(visual))]
        bits += sum(p * math.log2(p / q) for row in told for p, q in zip(row, prior, strict=True)) / len(text)
    return bits / len(attention_HTT)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_every_prompt_of_a_batch_keeps_its_own_curve_and_the_same_total(side: str) -> None:
    model = build_model(num_hidden_layers=DEPTH)
    options = {"k0": 0.9, "gamma": 0.6}  # far enough from flat that few tokens show the slope
    decode = DecodePruning(
        layer=1,
        target_mean=float(PLAN[0]),
        budget="information_curve",
        criterion="all_heads",
        query="all_text",
        later_layers=LAYERS[1:],
        later_keep=PLAN[1:],
        options=options,
    )
    prompts = build_prompts(side=side)
    decision: Any = prefill(model, prompts, MeteorCache(model.config, decode, LISTENING)).decision
    curves = set()
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        found = [int(cut.counts_B[row]) for cut in decision.cuts]
        visual = visual_T.nonzero().flatten().tolist()
        if not visual:
            assert found == [0] * len(LAYERS)
            continue
        text = [t for t in range(len(visual_T)) if t not in visual and any(v < t for v in visual)]
        first_HTT = library_attention(model, embeds_1TC)[0][0]
        seen = [t for t in text if t > visual[-1]]  # rows between two images see only the first
        if seen == text:
            slope = max(options["k0"] - options["gamma"] * information_literally(first_HTT, text, visual), 0)
            total = min(sum(PLAN), len(visual) * len(PLAN))
            assert found == counts_literally(slope, LAYERS, DEPTH, total, len(visual))
            curves.add(tuple(found))
            ranked = sorted(visual, key=lambda v: -float(first_HTT[:, text, v].mean()))
            assert [visual[rank] for rank in decision.kept_visual(0)[row].tolist()] == sorted(ranked[: found[0]])
        assert sum(found) == min(sum(PLAN), len(visual) * len(PLAN))
    assert len(curves) > 1


def test_the_published_settings_are_the_defaults_and_cost_is_that_of_the_mean() -> None:
    config = with_pruner(dense_model().config, "autoprune", 8)
    decode = config.pruning.decode
    assert decode.options == {"x0": X0, "k0": K0, "gamma": GAMMA} == {"x0": 14.9, "k0": 0.4, "gamma": 0.2}
    kept = [round(cut.keep or 0) for cut in decode.cuts()]
    assert [cut.layer for cut in decode.cuts()] == list(range(1, 8))
    assert sum(kept) == 8 * 7
    assert kept == nominal_counts(range(1, 8), 8, 8, PER_IMAGE, x0=X0, slope=K0 / 2)
    assert kept[0] > kept[-1]
