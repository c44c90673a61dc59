"""Every pruning function against a slow, literal oracle written from the definition.

Legend: B images, E encoders, N tokens, K kept, Q rows, T sequence, H heads, G key heads, P prefix tokens, D/d widths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from meteor_model.pruners.budgets import allocate_budgets
from meteor_model.pruners.counts import adaptive_counts, solve_lambda
from meteor_model.pruners.redundancy import mutual_redundancy
from meteor_model.pruners.select import best_visual, gather_tokens, select_top
from meteor_model.pruners.spectra import RANK_ESTIMATORS, singular_values, spectrum_rank
from meteor_model.pruners.text_scores import attention_rows, select_heads, text_guided_scores
from meteor_model.pruners.tower_scores import mean_similarity, prefix_attention, received_attention

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and on busy cores the threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Definition, differentiable; 0 where either vector is zero."""
    norms = a.pow(2).sum().sqrt() * b.pow(2).sum().sqrt()
    return (a * b).sum() / norms if norms > 0 else (a * b).sum() * 0.0


def assert_same_with_gradient(fast: Tensor, slow: Tensor, *inputs: Tensor) -> None:
    """Values, and the gradients of the same random projection of them, agree.

    Scores are fp32 whatever the input, so values agree closely even for bf16; its gradients are summed up in bf16.
    """
    assert fast.dtype == torch.float32
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    weight = randn(*fast.shape, seed=99)
    fast_grads = torch.autograd.grad((fast * weight).sum(), inputs)
    slow_grads = torch.autograd.grad((slow * weight).sum(), inputs)
    rtol, atol = (1e-3, 1e-5) if inputs[0].dtype == torch.float32 else (5e-2, 2e-2)
    for a, b in zip(fast_grads, slow_grads, strict=True):
        assert float(a.abs().max()) > 1e-3, "a gradient of nothing proves nothing"
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---------------------------------------------------------------------------------------------------------- selection


def select_literally(row: list[float], k: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(k):
        best = None
        for i, value in enumerate(row):
            if i not in chosen and (best is None or value > row[best]):
                best = i
        assert best is not None
        chosen.append(best)
    return sorted(chosen)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_select_top_equals_the_loop_with_ties(data: st.DataObject) -> None:
    count, batch = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    few = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 0.5, 2.0, math.inf])  # few values: many ties
    rows = data.draw(st.lists(st.lists(few, min_size=count, max_size=count), min_size=batch, max_size=batch))
    k = data.draw(st.integers(1, count))
    keep_BK = select_top(torch.tensor(rows), k)
    assert keep_BK.dtype == torch.int64
    assert keep_BK.tolist() == [select_literally(row, k) for row in rows]


def test_select_top_keeps_everything_as_arange_and_prefers_the_lower_index() -> None:
    scores_BN = randn(3, 7)
    assert torch.equal(select_top(scores_BN, 7), torch.arange(7).expand(3, 7))
    assert select_top(torch.zeros(1, 500), 3).tolist() == [[0, 1, 2]]
    assert select_top(torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0]], dtype=torch.bfloat16), 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("k", [0, -1, 6])
def test_select_top_refuses_a_count_that_is_not_there(k: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {k} of 5 tokens"):
        select_top(torch.zeros(2, 5), k)


def test_nan_is_an_error_not_a_selection() -> None:
    scores_BN = torch.zeros(2, 5)
    scores_BN[1, 3] = math.nan
    for k in (2, 5):
        with pytest.raises(ValueError, match="1 of 10 token scores are NaN"):
            select_top(scores_BN, k)
    with pytest.raises(ValueError, match="NaN"):
        adaptive_counts(torch.tensor([math.nan]), 1.0, torch.tensor([3]), 1)


def test_the_nan_check_leaves_compilation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert select_top(torch.tensor([[math.nan, 1.0]]), 1).shape == (1, 1)


def test_gather_tokens_takes_features_and_positions_and_passes_gradient() -> None:
    hidden_BND = randn(2, 5, 3).requires_grad_()
    keep_BK = torch.tensor([[0, 3], [1, 4]])
    kept_BKD = gather_tokens(hidden_BND, keep_BK)
    for b, row in enumerate(keep_BK.tolist()):
        for k, index in enumerate(row):
            assert torch.equal(kept_BKD[b, k], hidden_BND[b, index])
    (gradient,) = torch.autograd.grad(kept_BKD.sum(), hidden_BND)
    for b, n in itertools.product(range(2), range(5)):
        assert gradient[b, n].tolist() == [float(n in keep_BK[b].tolist())] * 3
    positions_BN = torch.arange(10).reshape(2, 5)
    assert gather_tokens(positions_BN, keep_BK).tolist() == [[0, 3], [6, 9]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_keeping_everything_changes_nothing(dtype: torch.dtype) -> None:
    hidden_BND = randn(2, 9, 4, dtype=dtype)
    assert torch.equal(gather_tokens(hidden_BND, select_top(randn(2, 9, seed=1), 9)), hidden_BND)


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_best_visual_equals_the_loop_with_its_own_count_per_row(data: st.DataObject) -> None:
    length, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    rows = [[data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) for _ in range(length)] for _ in range(batch)]
    visual = [[data.draw(st.booleans()) for _ in range(length)] for _ in range(batch)]
    counts = [data.draw(st.integers(0, sum(row))) for row in visual]
    keep_BT = best_visual(torch.tensor(rows), torch.tensor(visual), torch.tensor(counts))
    for b in range(batch):
        places = [t for t in range(length) if visual[b][t]]
        chosen = [places[i] for i in select_literally([rows[b][t] for t in places], counts[b])]
        assert keep_BT[b].nonzero().flatten().tolist() == chosen


# ------------------------------------------------------------------------------------------------------------ stage 1


def mean_similarity_literally(hidden_BND: Tensor) -> Tensor:
    batch, count, _ = hidden_BND.shape
    rows = []
    for b in range(batch):
        mean_D = torch.stack([hidden_BND[b, n].float() for n in range(count)]).sum(dim=0) / count
        rows.append(torch.stack([cosine(hidden_BND[b, n].float(), mean_D) for n in range(count)]))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_similarity(dtype: torch.dtype) -> None:
    hidden_BND = (randn(2, 6, 5, dtype=dtype) + 0.5).requires_grad_()
    assert_same_with_gradient(
        mean_similarity(hidden_BND),
        mean_similarity_literally(hidden_BND),
        hidden_BND,
    )


def test_mean_similarity_of_zero_tokens_and_zero_means_is_zero() -> None:
    hidden_BND = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [3.0, 0.0]], [[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]])
    assert mean_similarity(hidden_BND).tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    hidden_BND.requires_grad_()
    (gradient,) = torch.autograd.grad(mean_similarity(hidden_BND).sum(), hidden_BND)
    assert bool(torch.isfinite(gradient).all())


def test_the_background_is_what_mean_similarity_drops_first() -> None:
    background, foreground = torch.tensor([1.0, 0.1, 0.0]), torch.tensor([-0.2, 0.3, 1.0])
    hidden_BND = torch.stack([background] * 3 + [foreground] + [background] * 2)[None]
    assert 3 in select_top(-mean_similarity(hidden_BND), 1)[0].tolist()


def attention_literally(query_BHQd: Tensor, key_BHNd: Tensor, scaling: float) -> Tensor:
    batch, heads, queries, _ = query_BHQd.shape
    out = []
    for b, h, q in itertools.product(range(batch), range(heads), range(queries)):
        logits = torch.stack([(query_BHQd[b, h, q].float() * key.float()).sum() * scaling for key in key_BHNd[b, h]])
        exponentials = (logits - logits.max().detach()).exp()
        out.append(exponentials / exponentials.sum())
    return torch.stack(out).reshape(batch, heads, queries, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_prefix", [1, 3])
def test_prefix_attention(num_prefix: int, dtype: torch.dtype) -> None:
    query_BHQd = randn(2, 3, 7, 4, dtype=dtype).requires_grad_()
    key_BHNd = randn(2, 3, 7, 4, seed=1, dtype=dtype).requires_grad_()
    slow = attention_literally(query_BHQd, key_BHNd, 0.5)[:, :, 0].mean(1)[:, num_prefix:]
    fast = prefix_attention(query_BHQd, key_BHNd, 0.5, num_prefix)
    assert fast.shape == (2, 7 - num_prefix)
    assert_same_with_gradient(fast, slow, query_BHQd, key_BHNd)
    assert torch.equal(prefix_attention(query_BHQd[:, :, :1], key_BHNd, 0.5, num_prefix), fast), "CLS alone is enough"


def test_prefix_attention_needs_a_prefix() -> None:
    with pytest.raises(ValueError, match="at least one prefix token"):
        prefix_attention(randn(1, 1, 4, 2), randn(1, 1, 4, 2), 1.0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_prefix", [0, 2])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_received_attention(chunk: int, num_prefix: int, dtype: torch.dtype) -> None:
    query_BHQd = randn(2, 3, 7, 4, dtype=dtype).requires_grad_()
    key_BHNd = randn(2, 3, 7, 4, seed=1, dtype=dtype).requires_grad_()
    slow = attention_literally(query_BHQd, key_BHNd, 0.5).mean(1).mean(1)[:, num_prefix:]
    fast = received_attention(query_BHQd, key_BHNd, 0.5, num_prefix, chunk)
    assert_same_with_gradient(fast, slow, query_BHQd, key_BHNd)


def largest_tensor(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What a call returns, and the most values of any tensor that an operation of it gave."""
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    with Watch():
        result = call()
    return result, max(sizes)


def test_received_attention_never_holds_the_whole_map() -> None:
    heads, count, chunk = 4, 64, 8
    query_BHQd, key_BHNd = randn(1, heads, count, 4), randn(1, heads, count, 4)
    _, largest = largest_tensor(lambda: received_attention(query_BHQd, key_BHNd, 1.0, 0, chunk))
    assert largest == heads * chunk * count


# -------------------------------------------------------------------------------------------------------------- ranks


def with_spectrum(values: list[float], rows: int = 12, columns: int = 9, seed: int = 3) -> Tensor:
    left = torch.linalg.qr(randn(rows, rows, seed=seed))[0][:, : len(values)]
    right = torch.linalg.qr(randn(columns, columns, seed=seed + 1))[0][:, : len(values)]
    return left @ torch.diag(torch.tensor(values)) @ right.T


def feature_rank(hidden_BND: Tensor, estimator: str, **options: float) -> Tensor:
    return spectrum_rank(singular_values(hidden_BND), estimator, **options)


SPECTRA = [[4.0, 2.0, 1.0, 0.5], [1.0] * 6, [10.0, 1e-1, 1e-2, 1e-5], [3.0]]


def test_ranks_equal_their_definitions_on_a_known_spectrum() -> None:
    maps_BND = torch.stack([with_spectrum(values) for values in SPECTRA])
    for rtol in (0.3, 0.05, 1e-4):
        expected = [float(sum(v > rtol * max(values) for v in values)) for values in SPECTRA]
        assert feature_rank(maps_BND, "numerical", rtol=rtol).tolist() == expected
    for tau in (0.5, 0.9, 0.99):
        expected = []
        for values in SPECTRA:
            squares = [v * v for v in values]
            expected.append(float(next(r for r in range(1, 99) if sum(squares[:r]) >= tau * sum(squares) * (1 - 1e-6))))
        assert feature_rank(maps_BND, "energy", tau=tau * (1 - 1e-6)).tolist() == expected
    for value, spectrum in zip(feature_rank(maps_BND, "effective").tolist(), SPECTRA, strict=True):
        shares = [v / sum(spectrum) for v in spectrum]
        assert value == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-3)


@pytest.mark.parametrize("estimator", sorted(RANK_ESTIMATORS))
def test_every_rank_handles_zero_maps_wide_maps_and_bf16(estimator: str) -> None:
    assert feature_rank(torch.zeros(2, 6, 4), estimator).tolist() == [0.0, 0.0]
    rank_B = feature_rank(randn(3, 4, 50, dtype=torch.bfloat16), estimator)
    assert rank_B.dtype == torch.float32
    assert all(2 < rank <= 4 + 1e-4 for rank in rank_B.tolist())
    whole = randn(3, 8, 8)
    one_by_one = torch.cat([feature_rank(whole[b : b + 1], estimator) for b in range(3)])
    torch.testing.assert_close(feature_rank(whole, estimator), one_by_one)
    with pytest.raises(ValueError, match="NaN or infinite"):
        feature_rank(torch.full((1, 2, 2), math.nan), estimator)


def test_a_rank_names_the_nearest_estimator_and_passes_options() -> None:
    with pytest.raises(ValueError, match="did you mean 'effective'"):
        feature_rank(randn(1, 2, 2), "efective")
    with pytest.raises(ValueError, match=r"must be in \(0, 1\], not 1.5"):
        feature_rank(randn(1, 2, 2), "energy", tau=1.5)
    assert feature_rank(with_spectrum([4.0, 1.0])[None], "numerical", rtol=0.5).tolist() == [1.0]


# ------------------------------------------------------------------------------------------------------------ budgets


def allocate_literally(ranks: list[float], total: int, capacities: list[int], exponent: float) -> tuple[int, ...]:
    """Another way to the same numbers.

    The level c at which clamp(c * weight, 1, capacity) sums to the total, found on the pieces between its corners; then
    largest remainder.
    """
    weights = [Fraction(rank**exponent) for rank in ranks]

    def shares(level: Fraction) -> list[Fraction]:
        return [min(max(level * w, Fraction(1)), Fraction(c)) for w, c in zip(weights, capacities, strict=True)]

    corners = sorted(
        {Fraction(0)} | {Fraction(b) / w for w, c in zip(weights, capacities, strict=True) for b in (1, c)}
    )
    for low, high in itertools.pairwise(corners):
        below, above = sum(shares(low)), sum(shares(high))
        if below <= total <= above:
            level = low if above == below else low + (high - low) * (total - below) / (above - below)
            break
    exact = shares(level)
    budgets = [math.floor(share) for share in exact]
    while sum(budgets) < total:
        remainders = [share - budget for share, budget in zip(exact, budgets, strict=True)]
        budgets[remainders.index(max(remainders))] += 1
    return tuple(budgets)


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_budgets_equal_the_level_and_keep_their_promises(data: st.DataObject) -> None:
    encoders = data.draw(st.integers(1, 5))
    ranks = [data.draw(st.one_of(st.integers(1, 9).map(float), st.floats(0.1, 300.0))) for _ in range(encoders)]
    capacities = [data.draw(st.integers(1, 40)) for _ in range(encoders)]
    total = data.draw(st.integers(encoders, sum(capacities)))
    exponent = data.draw(st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0]))
    budgets = allocate_budgets(ranks, total, capacities, exponent)
    assert sum(budgets) == total
    assert all(1 <= k <= c for k, c in zip(budgets, capacities, strict=True))
    assert budgets == allocate_literally(ranks, total, capacities, exponent)


def test_budgets_worked_by_hand() -> None:
    roomy = [256, 256, 256]
    assert allocate_budgets([72, 75, 55], 202, roomy) == (72, 75, 55)
    assert allocate_budgets([72, 75, 55], 101, roomy) == (36, 38, 27)  # 36, 37.5, 27.5: the tie goes to the lower index
    assert allocate_budgets([72, 75, 55], 90, roomy, exponent=0.0) == (30, 30, 30)
    assert allocate_budgets([1, 2, 4], 70, roomy, exponent=-1.0) == (40, 20, 10)
    assert allocate_budgets([1, 1, 1], 8, roomy) == (3, 3, 2)
    assert allocate_budgets([8, 1, 1], 20, [10, 50, 50]) == (10, 5, 5)  # 6 of the capped are shared again
    assert allocate_budgets([1000, 1, 1], 10, [50, 50, 50]) == (8, 1, 1)  # one token each at least
    assert allocate_budgets([5, 0], 10, [3, 100]) == (3, 7)  # rank 0 takes what no other can hold
    assert allocate_budgets([1, 9], 30, [10, 20]) == (10, 20)
    assert allocate_budgets([3.7], 5, [9]) == (5,)
    # At first the capped one looks too big (7.2 of 7), but the single tokens of the small ones take it below its cap.
    assert allocate_budgets([100, 60, 1, 1, 1, 1, 1, 1], 12, [7, 9, 9, 9, 9, 9, 9, 9]) == (4, 2, 1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, 1], 21, [10, 10]), "21 tokens is larger than the 20 tokens there are"),
        (([1, 1], 1, [10, 10]), "1 tokens does not give each of 2 encoders"),
        (([1], 1, [10, 10]), "1 ranks for 2 encoders"),
        (([], 1, []), "0 ranks for 0 encoders"),
        (([1, 1], 2, [10, 0]), r"capacities \[10, 0\]"),
        (([1, math.nan], 4, [10, 10]), "encoder 1 has rank nan"),
        (([-2, 1], 4, [10, 10]), "encoder 0 has rank -2"),
        (([1, 0], 4, [10, 10], -1.0), "encoder 1 has rank 0"),
        (([0, 0], 4, [10, 10]), "every encoder has rank 0"),
        (([30.0, 1.0], 4, [10, 10], 1000.0), r"ranks \[30.0, 1.0\] to the power 1000.0 are too large"),
        (([30.0, 20.0], 4, [10, 10], -1000.0), r"ranks \[30.0, 20.0\] to the power -1000.0 are all 0"),
    ],
)
def test_budgets_that_cannot_be_are_refused_with_their_numbers(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocate_budgets(*arguments)


# ------------------------------------------------------------------------------------------------------------ stage 2


def mutual_redundancy_literally(tokens: list[Tensor]) -> Tensor:
    rows = []
    for b in range(tokens[0].shape[0]):
        row = []
        for j, own in enumerate(tokens):
            for i in range(own.shape[1]):
                total = own.new_zeros((), dtype=torch.float32) + 0.0 * own[b, i].float().sum()
                for other_index, other in enumerate(tokens):
                    if other_index != j:
                        for m in range(other.shape[1]):
                            total = total + cosine(own[b, i].float(), other[b, m].float())
                row.append(total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(4, 3, 5), (1, 6), (2, 2)])
def test_mutual_redundancy_equals_the_double_sum(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens = [randn(2, size, 6, seed=i, dtype=dtype).requires_grad_() for i, size in enumerate(sizes)]
    fast = mutual_redundancy(tokens)
    assert fast.shape == (2, sum(sizes))
    assert_same_with_gradient(fast, mutual_redundancy_literally(tokens), *tokens)


def test_mutual_redundancy_at_4096_tokens_a_tower_holds_no_map_of_them() -> None:
    count, width = 4096, 16
    tokens = [randn(1, count, width, seed=i) + 0.2 for i in range(3)]
    scores_BN, largest = largest_tensor(lambda: mutual_redundancy(tokens))
    assert largest == count * width, "nothing is larger than one tower's tokens, N x N is 256 times that"
    for j, row in ((0, 0), (1, 17), (2, count - 1)):
        similarities = [
            torch.nn.functional.cosine_similarity(tokens[j][0, row].double(), other[0].double(), dim=-1)
            for i, other in enumerate(tokens)
            if i != j
        ]
        expected = float(sum(item.sum() for item in similarities))
        assert float(scores_BN[0, j * count + row]) == pytest.approx(expected, rel=1e-4, abs=1e-2)


def test_mutual_redundancy_at_the_edges() -> None:
    assert torch.equal(mutual_redundancy([randn(2, 5, 3)]), torch.zeros(2, 5))
    tokens = [randn(1, 3, 4), torch.zeros(1, 2, 4)]
    assert torch.equal(mutual_redundancy(tokens), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="at least one encoder"):
        mutual_redundancy([])
    with pytest.raises(ValueError, match=r"\(1, 3, 4\), \(1, 3, 5\)"):
        mutual_redundancy([randn(1, 3, 4), randn(1, 3, 5)])


def test_a_token_that_another_encoder_repeats_is_dropped_first_not_one_its_own_repeats() -> None:
    a, b, c = torch.eye(3)
    first, second = torch.stack([a, a, b])[None], torch.stack([b, c])[None]
    assert mutual_redundancy([first, second]).tolist() == [[0.0, 0.0, 1.0, 1.0, 0.0]]


# ------------------------------------------------------------------------------------------------------------ stage 3


def rows_literally(
    query_BHQd: Tensor, key_BGTd: Tensor, allowed_BQT: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    batch, heads, queries, _ = query_BHQd.shape
    length, share = key_BGTd.shape[2], heads // key_BGTd.shape[1]
    out = torch.zeros(batch, heads, length)
    for b, h in itertools.product(range(batch), range(heads)):
        rows = [q for q in range(queries) if bool(allowed_BQT[b, q].any())]
        for q in rows:
            seen = [t for t in range(length) if bool(allowed_BQT[b, q, t])]
            logits = [float(query_BHQd[b, h, q] @ key_BGTd[b, h // share, t]) * scaling for t in seen]
            weights = [math.exp(softcap * math.tanh(x / softcap) if softcap else x) for x in logits]
            for t, weight in zip(seen, weights, strict=True):
                out[b, h, t] += weight / sum(weights) / len(rows)
    return out


@pytest.mark.parametrize("chunk", [1, 2, 50])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_rows_with_causality_padding_and_grouped_keys(groups: int, chunk: int) -> None:
    query_BHQd, key_BGTd = randn(3, 4, 5, 4), randn(3, groups, 5, 4, seed=1)
    allowed_BQT = torch.ones(5, 5, dtype=torch.bool).tril().repeat(3, 1, 1)
    allowed_BQT[1, :, :2] = False  # left padding: rows 0 and 1 see nothing
    allowed_BQT[2] = False  # nobody asks
    fast = attention_rows(query_BHQd, key_BGTd, allowed_BQT, 0.5, chunk=chunk)
    torch.testing.assert_close(fast, rows_literally(query_BHQd, key_BGTd, allowed_BQT, 0.5), rtol=1e-4, atol=1e-6)
    assert torch.equal(fast[2], torch.zeros(4, 5))


def test_select_heads_takes_the_most_visual_ones() -> None:
    mass_BH = torch.tensor([[0.1, 0.9, 0.5, 0.9], [0.3, 0.3, 0.3, 0.3]])
    assert select_heads(mass_BH, 2).tolist() == [[1, 3], [0, 1]]
    assert select_heads(torch.tensor([[0.1, math.nan, 0.5]]), 1).tolist() == [[1]], "a NaN must come to light"
    with pytest.raises(ValueError, match="cannot listen to 5 of 4 heads"):
        select_heads(mass_BH, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [1, 2, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_text_guided_scores(softcap: float | None, num_heads: int, dtype: torch.dtype) -> None:
    query_BHQd, key_BGTd = randn(3, 4, 1, 4, dtype=dtype), randn(3, 2, 6, 4, seed=1, dtype=dtype)
    visual_BT = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0] * 6]).bool()
    allowed_BQT = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1] * 6]).bool()[:, None]
    found = text_guided_scores(query_BHQd, key_BGTd, visual_BT, allowed_BQT, 0.5, num_heads, softcap)
    scores_BT, mass_B = found.scores_BT, found.mass_B
    assert scores_BT.dtype == mass_B.dtype == found.mass_BH.dtype == torch.float32
    rows_BHT = rows_literally(query_BHQd.float(), key_BGTd.float(), allowed_BQT, 0.5, softcap)
    for b in range(3):
        visual = visual_BT[b].nonzero().flatten().tolist()
        mass_H = [sum(float(rows_BHT[b, h, t]) for t in visual) for h in range(4)]
        chosen = sorted(range(4), key=lambda h: (-mass_H[h], h))[:num_heads]
        assert found.mass_BH[b].tolist() == pytest.approx(mass_H, rel=1e-4, abs=1e-6)
        assert found.heads_Bk[b].tolist() == sorted(chosen)
        expected = [sum(float(rows_BHT[b, h, t]) for h in chosen) if t in visual else 0.0 for t in range(6)]
        assert scores_BT[b].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert float(mass_B[b]) == pytest.approx(sum(expected), rel=1e-4, abs=1e-6)
    assert float(mass_B[2]) == 0.0


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_adaptive_counts_equal_the_formula(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 6))
    mass = [data.draw(st.floats(0, 8, width=32)) for _ in range(batch)]
    present = [data.draw(st.integers(0, 30)) for _ in range(batch)]
    lam, k_min = data.draw(st.sampled_from([0.0, 0.5, 1.0, 7.3, 1e30])), data.draw(st.integers(0, 12))
    counts = adaptive_counts(torch.tensor(mass), lam, torch.tensor(present), k_min)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [
        min(max(math.floor(lam * m + 0.5), min(k_min, n)), n) for m, n in zip(mass, present, strict=True)
    ]


def test_adaptive_counts_round_half_up_and_refuse_nonsense() -> None:
    present_B = torch.tensor([9, 9, 9, 9])
    assert adaptive_counts(torch.tensor([0.5, 1.5, 2.5, 2.49]), 1.0, present_B, 0).tolist() == [1, 2, 3, 2]
    for lam, k_min in ((-1.0, 1), (math.inf, 1), (math.nan, 1), (1.0, -1)):
        with pytest.raises(ValueError, match="lambda must be finite"):
            adaptive_counts(torch.ones(4), lam, present_B, k_min)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_no_lambda_comes_nearer_to_the_target(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 5))
    mass = [data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.7, 1.0, 1.3, 3.0])) for _ in range(batch)]
    present = [data.draw(st.integers(0, 12)) for _ in range(batch)]
    k_min = data.draw(st.integers(1, 4))
    target = data.draw(st.floats(0, 12))
    mass_B, present_B = torch.tensor(mass), torch.tensor(present)
    mass = mass_B.tolist()  # as fp32 has them
    rows = [b for b in range(batch) if present[b] > 0]
    assume(rows)

    def mean(lam: float) -> float:
        return sum(adaptive_counts(mass_B, lam, present_B, k_min)[rows].tolist()) / len(rows)

    jumps = sorted({(j - 0.5) / mass[b] for b in rows if mass[b] > 0 for j in range(1, present[b] + 1)} | {0.0})
    reachable = [mean(lam) for jump in jumps for lam in (jump * (1 - 1e-9), jump * (1 + 1e-9))] + [mean(0.0)]
    if not min(reachable) <= target <= max(reachable):
        with pytest.raises(ValueError, match="cannot be reached"):
            solve_lambda(mass_B, present_B, target, k_min)
        return
    found = mean(solve_lambda(mass_B, present_B, target, k_min))
    assert abs(found - target) <= min(abs(value - target) for value in reachable) + 1e-9


def test_lambda_hits_the_target_on_a_real_sized_batch_and_ignores_text_only_rows() -> None:
    mass_B = randn(64, seed=2).abs().clamp(max=4)
    present_B = torch.full((64,), 576)
    lam = solve_lambda(mass_B, present_B, 242.0, 16)
    assert float(adaptive_counts(mass_B, lam, present_B, 16).double().mean()) == pytest.approx(242.0, abs=1 / 64)
    with_text_B = torch.cat([mass_B, torch.zeros(10)]), torch.cat([present_B, torch.zeros(10, dtype=torch.int64)])
    assert solve_lambda(*with_text_B, 242.0, 16) == lam


def test_where_every_lambda_is_right_it_is_one_that_a_configuration_takes() -> None:
    assert solve_lambda(torch.tensor([1.0, 2.0]), torch.tensor([4, 4]), 4.0, 4) == 1.0
    assert solve_lambda(torch.zeros(2), torch.tensor([9, 9]), 3.0, 3) == 1.0


def test_lambda_out_of_reach_is_refused_with_the_range() -> None:
    mass_B, present_B = torch.tensor([1.0, 2.0]), torch.tensor([10, 20])
    for target in (3.9, 15.1):
        with pytest.raises(ValueError, match=rf"mean of {target} .* 2 samples.*between 4 .*k_min=4.* and 15"):
            solve_lambda(mass_B, present_B, target, 4)
    with pytest.raises(ValueError, match=r"between 1 .* and 5\.5"):
        solve_lambda(torch.tensor([0.0, 2.0]), torch.tensor([10, 10]), 6.0, 1)
    with pytest.raises(ValueError, match="no sample has any"):
        solve_lambda(torch.zeros(2), torch.zeros(2, dtype=torch.int64), 1.0, 1)
