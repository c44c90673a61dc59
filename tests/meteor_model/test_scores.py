"""Scores of stage 1 that avoid work, against the same written out in fp64."""

from __future__ import annotations

import pytest
import torch

from meteor_model.encoders.at_hand import whole_weight
from meteor_model.pruners.redundancy import mutual_redundancy
from meteor_model.pruners.text_scores import attention_rows
from meteor_model.pruners.tower_scores import (
    absorbed_prefix_attention,
    evenly_spaced,
    mean_similarity,
    prefix_attention,
    received_attention,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_prefix", [1, 3])
@torch.no_grad()
def test_absorbed_keys_give_the_attention_of_cls(num_prefix: int, dtype: torch.dtype) -> None:
    """Oracle: keys W x + b of every token, softmax head by head; a large bias changes nothing."""
    heads, width, tokens = 4, 8, 20
    hidden_BTD, query_BHd = randn(2, tokens, 24, dtype=dtype), randn(2, heads, width, seed=1, dtype=dtype)
    weight, bias = randn(heads * width, 24, seed=2, dtype=dtype), 5 * randn(heads * width, seed=3)
    fast = absorbed_prefix_attention(query_BHd, hidden_BTD, weight, 0.3, num_prefix)
    assert fast.dtype == torch.float32
    for sample in range(2):
        keys = hidden_BTD[sample].double() @ weight.double().T + bias.double()
        rows = [
            torch.softmax(keys[:, head * width : (head + 1) * width] @ query_BHd[sample, head].double() * 0.3, 0)
            for head in range(heads)
        ]
        expected = torch.stack(rows).mean(0)[num_prefix:]
        torch.testing.assert_close(fast[sample].double(), expected, rtol=1e-4, atol=1e-8)


def test_evenly_spaced() -> None:
    cpu = torch.device("cpu")
    assert evenly_spaced(12, 4, cpu).tolist() == [1, 4, 7, 10]
    assert evenly_spaced(10, 4, cpu).tolist() == [1, 3, 6, 8]
    for wanted in (None, 10, 11):
        assert evenly_spaced(10, wanted, cpu).tolist() == list(range(10))
    for count in range(1, 40):
        for wanted in range(1, count + 1):
            chosen = evenly_spaced(count, wanted, cpu).tolist()
            assert len(set(chosen)) == wanted
            assert chosen == sorted(chosen)
            # As far from one end as from the other, to within the rounding of one index.
            assert abs(chosen[0] - (count - 1 - chosen[-1])) <= 1


def test_attention_from_some_queries_is_their_mean_over_all_keys() -> None:
    query_BHNd, key_BHNd = randn(2, 3, 9, 4), randn(2, 3, 9, 4, seed=1)
    pick_Q = evenly_spaced(9, 3, torch.device("cpu"))
    rows = torch.softmax(query_BHNd.double() @ key_BHNd.double().transpose(2, 3) * 0.5, dim=-1).mean(1)
    few = received_attention(query_BHNd[:, :, pick_Q], key_BHNd, 0.5, chunk=2)
    torch.testing.assert_close(few.double(), rows[:, pick_Q].mean(1), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(few.sum(-1), torch.ones(2))


def test_only_a_whole_linear_layer_is_read() -> None:
    layer, like = torch.nn.Linear(4, 6), torch.zeros(1)
    assert whole_weight(layer, like) is layer.weight
    assert whole_weight(torch.nn.Sequential(layer), like) is None
    assert whole_weight(layer, torch.empty(1, device="meta")) is None, "offloaded: the weight is elsewhere"
    hook = layer.register_forward_hook(lambda *_: None)
    assert whole_weight(layer, like) is None, "what a hook does to the output only a call knows"
    hook.remove()
    layer.weight.data = torch.empty(0)  # what ZeRO-3 leaves of a layer outside of a forward
    assert whole_weight(layer, like) is None


HIDDEN, QUERY, KEY = randn(2, 9, 8), randn(2, 2, 9, 4, seed=1), randn(2, 2, 9, 4, seed=2)
SCORES = {
    "mean_similarity": lambda: mean_similarity(HIDDEN),
    "prefix_attention": lambda: prefix_attention(QUERY, KEY, 0.5, 1),
    "absorbed": lambda: absorbed_prefix_attention(QUERY[:, :, 0], HIDDEN, randn(8, 8, seed=3), 0.5, 1),
    "received": lambda: received_attention(QUERY, KEY, 0.5),
    "mutual_redundancy": lambda: mutual_redundancy([HIDDEN, HIDDEN.flip(1)]),
    "attention_rows": lambda: attention_rows(QUERY, KEY, torch.ones(2, 9, 9, dtype=torch.bool), 0.5),
}


@pytest.mark.parametrize("name", sorted(SCORES))
def test_autocast_does_not_round_a_score(name: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (HIDDEN @ HIDDEN.mT).dtype == torch.bfloat16
        mixed = SCORES[name]()
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, SCORES[name]())
