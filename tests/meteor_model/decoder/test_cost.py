"""What stage 3 spends: rows projected, values read back to the host, masks handed to the attention kernels.

Legend: B samples, T prompt tokens, L columns of a layer, Q new tokens, C width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from meteor_model.decoder.masks import build_masks
from tests.meteor_model.decoder.batches import LAYOUTS, Generation, build_prompts, new_cache, prefill
from tests.meteor_model.decoder.oracle import LAYERS, WIDTH, build_config, build_model, settings_for


def _count_projections(model: Any, layer: int) -> dict[str, list[int]]:
    """Rows that each projection of one layer is given, call by call."""
    rows: dict[str, list[int]] = {}
    for name in ("q_proj", "k_proj"):
        seen = rows[name] = []
        getattr(model.layers[layer].self_attn, name).register_forward_hook(
            lambda _, args, __, seen=seen: seen.append(args[0].shape[1])
        )
    return rows


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_scoring_projects_only_the_rows_that_ask(use_cache: bool) -> None:
    prompts = build_prompts()
    for query, asking in (("last", 1), ("all_text", 4)):
        model = build_model()
        rows = _count_projections(model, layer=1)
        prefill(model, prompts, new_cache(model, settings_for(query=query)), use_cache=use_cache)
        assert rows == {"q_proj": [18, asking], "k_proj": [18]}


class _Reads(torch.overrides.TorchFunctionMode):
    """Counts what would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reading = {Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.item, Tensor.tolist, torch.equal}
        self.count += func in reading or getattr(func, "__name__", "") in ("nonzero", "is_nonzero", "masked_select")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama", "qwen3-window"])
@pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[:1]], ids=["padded", "single"])
@torch.no_grad()
def test_a_prefill_reads_back_twice_and_a_step_of_generate_never(name: str, layouts: tuple[str, ...]) -> None:
    model, prompts = build_model(name), build_prompts(layouts)
    cache = new_cache(model, settings_for())
    with _Reads() as reads:
        generation = Generation(model, prompts, cache)
        assert reads.count == 2
        with cache.appending():  # what `generate` says of its masks
            for _ in range(3):
                generation.step()
        assert reads.count == 2
        generation.step()
        assert reads.count == 3, "a mask of one's own may hide anything"


@pytest.mark.parametrize("same", [True, False])
@torch.no_grad()
def test_nothing_padded_means_no_mask(same: bool) -> None:
    """SDPA then runs its causal kernel, above the layer too; with different counts above it there is padding."""
    model, prompts = build_model(), build_prompts(LAYOUTS[:1] * 2 if same else ("tvvvvvvvvttt", "t" * 12))
    seen: list[tuple[int, int, bool]] = []
    for index, block in enumerate(model.layers):
        block.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: seen.append(
                (index, args[0].shape[1], kwargs["attention_mask"] is None)
            ),
            with_kwargs=True,
        )
    if same:
        prompts.embeds_BTC[1] = prompts.embeds_BTC[0]
    generation = Generation(model, prompts, new_cache(model, settings_for()))
    generation.step()
    counts = generation.output.decision.kept_counts_B.tolist()
    assert (counts[0] == counts[1]) == same
    assert [unmasked for index, _, unmasked in seen if index < 2] == [True] * 4
    assert [unmasked for index, _, unmasked in seen if index >= 2] == [same] * 4


@torch.no_grad()
def test_upper_layers_see_no_position_gaps_as_packed_sequences() -> None:
    """Flash attention takes position ids with gaps for several packed sequences: they must not reach it."""
    model, prompts = build_model(), build_prompts(LAYOUTS[:1])
    seen: dict[int, Any] = {}
    for index, block in enumerate(model.layers):
        block.register_forward_pre_hook(
            lambda _, __, kwargs, index=index: seen.__setitem__(index, kwargs["position_ids"]), with_kwargs=True
        )
    prefill(model, prompts, new_cache(model, settings_for()))
    assert [seen[index] is None for index in range(LAYERS)] == [False, False, True, True]


def test_flash_attention_gets_the_two_dimensional_mask_of_the_library() -> None:
    config, hidden_BQC = build_config(attn_implementation="flash_attention_2"), torch.zeros(2, 3, WIDTH)
    seen_BL = torch.tensor([[False, True, True], [True, True, True]])
    masks = build_masks(config, None, (False,), hidden_BQC, seen_BL, None, None, layer=0)
    assert torch.equal(masks.full, seen_BL)
    assert build_masks(config, None, (False,), hidden_BQC, None, None, None, layer=0).full is None
