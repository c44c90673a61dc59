"""Stage 3 in the decoder's loop: against the library's own forward, and an uncached, unpadded, ungathered oracle.

Legend: B samples, T prompt tokens, W kept tokens of the longest, S generated tokens, C width, H heads.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, DynamicCache, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.decoder import DECODER_FAMILIES, MeteorCache, attention_mass, decode_pruned
from meteor_model.pruning import solve_lambda

VOCABULARY, WIDTH, HEADS, LAYERS, LISTENING = 40, 32, 4, 4, 2


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and on busy cores the threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_config(family: str = "llama", **changes: Any) -> Any:
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // HEADS,
        "initializer_range": 0.25,  # wide, so that attention is far from uniform
        "attn_implementation": "sdpa",
        "sliding_window": None,
        "use_sliding_window": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    if family in ("llama", "gemma"):
        values = {key: value for key, value in values.items() if "sliding" not in key}
    return AutoConfig.for_model(family, **values)


def build_model(family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(5)
    return AutoModel.from_config(build_config(family, **changes)).eval()


@dataclass
class Prompts:
    """A batch of prompts and the same prompts one by one, without padding."""

    embeds_BTC: Tensor
    attention_BT: Tensor
    positions_BT: Tensor
    visual_BT: Tensor
    singles: list[tuple[Tensor, Tensor]]  # (1, t, C) and (t,) bool


# Text before the image, visual tokens, text after it: different sizes, one text-only, one with two images.
LAYOUTS = ("tt" + "v" * 12 + "tttt", "t" + "v" * 5 + "ttt", "t" * 7, "tvvvvvttvvvvvvtt", "t" + "v" * 9 + "tt")


def build_prompts(layouts: tuple[str, ...] = LAYOUTS, side: str = "left", seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    longest = max(map(len, layouts))
    shape = (len(layouts), longest)
    embeds_BTC = torch.full((*shape, WIDTH), 7.0)  # padding that would be seen if it leaked
    attention_BT, visual_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    singles = []
    for row, layout in enumerate(layouts):
        embeds_1TC = torch.randn(1, len(layout), WIDTH, generator=generator)
        visual_T = torch.tensor([kind == "v" for kind in layout])
        start = longest - len(layout) if side == "left" else 0
        place = slice(start, start + len(layout))
        embeds_BTC[row, place], visual_BT[row, place], attention_BT[row, place] = embeds_1TC[0], visual_T, 1
        singles.append((embeds_1TC, visual_T))
    positions_BT = (attention_BT.cumsum(-1) - 1).clamp(min=0)
    return Prompts(embeds_BTC, attention_BT, positions_BT, visual_BT, singles)


def settings_for(lam: float | None = 4.0, layer: int = 2, query: Any = "last", k_min: int = 1) -> DecodePruning:
    return DecodePruning(layer=layer, query=query, lam=lam, k_min=k_min)


def new_cache(model: Any, settings: DecodePruning, num_heads: int = LISTENING) -> MeteorCache:
    return MeteorCache(model.config, settings, num_heads)


def prefill(model: Any, prompts: Prompts, cache: MeteorCache, **changes: Any) -> Any:
    return decode_pruned(
        model, prompts.embeds_BTC, prompts.attention_BT, prompts.positions_BT, prompts.visual_BT, cache, **changes
    )


# ---------------------------------------------------------------------------------------------------------- the oracle


def library_attention(model: Any, embeds_1TC: Tensor, layer: int) -> Tensor:
    """(H, T, T) attention of one layer as the library itself computes it."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    weights: Tensor = eager(inputs_embeds=embeds_1TC, output_attentions=True, use_cache=False).attentions[layer][0]
    return weights


def decide_literally(
    model: Any, embeds_1TC: Tensor, visual_T: Tensor, settings: DecodePruning, num_heads: int = LISTENING
) -> tuple[set[int], int, float]:
    """Kept prompt columns, visual count and mass of one unpadded prompt, written from the definition."""
    attention_HTT = library_attention(model, embeds_1TC, settings.layer - 1)
    visual = [int(i) for i in visual_T.nonzero().flatten()]
    length = embeds_1TC.shape[1]
    if settings.query == "last":
        rows = [length - 1]
    else:
        rows = [i for i in range(length) if i not in visual and any(j < i for j in visual)]
    row_HT = [
        [sum(attention_HTT[h, q, t].item() for q in rows) / max(len(rows), 1) for t in range(length)]
        for h in range(HEADS)
    ]
    mass_H = [sum(row_HT[h][t] for t in visual) for h in range(HEADS)]
    listening = sorted(range(HEADS), key=lambda h: (-mass_H[h], h))[:num_heads]
    score = {t: sum(row_HT[h][t] for h in listening) for t in visual}
    mass = sum(score.values())
    assert settings.lam is not None
    count = min(max(math.floor(settings.lam * mass + 0.5), min(settings.k_min, len(visual))), len(visual))
    chosen = sorted(visual, key=lambda t: (-score[t], t))[:count]
    return {i for i in range(length) if i not in visual} | set(chosen), count, mass


def last_hidden_literally(model: Any, embeds_1TC: Tensor, kept: set[int], prompt_length: int, layer: int) -> Tensor:
    """(C,) hidden state of the last token: no cache, no gather; upper layers just may not look at dropped tokens."""
    length = embeds_1TC.shape[1]
    dropped = [i for i in range(prompt_length) if i not in kept]
    seen_TT = torch.ones(length, length, dtype=torch.bool).tril()
    upper_TT = seen_TT.clone()
    upper_TT[:, dropped] = False
    upper_TT[dropped, dropped] = True  # a dropped row's own result is never read; let it be finite
    rotary = model.rotary_emb(embeds_1TC, torch.arange(length)[None])
    hidden = embeds_1TC
    for index, block in enumerate(model.layers):
        mask = (seen_TT if index < layer else upper_TT)[None, None]
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
    last: Tensor = model.norm(hidden)[0, -1]
    return last


def pick_token(model: Any, hidden_BC: Tensor) -> Tensor:
    """Greedy next token through tied embeddings."""
    return (hidden_BC @ model.embed_tokens.weight.T).argmax(-1)


def generate_literally(
    model: Any, single: tuple[Tensor, Tensor], settings: DecodePruning, steps: int
) -> tuple[list[int], Tensor, int]:
    """Tokens, (S, C) hidden states and visual count of one prompt, recomputed from scratch at every step."""
    embeds_1TC, visual_T = single
    prompt_length = embeds_1TC.shape[1]
    kept, count, _ = decide_literally(model, embeds_1TC, visual_T, settings)
    tokens, hidden_SC = [], []
    for _ in range(steps):
        hidden_SC.append(last_hidden_literally(model, embeds_1TC, kept, prompt_length, settings.layer))
        tokens.append(int(pick_token(model, hidden_SC[-1])))
        embeds_1TC = torch.cat([embeds_1TC, model.embed_tokens(torch.tensor([tokens[-1:]]))], dim=1)
    return tokens, torch.stack(hidden_SC), count


class Generation:
    """Greedy generation through `decode_pruned` with a cache, one step at a time."""

    def __init__(self, model: Any, prompts: Prompts, cache: MeteorCache) -> None:
        self.model, self.cache = model, cache
        self.output = prefill(model, prompts, cache)
        self.attention_BL = prompts.attention_BT
        self.next_B1 = prompts.positions_BT.gather(1, _last(prompts.attention_BT)) + 1
        self.hidden: list[Tensor] = [self.output.last_hidden_state[:, -1]]
        self.tokens: list[Tensor] = [pick_token(model, self.hidden[-1])]

    def step(self) -> None:
        self.attention_BL = torch.cat([self.attention_BL, torch.ones_like(self.next_B1)], dim=1)
        embeds_B1C = self.model.embed_tokens(self.tokens[-1][:, None])
        output = decode_pruned(self.model, embeds_B1C, self.attention_BL, self.next_B1, None, self.cache)
        self.next_B1 = self.next_B1 + 1
        self.hidden.append(output.last_hidden_state[:, -1])
        self.tokens.append(pick_token(self.model, self.hidden[-1]))

    def reorder(self, rows: Tensor) -> None:
        self.attention_BL, self.next_B1 = self.attention_BL[rows], self.next_B1[rows]
        self.hidden = [hidden_BC[rows] for hidden_BC in self.hidden]
        self.tokens = [tokens_B[rows] for tokens_B in self.tokens]

    def row(self, row: int) -> tuple[list[int], Tensor]:
        return [int(tokens_B[row]) for tokens_B in self.tokens], torch.stack([hidden[row] for hidden in self.hidden])


def _last(attention_BT: Tensor) -> Tensor:
    return (attention_BT * torch.arange(attention_BT.shape[1])).argmax(dim=1, keepdim=True)


def assert_row_equals(generation: Generation, row: int, expected: tuple[list[int], Tensor, int]) -> None:
    tokens, hidden_SC = generation.row(row)
    assert tokens == expected[0]
    torch.testing.assert_close(hidden_SC, expected[1], rtol=2e-4, atol=2e-5)


# ---------------------------------------------------------------------------------------------------- keep everything


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODER_FAMILIES)
@torch.no_grad()
def test_keeping_everything_equals_the_library_bit_for_bit(family: str, kernel: str) -> None:
    model = build_model(family, attn_implementation=kernel)
    for layouts in (LAYOUTS, LAYOUTS[:1] * 2, LAYOUTS[:1], LAYOUTS[2:3]):
        prompts = build_prompts(layouts)
        cache, dense_cache = new_cache(model, settings_for(lam=1e6)), DynamicCache(config=model.config)
        pruned = prefill(model, prompts, cache)
        dense = model(
            inputs_embeds=prompts.embeds_BTC,
            attention_mask=prompts.attention_BT,
            position_ids=prompts.positions_BT,
            past_key_values=dense_cache,
            use_cache=True,
        )
        assert torch.equal(pruned.last_hidden_state, dense.last_hidden_state)
        assert torch.equal(pruned.kept_counts, prompts.visual_BT.sum(1))
        mask_BL = torch.cat([prompts.attention_BT, torch.ones(len(layouts), 1, dtype=torch.long)], dim=1)
        token_B1C, position_B1 = torch.randn(len(layouts), 1, WIDTH), prompts.positions_BT[:, -1:] + 1
        stepped = decode_pruned(model, token_B1C, mask_BL, position_B1, None, cache)
        dense_step = model(
            inputs_embeds=token_B1C, attention_mask=mask_BL, position_ids=position_B1, past_key_values=dense_cache
        )
        assert torch.equal(stepped.last_hidden_state, dense_step.last_hidden_state)


@torch.no_grad()
def test_defaults_for_mask_and_positions_are_the_library_s() -> None:
    model, prompts = build_model(), build_prompts(LAYOUTS[:1])
    cache = new_cache(model, settings_for(lam=1e6))
    pruned = decode_pruned(model, prompts.embeds_BTC, None, None, prompts.visual_BT, cache)
    assert torch.equal(pruned.last_hidden_state, model(inputs_embeds=prompts.embeds_BTC).last_hidden_state)
    token_11C = torch.randn(1, 1, WIDTH)
    stepped = decode_pruned(model, token_11C, None, None, None, cache).last_hidden_state
    whole = model(inputs_embeds=torch.cat([prompts.embeds_BTC, token_11C], dim=1)).last_hidden_state[:, -1:]
    torch.testing.assert_close(stepped, whole, rtol=2e-4, atol=2e-5)


# ----------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("query", ["last", "all_text"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODER_FAMILIES)
@torch.no_grad()
def test_decision_equals_the_definition(family: str, side: str, query: str) -> None:
    model, prompts, settings = build_model(family), build_prompts(side=side), settings_for(query=query)
    cache = new_cache(model, settings)
    output = prefill(model, prompts, cache)
    starts = (prompts.attention_BT.argmax(dim=1)).tolist()
    counts = []
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        kept, count, mass = decide_literally(model, embeds_1TC, visual_T, settings)
        counts.append(count)
        index_W = output.kept_index[row]
        assert [int(i) - starts[row] for i in index_W[index_W >= 0]] == sorted(kept)
        padded = (index_W < 0).tolist()
        assert padded == sorted(padded, reverse=True), "padding must be on the left"
        assert cache.decision is not None
        assert float(cache.decision.mass_B[row]) == pytest.approx(mass, rel=1e-4)
    assert output.kept_counts.tolist() == counts
    assert output.kept_index.shape[1] == max(
        len(s[1]) - int(s[1].sum()) + c for s, c in zip(prompts.singles, counts, strict=True)
    )
    assert len(set(counts)) >= 3, "the case must mix different counts"
    assert sum(counts) < int(prompts.visual_BT.sum()), "the case must prune"
    assert counts[2] == 0, "a text-only row has nothing to keep"


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_cached_generation_equals_uncached_with_different_counts_in_one_batch(
    layer: int, side: str, kernel: str
) -> None:
    model, prompts = build_model(attn_implementation="sdpa"), build_prompts(side=side)
    settings = settings_for(layer=layer)
    expected = [generate_literally(model, single, settings, steps=6) for single in prompts.singles]
    model.set_attn_implementation(kernel)
    generation = Generation(model, prompts, new_cache(model, settings))
    for _ in range(5):
        generation.step()
    assert len({count for *_, count in expected}) >= 3
    assert generation.output.kept_counts.tolist() == [count for *_, count in expected]
    for row in range(len(LAYOUTS)):
        assert_row_equals(generation, row, expected[row])
    assert int(generation.output.kept_counts.sum()) < int(prompts.visual_BT.sum())
    lengths = [generation.cache.get_seq_length(index) for index in range(LAYERS)]
    full, short = generation.attention_BL.shape[1], generation.output.last_hidden_state.shape[1] + 5
    assert short < full
    assert lengths == [full] * layer + [short] * (LAYERS - layer)


@pytest.mark.parametrize("family", [name for name in DECODER_FAMILIES if name != "llama"])
@torch.no_grad()
def test_other_families_generate_as_the_oracle(family: str) -> None:
    model, prompts, settings = build_model(family), build_prompts(), settings_for(query="all_text")
    generation = Generation(model, prompts, new_cache(model, settings))
    for _ in range(3):
        generation.step()
    for row, single in enumerate(prompts.singles):
        assert_row_equals(generation, row, generate_literally(model, single, settings, steps=4))
    assert int(generation.output.kept_counts.sum()) < int(prompts.visual_BT.sum())


@torch.no_grad()
def test_every_kept_row_has_its_hidden_state() -> None:
    """Not only the last token: all rows of the output, mapped back by kept_index."""
    model, prompts, settings = build_model(), build_prompts(), settings_for()
    output = prefill(model, prompts, new_cache(model, settings))
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        kept, *_ = decide_literally(model, embeds_1TC, visual_T, settings)
        length = embeds_1TC.shape[1]
        start = int(prompts.attention_BT[row].argmax())
        for column, index in enumerate(output.kept_index[row].tolist()):
            if index < 0:
                continue
            upto = index - start + 1
            expected_C = last_hidden_literally(model, embeds_1TC[:, :upto], kept, min(upto, length), settings.layer)
            torch.testing.assert_close(output.last_hidden_state[row, column], expected_C, rtol=2e-4, atol=2e-5)


# ------------------------------------------------------------------------------------------------- the cache's duties


@pytest.mark.parametrize("rows", [[4, 1, 1, 0, 2], [3, 0], [2], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]])
@torch.no_grad()
def test_rows_may_be_reordered_selected_and_repeated_in_the_middle(rows: list[int]) -> None:
    model, prompts, settings = build_model(), build_prompts(), settings_for()
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
    assert generation.cache.decision.kept_counts_B.tolist() == generation.output.kept_counts[index].tolist()


@torch.no_grad()
def test_crop_takes_back_generated_tokens_but_not_the_prompt() -> None:
    model, prompts, settings = build_model(), build_prompts(), settings_for()
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


@torch.no_grad()
def test_several_new_tokens_in_one_call() -> None:
    """A second turn, or the check of a guessed continuation: Q > 1 on a filled cache."""
    model, prompts, settings = build_model(), build_prompts(), settings_for()
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


class PruningLlama(LlamaForCausalLM):
    """The smallest model that lets the library's `generate` drive stage 3."""

    visual_token = 3

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past_key_values: Any, **_: Any
    ) -> Any:  # type: ignore[override]
        embeds = self.model.embed_tokens(input_ids)
        visual = input_ids == self.visual_token
        # Visual tokens must differ from each other: their embedding depends on where they stand.
        embeds = embeds + visual[..., None] * torch.sin(position_ids[..., None] * torch.arange(1, WIDTH + 1))
        output = decode_pruned(self.model, embeds, attention_mask, position_ids, visual, past_key_values)
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state), past_key_values=output.past_key_values
        )


@torch.no_grad()
def test_beam_search_of_the_library_scores_as_the_oracle() -> None:
    torch.manual_seed(1)
    model: Any = PruningLlama(build_config(initializer_range=0.3)).eval()
    settings = settings_for(lam=2.5)
    ids = torch.tensor(
        [[5, 3, 3, 3, 3, 3, 3, 3, 9, 11], [0, 0, 0, 0, 6, 3, 3, 3, 8, 10], [0, 0, 0, 7, 12, 9, 14, 6, 5, 4]]
    )
    mask = (ids != 0).long()
    cache = new_cache(model, settings)
    beams = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, num_beams=3, num_return_sequences=2,
        max_new_tokens=5, min_new_tokens=5, do_sample=False, output_scores=True,
        return_dict_in_generate=True, length_penalty=0.0,
    )  # fmt: skip
    assert cache.decision is not None
    counts = cache.decision.kept_counts_B[::3].tolist()
    assert len(set(counts)) == 3
    assert sum(counts) < int((ids == model.visual_token).sum())
    for index, sequence in enumerate(beams.sequences):
        row = index // 2
        prompt = ids[row][mask[row].bool()]
        visual_T = prompt == model.visual_token
        whole = torch.cat([prompt, sequence[ids.shape[1] :]])
        embeds = model.model.embed_tokens(whole)[None]
        embeds = embeds + (whole == 3)[None, :, None] * torch.sin(
            torch.arange(len(whole))[None, :, None] * torch.arange(1, WIDTH + 1)
        )
        kept, *_ = decide_literally(model.model, embeds[:, : len(prompt)], visual_T, settings)
        total = 0.0
        for step in range(5):
            length = len(prompt) + step
            hidden_C = last_hidden_literally(model.model, embeds[:, :length], kept, len(prompt), settings.layer)
            logits = model.lm_head(hidden_C)
            logits_processed = logits.log_softmax(-1)
            total += float(logits_processed[whole[length]])
        assert float(beams.sequences_scores[index]) == pytest.approx(total, rel=1e-4)


# ----------------------------------------------------------------------------------------------------- the other modes


@torch.no_grad()
def test_a_pass_without_cache_equals_the_prefill_and_leaves_nothing_behind() -> None:
    model, prompts = build_model(), build_prompts()
    cache = new_cache(model, settings_for())
    without = prefill(model, prompts, cache, use_cache=False)
    assert without.past_key_values is None
    assert cache.get_seq_length() == 0
    assert cache.decision is None
    cached = prefill(model, prompts, cache)
    assert torch.equal(without.last_hidden_state, cached.last_hidden_state)
    assert torch.equal(without.kept_index, cached.kept_index)


@pytest.mark.parametrize("query", ["last", "all_text"])
@torch.no_grad()
def test_lambda_solved_on_a_calibration_batch_hits_the_target(query: Any) -> None:
    model, prompts = build_model(), build_prompts()
    settings = settings_for(lam=None, query=query)
    mass_B = attention_mass(
        model, prompts.embeds_BTC, prompts.attention_BT, prompts.positions_BT, prompts.visual_BT, settings, LISTENING
    )
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        *_, mass = decide_literally(model, embeds_1TC, visual_T, settings_for(query=query))
        assert float(mass_B[row]) == pytest.approx(mass, rel=1e-4)
    lam = solve_lambda(mass_B, prompts.visual_BT.sum(1), target_mean=5.0, k_min=1)
    output = prefill(model, prompts, new_cache(model, settings_for(lam=lam, query=query)))
    with_image_B = prompts.visual_BT.any(dim=1)
    assert float(output.kept_counts[with_image_B].double().mean()) == pytest.approx(5.0, abs=0.26)


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


@torch.no_grad()
def test_bf16_decides_and_runs() -> None:
    model, prompts = build_model().to(torch.bfloat16), build_prompts()
    prompts.embeds_BTC = prompts.embeds_BTC.to(torch.bfloat16)
    generation = Generation(model, prompts, new_cache(model, settings_for()))
    generation.step()
    assert all(bool(torch.isfinite(hidden_BC).all()) for hidden_BC in generation.hidden)
    visual_B, kept_B = prompts.visual_BT.sum(1), generation.output.kept_counts
    assert bool(((kept_B <= visual_B) & (kept_B >= visual_B.clamp(max=1))).all())
    assert int(kept_B.sum()) < int(visual_B.sum())


# ------------------------------------------------------------------------------------------------------------ refusals


def test_settings_that_cannot_work_are_refused() -> None:
    config = build_config()
    with pytest.raises(ValueError, match="lam is not set"):
        MeteorCache(config, settings_for(lam=None), LISTENING)
    with pytest.raises(ValueError, match="layer 4 is not between 1 and 3"):
        MeteorCache(config, settings_for(layer=4), LISTENING)
    with pytest.raises(ValueError, match="num_heads 5 is not between 1 and the LLM's 4"):
        MeteorCache(config, settings_for(), 5)
    with pytest.raises(ValueError, match=r"LLM layer 0 caches as DynamicSlidingWindowLayer"):
        MeteorCache(build_config("mistral", sliding_window=8), settings_for(), LISTENING)


@torch.no_grad()
def test_input_that_does_not_fit_is_refused() -> None:
    model, prompts = build_model(), build_prompts()
    embeds, mask, positions, visual = prompts.embeds_BTC, prompts.attention_BT, prompts.positions_BT, prompts.visual_BT
    with pytest.raises(ValueError, match=r"mask is \(5, 17\).*need \(5, 18\)"):
        decode_pruned(model, embeds, mask[:, 1:], positions, visual, new_cache(model, settings_for()))
    with pytest.raises(ValueError, match=r"visual mask is \(5, 17\)"):
        decode_pruned(model, embeds, mask, positions, visual[:, 1:], new_cache(model, settings_for()))
    empty = mask.clone()
    empty[1] = 0
    with pytest.raises(ValueError, match=r"samples \[1\] of the batch are all padding"):
        decode_pruned(model, embeds, empty, positions, visual, new_cache(model, settings_for()))
    filled = new_cache(model, settings_for())
    model(inputs_embeds=embeds, past_key_values=filled, use_cache=True)
    with pytest.raises(ValueError, match="18 tokens that stage 3 has not seen"):
        decode_pruned(model, embeds[:, :1], None, None, None, filled)
    used = new_cache(model, settings_for())
    prefill(model, prompts, used)
    with pytest.raises(ValueError, match="a pass without a cache got one that holds 18 tokens"):
        prefill(model, prompts, used, use_cache=False)
    other = AutoModel.from_config(AutoConfig.for_model("gpt2", vocab_size=8, n_embd=WIDTH, n_layer=4, n_head=4))
    with pytest.raises(ValueError, match="decoder family 'gpt2'"):
        decode_pruned(other, embeds, mask, positions, visual, new_cache(model, settings_for()))
    embeds = embeds.clone()
    embeds[0, 5] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        decode_pruned(model, embeds, mask, positions, visual, new_cache(model, settings_for()))
