"""Stage 3 in the decoder's loop: against the library's own forward, and an uncached, unpadded, ungathered oracle.

Legend: B samples, T prompt tokens, W kept tokens of the longest, C width, H heads.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from meteor_model.decoder.cache import MeteorCache
from meteor_model.decoder.families import DECODER_FAMILIES, check_decode_settings, softcap_logits
from meteor_model.decoder.loop import decode_pruned
from meteor_model.decoder.scores import attention_mass, visual_attention_by_head
from meteor_model.pruners.counts import solve_lambda
from meteor_model.pruners.text_scores import select_heads
from tests.meteor_model.decoder.batches import (
    LAYOUTS,
    Generation,
    assert_row_equals,
    build_prompts,
    new_cache,
    prefill,
)
from tests.meteor_model.decoder.oracle import (
    DECODERS,
    HEADS,
    LAYERS,
    LISTENING,
    WIDTH,
    WINDOW,
    build_config,
    build_model,
    decide_literally,
    generate_literally,
    last_hidden_literally,
    library_attention,
    settings_for,
    windows_of,
)


def test_every_family_is_tried() -> None:
    assert {family for family, *_ in DECODERS.values()} == set(DECODER_FAMILIES)


# ---------------------------------------------------------------------------------------------------- keep everything


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_keeping_everything_equals_the_library_bit_for_bit(name: str, kernel: str) -> None:
    if kernel == "sdpa" and not DECODERS[name][2]:
        pytest.skip("the library does not run this family with SDPA")
    model = build_model(name, attn_implementation=kernel)
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
        assert torch.equal(pruned.decision.kept_counts_B, prompts.visual_BT.sum(1))
        mask_BL = torch.cat([prompts.attention_BT, torch.ones(len(layouts), 1, dtype=torch.long)], dim=1)
        token_B1C, position_B1 = torch.randn(len(layouts), 1, WIDTH), prompts.positions_BT[:, -1:] + 1
        stepped = decode_pruned(model, token_B1C, mask_BL, position_B1, None, cache)
        dense_step = model(
            inputs_embeds=token_B1C, attention_mask=mask_BL, position_ids=position_B1, past_key_values=dense_cache
        )
        if any(windows_of(model.config)):  # the library's cache has let go of columns that ours hides
            torch.testing.assert_close(stepped.last_hidden_state, dense_step.last_hidden_state, rtol=2e-4, atol=2e-5)
        else:
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


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
@torch.no_grad()
def test_logits_are_capped_as_the_family_caps_them(name: str) -> None:
    torch.manual_seed(3)
    whole = AutoModelForCausalLM.from_config(build_config(name, **({} if name == "llama" else CAP))).eval()
    prompts = build_prompts(LAYOUTS[:2])
    arguments = {"inputs_embeds": prompts.embeds_BTC, "attention_mask": prompts.attention_BT}
    raw = whole.lm_head(whole.model(**arguments).last_hidden_state)
    capped = softcap_logits(whole.config, raw)
    torch.testing.assert_close(capped, whole(**arguments).logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(capped, raw) == (name == "llama")


CAP = {"final_logit_softcapping": 0.5}


# ----------------------------------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize("query", ["last", "all_text"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decision_equals_the_definition(name: str, side: str, query: str) -> None:
    model, prompts, settings = build_model(name), build_prompts(side=side), settings_for(query=query)
    output = prefill(model, prompts, new_cache(model, settings))
    starts = (prompts.attention_BT.argmax(dim=1)).tolist()
    counts = []
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        expected = decide_literally(model, embeds_1TC, visual_T, settings)
        counts.append(expected.count)
        index_W = output.decision.kept_index_BW[row]
        assert [int(i) - starts[row] for i in index_W[index_W >= 0]] == sorted(expected.kept)
        padded = (index_W < 0).tolist()
        assert padded == sorted(padded, reverse=True), "padding must be on the left"
        assert float(output.decision.mass_B[row]) == pytest.approx(expected.mass, rel=1e-4, abs=1e-7)
        if expected.mass > 0:
            assert output.decision.heads_Bk[row].tolist() == expected.heads
        visual = [int(i) for i in visual_T.nonzero().flatten()]
        kept_visual = [place for place, column in enumerate(visual) if column in expected.kept]
        assert output.decision.kept_visual()[row].tolist() == kept_visual
    assert output.decision.kept_counts_B.tolist() == counts
    assert output.decision.kept_index_BW.shape[1] == max(
        len(s[1]) - int(s[1].sum()) + c for s, c in zip(prompts.singles, counts, strict=True)
    )
    assert len(set(counts)) >= 3, "the case must mix different counts"
    assert sum(counts) < int(prompts.visual_BT.sum()), "the case must prune"
    assert counts[2] == 0, "a text-only row has nothing to keep"


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_all_text_without_text_after_the_image_asks_the_last_token(side: str) -> None:
    model, settings = build_model(), settings_for(query="all_text", lam=6.0)
    prompts = build_prompts(("tt" + "v" * 12, "t" + "v" * 9 + "tt", "v" * 7, "tt"), side=side)
    decision = prefill(model, prompts, new_cache(model, settings)).decision
    expected = [decide_literally(model, *single, settings) for single in prompts.singles]
    assert decision.kept_counts_B.tolist() == [one.count for one in expected]
    assert decision.mass_B.tolist() == pytest.approx([one.mass for one in expected], rel=1e-4)
    assert all(expected[row].count > settings.k_min for row in (0, 2)), "somebody asks"
    starts = prompts.attention_BT.argmax(dim=1).tolist()
    for row, one in enumerate(expected):
        index_W = decision.kept_index_BW[row]
        assert {int(i) - starts[row] for i in index_W[index_W >= 0]} == one.kept


@pytest.mark.parametrize("query", ["last", "all_text"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_every_head_s_visual_attention_is_the_library_s(name: str, query: Any) -> None:
    model, prompts = build_model(name), build_prompts()
    inputs = (model, prompts.embeds_BTC, prompts.attention_BT, prompts.positions_BT, prompts.visual_BT)
    every = visual_attention_by_head(*inputs, query=query)
    assert every.shape == (len(LAYOUTS), LAYERS, HEADS)
    assert torch.equal(visual_attention_by_head(*inputs, query=query, layers=[2, 0]), every[:, [2, 0]])
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        for layer, attention_1HTT in enumerate(library_attention(model, embeds_1TC)):
            rows = torch.zeros_like(visual_T)
            rows[-1] = query == "last"
            rows |= ~visual_T & (visual_T.cumsum(0) > 0) & (query == "all_text")
            mass_H = attention_1HTT[0][:, rows][..., visual_T].sum(-1).sum(-1) / rows.sum().clamp(min=1)
            torch.testing.assert_close(every[row, layer], mass_H, rtol=1e-4, atol=1e-6)
    decided = prefill(model, prompts, new_cache(model, settings_for(query=query))).decision
    assert torch.equal(decided.heads_Bk, select_heads(every[:, 1], LISTENING))
    with pytest.raises(ValueError, match=r"layers \[4\] must be some of 0 to 3"):
        visual_attention_by_head(*inputs, layers=[4])


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
    assert generation.output.decision.kept_counts_B.tolist() == [count for *_, count in expected]
    for row in range(len(LAYOUTS)):
        assert_row_equals(generation, row, expected[row])
    assert int(generation.output.decision.kept_counts_B.sum()) < int(prompts.visual_BT.sum())
    lengths = [generation.cache.get_seq_length(index) for index in range(LAYERS)]
    full, short = generation.attention_BL.shape[1], generation.output.last_hidden_state.shape[1] + 5
    assert short < full
    assert lengths == [full] * layer + [short] * (LAYERS - layer)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "llama"])
@torch.no_grad()
def test_other_families_generate_as_the_oracle(name: str, side: str) -> None:
    """Windows of 6 columns: prompts, and what is between two kept tokens, are longer."""
    model, prompts, settings = build_model(name), build_prompts(side=side), settings_for(query="all_text")
    generation = Generation(model, prompts, new_cache(model, settings))
    for _ in range(8):
        generation.step()
    for row, single in enumerate(prompts.singles):
        assert_row_equals(generation, row, generate_literally(model, single, settings, steps=9))
    assert int(generation.output.decision.kept_counts_B.sum()) < int(prompts.visual_BT.sum())


@torch.no_grad()
def test_a_window_above_the_layer_counts_original_places() -> None:
    """By columns, the tokens before a pruned image would be near again; the oracle hides them, and it matters."""
    model, settings = build_model("mistral-window"), settings_for(lam=1e-6, layer=1)
    prompts = build_prompts(("tttt" + "v" * 12 + "tt",))
    output = prefill(model, prompts, new_cache(model, settings))
    assert output.last_hidden_state.shape[1] == 7
    embeds_1TC, visual_T = prompts.singles[0]
    kept = decide_literally(model, embeds_1TC, visual_T, settings).kept
    expected_C = last_hidden_literally(model, embeds_1TC, kept, 18, settings.layer)
    torch.testing.assert_close(output.last_hidden_state[0, -1], expected_C, rtol=2e-4, atol=2e-5)
    model.config.sliding_window = 18  # as if columns were counted: 7 of them are never 18 apart
    wide = MeteorCache(model.config, settings, LISTENING)
    assert not torch.allclose(prefill(model, prompts, wide).last_hidden_state[0, -1], expected_C, atol=1e-3)


@torch.no_grad()
def test_every_kept_row_has_its_hidden_state() -> None:
    """Not only the last token: all rows of the output, mapped back by kept_index."""
    model, prompts, settings = build_model(), build_prompts(), settings_for()
    output = prefill(model, prompts, new_cache(model, settings))
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        kept = decide_literally(model, embeds_1TC, visual_T, settings).kept
        length = embeds_1TC.shape[1]
        start = int(prompts.attention_BT[row].argmax())
        for column, index in enumerate(output.decision.kept_index_BW[row].tolist()):
            if index < 0:
                continue
            upto = index - start + 1
            expected_C = last_hidden_literally(model, embeds_1TC[:, :upto], kept, min(upto, length), settings.layer)
            torch.testing.assert_close(output.last_hidden_state[row, column], expected_C, rtol=2e-4, atol=2e-5)


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
    assert torch.equal(without.decision.kept_index_BW, cached.decision.kept_index_BW)


@pytest.mark.parametrize("query", ["last", "all_text"])
@torch.no_grad()
def test_lambda_solved_on_a_calibration_batch_hits_the_target(query: Any) -> None:
    model, prompts = build_model(), build_prompts()
    settings = settings_for(lam=None, query=query)
    mass_B = attention_mass(
        model, prompts.embeds_BTC, prompts.attention_BT, prompts.positions_BT, prompts.visual_BT, settings, LISTENING
    )
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        mass = decide_literally(model, embeds_1TC, visual_T, settings_for(query=query)).mass
        assert float(mass_B[row]) == pytest.approx(mass, rel=1e-4)
    lam = solve_lambda(mass_B, prompts.visual_BT.sum(1), target_mean=5.0, k_min=1)
    output = prefill(model, prompts, new_cache(model, settings_for(lam=lam, query=query)))
    with_image_B = prompts.visual_BT.any(dim=1)
    assert float(output.decision.kept_counts_B[with_image_B].double().mean()) == pytest.approx(5.0, abs=0.26)


@pytest.mark.parametrize("query", ["last", "all_text"])
def test_the_meta_device_gives_shapes(query: Any) -> None:
    model = AutoModel.from_config(build_config()).to("meta")
    prompts = build_prompts()
    embeds, mask, visual = (t.to("meta") for t in (prompts.embeds_BTC, prompts.attention_BT, prompts.visual_BT))
    settings = settings_for(query=query)
    assert attention_mass(model, embeds, mask, None, visual, settings, LISTENING).shape == (len(LAYOUTS),)
    output = decode_pruned(model, embeds, mask, None, visual, new_cache(model, settings))
    assert output.last_hidden_state.shape == embeds.shape


@torch.no_grad()
def test_bf16_decides_and_runs() -> None:
    model, prompts = build_model().to(torch.bfloat16), build_prompts()
    prompts.embeds_BTC = prompts.embeds_BTC.to(torch.bfloat16)
    generation = Generation(model, prompts, new_cache(model, settings_for()))
    generation.step()
    assert all(bool(torch.isfinite(hidden_BC).all()) for hidden_BC in generation.hidden)
    visual_B, kept_B = prompts.visual_BT.sum(1), generation.output.decision.kept_counts_B
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


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {}, "decoder family 'gpt2' of text_config.model_type"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is set"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"] * 6}, r"unknown types \['chunked_attention'"),
    ],
)
def test_decoders_that_cannot_be_pruned_name_their_field(family: str, changes: Any, message: str) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=12, **changes)
    with pytest.raises(ValueError, match=message):
        check_decode_settings(config, 2, 1)


@pytest.mark.parametrize(
    ("name", "kernel", "message"),
    [
        ("mistral-window", "flash_attention_2", f"'flash_attention_2' counts the {WINDOW} columns"),
        ("gemma2", "sdpa", "'sdpa' leaves out this decoder's attn_logit_softcapping"),
    ],
)
@torch.no_grad()
def test_kernels_that_do_not_do_what_the_configuration_says_are_refused(name: str, kernel: str, message: str) -> None:
    model, prompts = build_model(name), build_prompts()
    cache = new_cache(model, settings_for())
    model.config._attn_implementation = kernel
    with pytest.raises(ValueError, match=message):
        prefill(model, prompts, cache)
    with pytest.raises(ValueError, match=message):
        visual_attention_by_head(model, prompts.embeds_BTC, prompts.attention_BT, None, prompts.visual_BT)


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
    with pytest.raises(ValueError, match="10 samples on a cache of 5"):
        decode_pruned(model, embeds[:, :1].repeat(2, 1, 1), None, None, None, used)
    other = AutoModel.from_config(AutoConfig.for_model("gpt2", vocab_size=8, n_embd=WIDTH, n_layer=4, n_head=4))
    with pytest.raises(ValueError, match="decoder family 'gpt2'"):
        decode_pruned(other, embeds, mask, positions, visual, new_cache(model, settings_for()))
    embeds = embeds.clone()
    embeds[0, 5] = math.nan
    with pytest.raises(ValueError, match="NaN in 1 of 5 samples"):
        decode_pruned(model, embeds, mask, positions, visual, new_cache(model, settings_for()))


def test_gradient_checkpointing_takes_the_keys_away_and_is_refused() -> None:
    model, prompts = build_model(), build_prompts()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="LLM layer 1 left no keys of the prompt"):
        prefill(model.train(), prompts, new_cache(model, settings_for()))
