"""What the cache of stage 3 owes to whoever reorders, cuts, repeats, continues or shares it.

Legend: B samples, T prompt tokens, Q new tokens, C width.
"""

from __future__ import annotations

import pytest
import torch

from meteor_model.decoder.loop import decode_pruned
from tests.meteor_model.decoder.batches import LAYOUTS, Generation, assert_row_equals, build_prompts, new_cache, prefill
from tests.meteor_model.decoder.oracle import (
    build_model,
    decide_literally,
    generate_literally,
    last_hidden_literally,
    settings_for,
)


@pytest.mark.parametrize("rows", [[4, 1, 1, 0, 2], [3, 0], [2], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_rows_may_be_reordered_selected_and_repeated_in_the_middle(name: str, rows: list[int]) -> None:
    model, prompts, settings = build_model(name), build_prompts(), settings_for()
    generation = Generation(model, prompts, new_cache(model, settings))
    generation.step()
    index = torch.tensor(rows)
    if len(rows) == 5:
        generation.cache.reorder_cache(index)
    elif len(rows) == 10:
        generation.cache.batch_repeat_interleave(2)
    else:
        generation.cache.batch_select_indices(index)
    generation.reorder(index)
    for _ in range(3):
        generation.step()
    for place, row in enumerate(rows):
        assert_row_equals(generation, place, generate_literally(model, prompts.singles[row], settings, steps=5))
    assert generation.cache.decision is not None
    assert generation.cache.decision.kept_counts_B.tolist() == generation.output.decision.kept_counts_B[index].tolist()


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2"])
@torch.no_grad()
def test_crop_takes_back_generated_tokens_but_not_the_prompt(name: str) -> None:
    model, prompts, settings = build_model(name), build_prompts(), settings_for()
    generation = Generation(model, prompts, new_cache(model, settings))
    for _ in range(3):
        generation.step()
    kept = generation.tokens[:2], generation.hidden[:2]
    generation.cache.crop(-2)
    generation.cache.crop(0)
    generation.attention_BL, generation.next_B1 = generation.attention_BL[:, :-2], generation.next_B1 - 2
    generation.tokens, generation.hidden = kept
    for _ in range(3):
        generation.step()
    for row, single in enumerate(prompts.singles):
        assert_row_equals(generation, row, generate_literally(model, single, settings, steps=5))
    with pytest.raises(ValueError, match="cannot remove 5 of 22 tokens"):
        generation.cache.crop(-5)
    with pytest.raises(ValueError, match="got 3"):
        generation.cache.crop(3)
    assert generation.cache.get_seq_length() == 22, "a refused crop changes nothing"


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2"])
@torch.no_grad()
def test_several_new_tokens_in_one_call(name: str) -> None:
    """A second turn, or the check of a guessed continuation: Q > 1 on a filled cache."""
    model, prompts, settings = build_model(name), build_prompts(), settings_for()
    one_by_one = Generation(model, prompts, new_cache(model, settings))
    for _ in range(3):
        one_by_one.step()
    cache = new_cache(model, settings)
    prefill(model, prompts, cache)
    embeds_B3C = model.embed_tokens(torch.stack(one_by_one.tokens[:3], dim=1))
    mask_BL = torch.cat([prompts.attention_BT, torch.ones(len(LAYOUTS), 3, dtype=torch.long)], dim=1)
    positions_B3 = prompts.positions_BT[:, -1:] + torch.arange(1, 4)
    together = decode_pruned(model, embeds_B3C, mask_BL, positions_B3, None, cache).last_hidden_state
    torch.testing.assert_close(together, torch.stack(one_by_one.hidden[1:], dim=1), rtol=2e-4, atol=2e-5)


@torch.no_grad()
def test_two_requests_may_alternate_on_one_model() -> None:
    model, settings = build_model(), settings_for()
    first, second = build_prompts(LAYOUTS[:3], seed=1), build_prompts(LAYOUTS[2:], seed=2)
    generations = [Generation(model, prompts, new_cache(model, settings)) for prompts in (first, second)]
    for _ in range(3):
        for generation in generations:
            generation.step()
    for generation, prompts in zip(generations, (first, second), strict=True):
        for row, single in enumerate(prompts.singles):
            assert_row_equals(generation, row, generate_literally(model, single, settings, steps=4))


@torch.no_grad()
def test_a_reset_cache_starts_again() -> None:
    model, cache = build_model(), new_cache(build_model(), settings_for())
    prompts, others = build_prompts(), build_prompts(LAYOUTS[:2], seed=3)
    prefill(model, others, cache)
    cache.reset()
    assert cache.decision is None
    again, fresh = prefill(model, prompts, cache), prefill(model, prompts, new_cache(model, settings_for()))
    assert torch.equal(again.last_hidden_state, fresh.last_hidden_state)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@torch.no_grad()
def test_padding_that_comes_with_a_later_turn_is_hidden(name: str) -> None:
    """Nothing of the prompts is padded, above or below the layer; then one sample's turn is shorter."""
    model, settings, prompts = build_model(name), settings_for(), build_prompts(LAYOUTS[:1] * 2)
    prompts.embeds_BTC[1] = prompts.embeds_BTC[0]
    cache = new_cache(model, settings)
    prefill(model, prompts, cache)
    assert cache.decision is not None
    assert not cache.decision.lower_padded
    assert not cache.decision.upper_padded
    embeds_1TC, visual_T = prompts.singles[0]
    length = embeds_1TC.shape[1]
    turn_23C = model.embed_tokens(torch.tensor([[5, 6, 7], [30, 31, 8]]))
    mask_BL = torch.ones(2, length + 3, dtype=torch.long)
    mask_BL[1, length : length + 2] = 0
    positions_23 = torch.tensor([[length, length + 1, length + 2], [0, 0, length]])
    decode_pruned(model, turn_23C, mask_BL, positions_23, None, cache)
    next_21C = model.embed_tokens(torch.tensor([[9], [9]]))
    mask_BL = torch.cat([mask_BL, torch.ones(2, 1, dtype=torch.long)], dim=1)
    stepped = decode_pruned(model, next_21C, mask_BL, torch.tensor([[length + 3], [length + 1]]), None, cache)
    kept = decide_literally(model, embeds_1TC, visual_T, settings).kept
    for row, said in enumerate(([5, 6, 7, 9], [8, 9])):
        whole_1LC = torch.cat([embeds_1TC, model.embed_tokens(torch.tensor([said]))], dim=1)
        expected_C = last_hidden_literally(model, whole_1LC, kept, length, settings.layer)
        torch.testing.assert_close(stepped.last_hidden_state[row, 0], expected_C, rtol=2e-4, atol=2e-5)
