"""Criteria of stage 3 against slow, literal readings, on prompts of one batch and alone.

The readings see one prompt: the hidden states of every layer, queries, keys and values projected by hand, and the
library's own attention maps.

Legend: B samples, T prompt tokens, H heads, G key/value heads, C width, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.decoder.cache import MeteorCache
from meteor_model.pruners.sparsevlm import merge_clusters
from tests.meteor_model.decoder.batches import LAYOUTS, build_prompts, prefill
from tests.meteor_model.decoder.oracle import HEADS, LISTENING, WIDTH, build_model, library_attention
from tests.meteor_model.test_pruning import randn

LAYER, KEEP, GROUPS, HEAD = 2, 4, 2, WIDTH // HEADS
#: Row and column of an image's tokens: 3 x 4.
CELLS = [(row, column) for row in range(3) for column in range(4)]


@dataclass
class Layer:
    """What the layer that is asked was given and made of one prompt."""

    model: Any
    embeds_TC: Tensor
    visual: list[int]
    input_TC: Tensor
    map_HTT: Tensor

    @property
    def text_after(self) -> list[int]:
        """Text rows after the first image; the last token where there is none."""
        rows = [t for t in range(len(self.embeds_TC)) if t not in self.visual and any(v < t for v in self.visual)]
        return rows or [len(self.embeds_TC) - 1]

    def states(self, name: str, heads: int) -> Tensor:
        """Queries, keys or values (heads, T, d), not rotated."""
        block = self.model.layers[LAYER - 1]
        flat = getattr(block.self_attn, name)(block.input_layernorm(self.input_TC[None]))[0]
        return torch.stack([flat[:, h * HEAD : (h + 1) * HEAD] for h in range(heads)])

    @property
    def rotary(self) -> tuple[Tensor, Tensor]:
        cos, sin = self.model.rotary_emb(self.embeds_TC[None], torch.arange(len(self.embeds_TC))[None])
        return cos[0], sin[0]


def layer_of(model: Any, embeds_1TC: Tensor, visual_T: Tensor) -> Layer:
    hidden = model(inputs_embeds=embeds_1TC, output_hidden_states=True, use_cache=False).hidden_states
    attention = library_attention(model, embeds_1TC)[LAYER - 1][0]
    return Layer(model, embeds_1TC[0], visual_T.nonzero().flatten().tolist(), hidden[LAYER - 1][0], attention)


def best(score: dict[int, float], count: int) -> list[int]:
    return sorted(score, key=lambda t: (-score[t], t))[:count]


def fastv(layer: Layer, count: int) -> set[int]:
    return set(best({t: float(layer.map_HTT[:, -1, t].mean()) for t in layer.visual}, count))


def sparsevlm_scores(layer: Layer) -> dict[int, float]:
    shares = dict.fromkeys(layer.text_after, 0.0)
    for v in layer.visual:
        weights = {t: math.exp(float(layer.embeds_TC[v] @ layer.embeds_TC[t])) for t in shares}
        for t in shares:
            shares[t] += weights[t] / sum(weights.values()) / len(layer.visual)
    raters = [t for t in shares if shares[t] >= sum(shares.values()) / len(shares) * (1 - 1e-6)]
    return {v: float(layer.map_HTT[:, raters, v].mean()) for v in layer.visual}


def sparsevlm(layer: Layer, count: int) -> set[int]:
    """With one recycled token, which is the centre of its own cluster and the best of what is left."""
    return set(best(sparsevlm_scores(layer), count))


def feather(layer: Layer, count: int) -> set[int]:
    query, key = layer.states("q_proj", HEADS), layer.states("k_proj", GROUPS)
    score = dict.fromkeys(layer.visual, 0.0)
    for h in range(HEADS):
        weight = {
            t: math.exp(float(query[h, -1] @ key[h * GROUPS // HEADS, t]) / math.sqrt(HEAD)) for t in layer.visual
        }
        for t in layer.visual:
            score[t] += weight[t] / sum(weight.values()) / HEADS
    for rank, t in enumerate(layer.visual):
        row, column = CELLS[rank % len(CELLS)]
        score[t] += 1e6 * (row % 3 == 0 and column % 3 == 0)
    return set(best(score, count))


def value_score(layer: Layer, rows: list[int]) -> dict[int, float]:
    values = layer.states("v_proj", GROUPS)
    score = dict.fromkeys(layer.visual, 0.0)
    for g in range(GROUPS):
        for row in rows:
            weight = [math.exp(float(values[g, row] @ values[g, t]) / math.sqrt(HEAD)) for t in range(row + 1)]
            for t in layer.visual:
                if t <= row:
                    score[t] += weight[t] / sum(weight) / GROUPS / len(rows)
    return score


def ivc_prune(layer: Layer, count: int) -> set[int]:
    first = value_score(layer, layer.text_after)
    seeds = best(first, max(1, int(0.01 * len(layer.visual))))
    score = value_score(layer, [*layer.text_after, *seeds])
    cos, sin = layer.rotary
    each = count // 6
    kept = best({t: float(cos[t].mean()) for t in layer.visual}, each)
    kept += best({t: float(sin[t].mean()) for t in layer.visual if t not in kept}, each)
    kept += best({t: score[t] for t in layer.visual if t not in kept}, count - len(kept))
    return set(kept)


def dart(layer: Layer, count: int) -> set[int]:
    plain = layer.states("k_proj", GROUPS)
    cos, sin = layer.rotary
    turned = torch.cat([-plain[..., HEAD // 2 :], plain[..., : HEAD // 2]], dim=-1)
    keys = (plain * cos + turned * sin).transpose(0, 1).flatten(1)
    norm = {t: float(keys[t].abs().sum()) for t in range(len(keys))}
    kept = sorted(best({t: norm[t] for t in layer.visual}, min(4, count)))
    text = sorted(best({t: norm[t] for t in norm if t not in layer.visual}, 4))
    pivots, wanted = [*kept, *text], count - len(kept)
    for turn, pivot in enumerate(pivots):
        share = wanted * (turn + 1) // len(pivots) - wanted * turn // len(pivots)
        unlike = {
            t: -float(torch.cosine_similarity(keys[t], keys[pivot], dim=0)) for t in layer.visual if t not in kept
        }
        kept += best(unlike, share)
    return set(kept)


RULES: dict[str, tuple[Callable[[Layer, int], set[int]], dict[str, Any]]] = {
    "fastv": (fastv, {"criterion": "all_heads"}),
    "sparsevlm": (
        sparsevlm,
        {"criterion": "sparsevlm", "query": "all_text", "options": {"recycled": 0, "clusters": 0}},
    ),
    "feather": (feather, {"criterion": "feather"}),
    "ivc_prune": (ivc_prune, {"criterion": "ivc_prune", "query": "all_text", "equal_layers": True}),
    "dart": (dart, {"criterion": "dart"}),
}


def cut_by(model: Any, settings: DecodePruning, side: str = "left") -> Any:
    prompts = build_prompts(side=side)
    kv = MeteorCache(model.config, settings, LISTENING, cells_n2=torch.tensor(CELLS))
    return prompts, prefill(model, prompts, kv).decision


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [1, KEEP, 7])
@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_a_rule_is_its_literal_reading_in_a_padded_batch(name: str, keep: int, side: str) -> None:
    reading, settings = RULES[name]
    model = build_model()
    prompts, decision = cut_by(
        model, DecodePruning(layer=LAYER, target_mean=float(keep), budget="fixed", **settings), side
    )
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        found = decision.kept_visual()[row].tolist()
        if not visual_T.any():
            assert found == []
            continue
        layer = layer_of(model, embeds_1TC, visual_T)
        count = min(keep, len(layer.visual))
        assert [layer.visual[rank] for rank in found] == sorted(reading(layer, count)), LAYOUTS[row]


@torch.no_grad()
def test_later_prunings_ask_the_later_layer_about_what_is_left() -> None:
    """PyramidDrop: above a cut, the map of a forward in which nobody may look at what was dropped."""
    model = build_model(num_hidden_layers=6)
    settings = DecodePruning(
        layer=1, target_mean=6.0, budget="fixed", criterion="all_heads", later_layers=(3, 4), later_keep=(4, 2)
    )
    prompts, decision = cut_by(model, settings)
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        visual, length = visual_T.nonzero().flatten().tolist(), embeds_1TC.shape[1]
        dropped: list[int] = []
        hidden, rotary = embeds_1TC, model.rotary_emb(embeds_1TC, torch.arange(length)[None])
        cuts = dict(zip((1, 3, 4), (6, 4, 2), strict=True))
        for index, block in enumerate(model.layers):
            seen_TT = torch.ones(length, length, dtype=torch.bool).tril()
            seen_TT[:, dropped] = False
            seen_TT.fill_diagonal_(True)
            given, hidden = hidden, block(hidden, attention_mask=seen_TT[None, None], position_embeddings=rotary)
            if index + 1 in cuts and visual:
                normed = block.input_layernorm(given)
                attention = block.self_attn
                shape = (1, length, -1, HEAD)
                query = attention.q_proj(normed).view(shape).transpose(1, 2)
                key = attention.k_proj(normed).view(shape).transpose(1, 2)
                query, key = (turn(states, *rotary) for states in (query, key))
                key = key.repeat_interleave(HEADS // GROUPS, dim=1)
                logits_HT = (query[0, :, -1:] @ key[0].transpose(1, 2))[:, 0] * attention.scaling
                logits_HT[:, dropped] = -torch.inf
                score = logits_HT.softmax(dim=-1).mean(dim=0)
                left = [t for t in visual if t not in dropped]
                kept = best({t: float(score[t]) for t in left}, cuts[index + 1])
                dropped += [t for t in left if t not in kept]
                number = list(cuts).index(index + 1)
                found = decision.kept_visual(number)[row].tolist()
                assert [visual[rank] for rank in found] == sorted(kept)


def turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    return states * cos[:, None] + torch.cat([-states[..., half:], states[..., :half]], dim=-1) * sin[:, None]


@torch.no_grad()
def test_spectral_energy_counts_the_singular_values_that_hold_the_share() -> None:
    model = build_model()
    settings = DecodePruning(layer=LAYER, criterion="all_heads", budget="spectral_energy", options={"share": 0.8})
    prompts, decision = cut_by(model, settings)
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        spectrum = torch.linalg.svdvals(embeds_1TC[0, visual_T].double()) if visual_T.any() else torch.zeros(0)
        energy = (spectrum.square().cumsum(0) / spectrum.square().sum()).tolist()
        expected = next((k for k, held in enumerate(energy, start=1) if held >= 0.8), 0)
        assert int(decision.kept_counts_B[row]) == expected


@torch.no_grad()
def test_equal_layers_leave_every_layer_the_same_columns() -> None:
    model, prompts = build_model(), build_prompts()
    settings = DecodePruning(
        layer=LAYER, target_mean=3.0, budget="fixed", criterion="ivc_prune", query="all_text", equal_layers=True
    )
    kv = MeteorCache(model.config, settings, LISTENING)
    prefill(model, prompts, kv)
    assert len({layer.get_seq_length() for layer in kv.layers}) == 1
    assert kv.layers[0].get_seq_length() < kv.get_seq_length() == prompts.attention_BT.shape[1]


# ---------------------------------------------------------------------------------------------- what SparseVLM recycles


def clusters_literally(tokens: Tensor, centres: int) -> dict[int, Tensor]:
    """Density peaks: centre -> mean of its cluster."""
    count, width = tokens.shape
    distance = [[float((a - b).norm()) / math.sqrt(width) for b in tokens] for a in tokens]
    density = [math.exp(-sum(d * d for d in sorted(row)[:5]) / min(5, count)) for row in distance]
    farthest = max(max(row) for row in distance)
    to_denser = [
        min((distance[i][j] for j in range(count) if density[j] > density[i]), default=farthest) for i in range(count)
    ]
    chosen = best({i: to_denser[i] * density[i] for i in range(count)}, centres)
    members: dict[int, list[int]] = {i: [i] for i in chosen}
    for i in range(count):
        if i not in chosen:
            members[min(sorted(chosen), key=lambda j: distance[i][j])].append(i)
    return {i: tokens[members[i]].mean(dim=0) for i in chosen}


@torch.no_grad()
def test_the_best_of_what_is_dropped_is_merged_into_clusters() -> None:
    sizes, centres_B = (9, 4, 1), torch.tensor([3, 1, 1])
    tokens_BRC = randn(3, 9, 5)
    valid_BR = torch.arange(9)[None] < torch.tensor(sizes)[:, None]
    centre_BR, means_BRC = merge_clusters(tokens_BRC, valid_BR, centres_B)
    for row, size in enumerate(sizes):
        expected = clusters_literally(tokens_BRC[row, :size].double(), int(centres_B[row]))
        assert centre_BR[row].nonzero().flatten().tolist() == sorted(expected)
        for index, mean in expected.items():
            torch.testing.assert_close(means_BRC[row, index].double(), mean)


@torch.no_grad()
def test_recycled_tokens_are_in_the_number_that_stays() -> None:
    model = build_model()
    options = {"recycled": 0.9, "clusters": 0.4}
    settings = DecodePruning(
        layer=LAYER, target_mean=4.0, budget="fixed", criterion="sparsevlm", query="all_text", options=options
    )
    prompts, decision = cut_by(model, settings)
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        count = min(4, int(visual_T.sum()))
        found = decision.kept_visual()[row].tolist()
        assert len(found) == count
        if int(visual_T.sum()) <= 4:
            continue
        layer = layer_of(model, embeds_1TC, visual_T)
        dropped = len(layer.visual) - count
        centres = min(math.floor(0.4 * math.floor(0.9 * dropped)) + 1, count - 1)
        score = sparsevlm_scores(layer)
        assert set(best(score, count - centres)) <= {layer.visual[rank] for rank in found}
