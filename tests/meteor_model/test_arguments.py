"""Every argument that models of this kind take: it means here what it means there, or it is refused by name.

The dense model is held against its LLM called by hand on the same embeddings, stage 3 against a literal run without
cache and gather (test_generation.py).

Legend: B prompts, T prompt tokens, L cached and new tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, GenerationConfig, StaticCache

from meteor_model.compat import CACHE, cache_of
from tests.meteor_model.builders import PRUNED, decided, model, pixels
from tests.meteor_model.decoder.oracle import last_hidden_literally
from tests.meteor_model.test_generation import FIXED, LAYOUTS, build, literals, make_batch
from tests.meteor_model.test_transformers_habits import UNDECODED

GREEDY: dict[str, Any] = {**FIXED, "do_sample": False}


def inputs_of(layouts: tuple[str, ...] = LAYOUTS, side: str = "left") -> dict[str, Tensor]:
    inputs = make_batch(layouts).inputs
    if side == "right":
        rows = inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
        inputs = {**inputs, **{n: inputs[n].gather(1, rows) for n in ("input_ids", "attention_mask")}}
    return inputs


def dense_logits(inputs: dict[str, Tensor], **changes: Any) -> Tensor:
    """(B, T, V): the LLM itself on the embedded prompt, positions counted over what is attended."""
    built = build(enabled=False)
    embeds_BTC, _ = built.embed_prompts(inputs["input_ids"], inputs["pixel_values"])
    mask_BT = inputs["attention_mask"]
    arguments = {"attention_mask": mask_BT, "position_ids": (mask_BT.cumsum(-1) - 1).clamp(min=0), **changes}
    logits: Tensor = built.lm_head(built.language_model(inputs_embeds=embeds_BTC, **arguments).last_hidden_state)
    return logits


def four_dimensional(mask_BT: Tensor) -> Tensor:
    """What the LLM's own forward takes for this mask, bool (B, 1, T, T)."""
    length = mask_BT.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask_BT.bool()[:, None, None]
    return seen | torch.eye(length, dtype=torch.bool)  # padding sees itself, as nobody may see nothing


#: name -> arguments of `forward` made from the inputs, and what the logits then are, from the dense ones.
MEANINGS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Any]], Callable[[Tensor], Tensor]]] = {
    "nothing": (lambda _: {}, lambda x: x),
    "use_cache": (lambda _: {"use_cache": True}, lambda x: x),
    "use_cache off": (lambda _: {"use_cache": False}, lambda x: x),
    "past_key_values": (lambda _: {"past_key_values": DynamicCache()}, lambda x: x),
    "cache": (lambda _: {"cache": DynamicCache()}, lambda x: x),
    "output_hidden_states": (lambda _: {"output_hidden_states": True}, lambda x: x),
    "position_ids": (lambda i: {"position_ids": (i["attention_mask"].cumsum(-1) - 1).clamp(min=0)}, lambda x: x),
    "logits_to_keep 1": (lambda _: {"logits_to_keep": 1}, lambda x: x[:, -1:]),
    "logits_to_keep 5": (lambda _: {"logits_to_keep": 5}, lambda x: x[:, -5:]),
    "logits_to_keep too many": (lambda _: {"logits_to_keep": 10**6}, lambda x: x),
    "logits_to_keep columns": (lambda _: {"logits_to_keep": torch.tensor([7, 0, -1])}, lambda x: x[:, [7, 0, -1]]),
    "logits_to_keep mask": (
        lambda i: {"logits_to_keep": torch.arange(i["input_ids"].shape[1]) % 3 == 0},
        lambda x: x[:, ::3],
    ),
    "what is not asked": (
        lambda _: {"token_type_ids": None, "image_sizes": None, "output_attentions": False, "return_dict": True},
        lambda x: x,
    ),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MEANINGS)
@torch.no_grad()
def test_arguments_of_forward_mean_what_they_mean_to_the_llm(name: str, side: str) -> None:
    given, expected = MEANINGS[name]
    inputs = inputs_of(side=side)
    dense = expected(dense_logits(inputs))
    found = build(enabled=False)(**inputs, **given(inputs)).logits
    assert torch.equal(found, dense)
    embeds_BTC, is_image_BT = build().embed_prompts(inputs["input_ids"], inputs["pixel_values"])
    embedded = {"inputs_embeds": embeds_BTC, "image_mask": is_image_BT, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(build(enabled=False)(**embedded, **given(inputs)).logits, dense)


@torch.no_grad()
def test_masks_of_four_dimensions_and_positions_reach_the_llm() -> None:
    inputs = inputs_of()
    mask_B1TT = four_dimensional(inputs["attention_mask"])
    expected = dense_logits(inputs, attention_mask=mask_B1TT, position_ids=None)
    found = build(enabled=False)(**{**inputs, "attention_mask": mask_B1TT}).logits
    assert torch.equal(found, expected)
    positions = torch.arange(inputs["input_ids"].shape[1])[None] * 2
    expected = dense_logits(inputs, position_ids=positions)
    assert torch.equal(build(enabled=False)(**inputs, position_ids=positions).logits, expected)


# --------------------------------------------------------------------------------------- columns that stage 3 dropped


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_logits_are_those_of_the_prompt_s_own_columns(side: str) -> None:
    built, inputs, batch = build(), inputs_of(side=side), make_batch()
    cache = built.new_cache()
    everything = built(**inputs, past_key_values=cache).logits
    decision, attended_BT = decided(cache), inputs["attention_mask"].bool()
    assert everything.shape[:2] == attended_BT.shape
    alone = literals(built, batch)
    for row, one in enumerate(alone):
        start = int(attended_BT[row].int().argmax())
        dropped = [column for column in range(one.length) if column not in one.decided.kept]
        missing = everything[row].isnan().all(dim=-1).nonzero().flatten()
        assert missing.tolist() == [start + column for column in dropped]
        last_image = int(one.visual_T.nonzero().max()) if bool(one.visual_T.any()) else 0
        for column in range(last_image + 1, one.length):
            hidden_C = last_hidden_literally(
                built.language_model, one.embeds_1TC[:, : column + 1], one.decided.kept, column + 1, 2
            )
            torch.testing.assert_close(everything[row, start + column], built.lm_head(hidden_C), rtol=1e-3, atol=1e-4)
    assert not bool(everything[~attended_BT].any()), "padding is 0"
    kept_everywhere = (~everything.isnan().any(dim=2).any(dim=0)).nonzero().flatten()
    for columns in (kept_everywhere, kept_everywhere.flip(0)[:2], kept_everywhere[:1] - attended_BT.shape[1]):
        some = built(**inputs, past_key_values=built.new_cache(), logits_to_keep=columns).logits
        torch.testing.assert_close(some, everything[:, columns])
    for count in (1, 2, 5):
        if not bool(everything[:, -count:].isnan().any()):
            some = built(**inputs, past_key_values=built.new_cache(), logits_to_keep=count).logits
            torch.testing.assert_close(some, everything[:, -count:])
    gone = everything.isnan().any(dim=2).nonzero()[0]
    message = rf"asks for columns \[{int(gone[1])}\] of sample {int(gone[0])}, which stage 3 has dropped"
    with pytest.raises(ValueError, match=message):
        built(**inputs, past_key_values=built.new_cache(), logits_to_keep=gone[1:])
    with pytest.raises(ValueError, match="which stage 3 has dropped"):
        built(**inputs, past_key_values=built.new_cache(), logits_to_keep=attended_BT.shape[1])
    assert decision.kept_counts_B.tolist() == [one.decided.count for one in alone]


@torch.no_grad()
def test_keeping_everything_gives_the_dense_logits() -> None:
    built = build(lam=1e6)
    for side in ("left", "right"):
        inputs = inputs_of(side=side)
        attended_BT = inputs["attention_mask"].bool()
        found = built(**inputs, past_key_values=built.new_cache()).logits
        torch.testing.assert_close(found[attended_BT], dense_logits(inputs)[attended_BT], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_prompt_that_ends_in_an_image_is_answered_from_its_last_token() -> None:
    built, inputs = build(lam=1e-3), inputs_of(("tttI",))
    cache = built.new_cache()
    found = built(**inputs, past_key_values=cache, logits_to_keep=1)
    assert decided(cache).kept_counts_B.tolist() == [1]
    assert decided(cache).kept_index_BW[0, -1] == inputs["input_ids"].shape[1] - 1
    assert bool(found.logits.isfinite().all())


# --------------------------------------------------------------------------------------------------------- refusals

EMPTY = torch.zeros(0, 3, 64, 64, dtype=torch.uint8)
#: arguments of `forward` -> what the error says
REFUSED_BY_FORWARD: list[tuple[dict[str, Any], str]] = [
    ({"logits_to_keep": -1}, "logits_to_keep must be how many of the last columns .* got -1"),
    ({"logits_to_keep": True}, "logits_to_keep must be .* got True"),
    ({"logits_to_keep": torch.zeros(2, 2, dtype=torch.long)}, r"logits_to_keep must be .* got torch.int64 \(2, 2\)"),
    ({"logits_to_keep": torch.tensor([0.5])}, r"logits_to_keep must be .* got torch.float32 \(1,\)"),
    ({"logits_to_keep": torch.tensor([0, 99])}, r"logits_to_keep has columns 0\.\.99, the call has 0\.\.\d+"),
    ({"logits_to_keep": torch.ones(3, dtype=torch.bool)}, "logits_to_keep is a mask of 3 columns, the call has"),
    ({"attention_mask": torch.ones(2, 3, 4)}, r"the attention mask is torch.float32 \(2, 3, 4\): give \(B, L\)"),
    ({"attention_mask": pixels(2)}, r"the attention mask is torch.uint8 .* pixel_values is the third argument"),
    ({"position_ids": torch.zeros(3, 4, 5, dtype=torch.long)}, r"position_ids is \(3, 4, 5\), the tokens are"),
    ({"position_ids": torch.zeros(1, 2, dtype=torch.long)}, r"position_ids is \(1, 2\), the tokens are"),
    ({"labels": torch.zeros(4, 2, dtype=torch.long)}, r"labels is \(4, 2\), the tokens are"),
    ({"image_mask": torch.ones(4, 27, dtype=torch.bool)}, "image_mask goes with inputs_embeds"),
    ({"inputs_embeds": torch.zeros(4, 27, 32)}, "give exactly one of input_ids and inputs_embeds"),
    ({"cache_position": torch.arange(27)}, "forward does not take cache_position=.*: places are counted"),
    ({"token_type_ids": torch.zeros(4, 27)}, "forward does not take token_type_ids=.*: placeholders are found"),
    ({"mm_token_type_ids": torch.zeros(4, 27)}, "forward does not take mm_token_type_ids="),
    ({"pixel_values_videos": EMPTY}, "forward does not take pixel_values_videos=.*: there are no videos"),
    ({"image_grid_thw": torch.ones(1, 3)}, "forward does not take image_grid_thw=.*: images travel as squares"),
    ({"image_sizes": torch.ones(1, 2)}, "forward does not take image_sizes="),
    ({"vision_feature_layer": -2}, "forward does not take vision_feature_layer=-2: each encoder gives its last"),
    ({"vision_feature_select_strategy": "full"}, "forward does not take vision_feature_select_strategy='full'"),
    ({"mm_encoder_outputs": {"image": 1}}, "forward does not take mm_encoder_outputs=.*: give inputs_embeds"),
    ({"cu_seq_lens_q": torch.ones(3)}, "forward does not take cu_seq_lens_q=.*: packed rows come with document_ids"),
    ({"is_causal": True}, "forward does not take is_causal=True: the decoder looks back only"),
    ({"output_router_logits": True}, "forward does not take output_router_logits=True"),
    ({"shift_labels": torch.ones(4, 27)}, "forward does not take shift_labels=.*: give labels"),
    ({"output_hidden_state": True}, "forward does not take output_hidden_state=True; did you mean 'output_hidden_st"),
]


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize(("given", "message"), REFUSED_BY_FORWARD)
@torch.no_grad()
def test_what_forward_does_not_mean_is_refused_by_name(given: dict[str, Any], message: str, enabled: bool) -> None:
    built = build(enabled=enabled)
    with pytest.raises(ValueError, match=message):
        built(**{**inputs_of(), **given}, past_key_values=None if "labels" in given else built.new_cache())


IMAGE_REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"output_hidden_states": True}, "get_image_features does not take output_hidden_states=True"),
    ({"output_attentions": True}, "get_image_features does not take output_attentions=True"),
    ({"vision_feature_layer": -2}, "get_image_features does not take vision_feature_layer=-2: each encoder"),
    ({"vision_feature_select_strategy": "full"}, "get_image_features does not take vision_feature_select_strategy"),
    ({"image_sizes": torch.ones(1, 2)}, "get_image_features does not take image_sizes="),
    ({"image_grid_thw": torch.ones(1, 3)}, "get_image_features does not take image_grid_thw="),
    ({"interpolate_pos_encoding": True}, "get_image_features does not take interpolate_pos_encoding=True"),
]


@torch.no_grad()
def test_image_features_take_images_and_return_dict_alone() -> None:
    built = build()
    features = built.get_image_features(pixels(2))
    for same in ({"output_hidden_states": False}, {"output_attentions": None}, {"return_dict": True}):
        assert torch.equal(built.get_image_features(pixels(2), **same).pooler_output, features.pooler_output)
    assert torch.equal(built.get_image_features(pixels(2), return_dict=False)[0], features.last_hidden_state)
    for given, message in IMAGE_REFUSALS:
        with pytest.raises(ValueError, match=message):
            built.get_image_features(pixels(2), **given)


#: arguments of `generate` -> what the error says
REFUSED_BY_GENERATE: list[tuple[dict[str, Any], str]] = [
    ({"inputs": torch.ones(4, 3, dtype=torch.long)}, "the prompt is given twice, as inputs and as input_ids"),
    ({"image_mask": torch.ones(4, 27, dtype=torch.bool)}, "image_mask goes with inputs_embeds"),
    ({"attention_mask": torch.ones(4, 1, 27, 27)}, r"generate takes an attention mask \(B, T\) .* \(4, 1, 27, 27\)"),
    ({"attention_mask": {"full_attention": None}}, r"generate takes an attention mask \(B, T\) of 0 and 1, got dict"),
    ({"attention_mask": torch.ones(4, 3)}, r"the attention mask is \(4, 3\), the prompt is \(4, "),
    ({"position_ids": torch.zeros(3, 4, 27, dtype=torch.long)}, r"position_ids is \(3, 4, 27\), the tokens are"),
    ({"cache_position": torch.arange(27)}, "cache_position"),
    ({"image_grid_thw": torch.ones(1, 3)}, "image_grid_thw"),
    ({"mm_token_type_ids": torch.zeros(4, 27)}, "mm_token_type_ids"),
    ({"max_new_token": 3}, "max_new_token"),
    ({"output_hidden_states": True, "return_dict_in_generate": True}, r"\['output_hidden_states'\] cannot be given"),
    ({"output_attentions": True, "return_dict_in_generate": True}, r"\['output_attentions'\] cannot be given"),
    ({"use_cache": False, "past_key_values": DynamicCache()}, "use_cache=False and a cache contradict one another"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED_BY_GENERATE)
@torch.no_grad()
def test_what_generate_does_not_mean_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build().generate(**{**GREEDY, **inputs_of(), **given})


# --------------------------------------------------------------------------------- padding, placeholders and caches


@pytest.mark.parametrize("enabled", [False, True])
@torch.no_grad()
def test_padding_on_the_right_is_refused_where_only_the_padding_token_says_so(enabled: bool) -> None:
    built, inputs = build(enabled=enabled), inputs_of(LAYOUTS[:2], side="right")
    del inputs["attention_mask"]
    with pytest.raises(ValueError, match=r"sample 1 of the batch is padded on the right"):
        built.generate(**inputs, **GREEDY)
    unnamed = {**GREEDY, "pad_token_id": None}
    with pytest.raises(ValueError, match=r"sample 1 of the batch is padded on the right"):
        built.generate(**inputs, **unnamed, generation_config=GenerationConfig(pad_token_id=0))
    left = inputs_of(LAYOUTS[:2])
    expected = built.generate(**left, **GREEDY)
    del left["attention_mask"]
    assert torch.equal(built.generate(**left, **GREEDY), expected), "padding on the left is inferred"


@pytest.mark.parametrize("enabled", [False, True])
@torch.no_grad()
def test_a_placeholder_without_its_image_is_text_on_every_way(enabled: bool) -> None:
    built, ids = build(enabled=enabled, lam=1e-3 if enabled else None), torch.tensor([[5, 3, 3, 20, 9]])
    forward, sequence = built(ids, logits_to_keep=1).logits, ids
    cache = built.new_cache()
    generated = built.generate(ids, **GREEDY, past_key_values=cache)
    assert int(forward.argmax()) == int(generated[0, 5])
    if enabled:
        assert decided(cache).kept_counts_B.tolist() == [0], "none of them is a visual token"
        assert built(ids, past_key_values=built.new_cache()).logits.isfinite().all()
    for _ in range(5):
        sequence = torch.cat([sequence, built(sequence, logits_to_keep=1).logits.argmax(-1)], dim=1)
    assert torch.equal(generated, sequence)
    too_many = torch.full((1, built.config.tokens_per_image), 3)
    for call in (built, lambda ids: built.generate(ids, **GREEDY)):
        with pytest.raises(ValueError, match=r"image placeholders .* and no pixel_values: give its images"):
            call(too_many)


@torch.no_grad()
def test_a_cache_that_does_not_carry_stage_3_says_so() -> None:
    built, inputs = build(), inputs_of(LAYOUTS[:1])
    config = built.config.text_config
    caches = {
        "DynamicCache does not carry it": {"past_key_values": DynamicCache(config=config)},
        "StaticCache does not carry it": {"past_key_values": StaticCache(config=config, max_cache_len=64)},
        "with use_cache=False nothing is pruned": {"use_cache": False},
    }
    dense = build(enabled=False).generate(**inputs, **GREEDY)
    for message, given in caches.items():
        with pytest.warns(UserWarning, match=message) as caught:
            assert torch.equal(built.generate(**inputs, **GREEDY, **given), dense)
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        built.generate(**inputs, **GREEDY)
        build(enabled=False).generate(**inputs, **GREEDY, past_key_values=DynamicCache(config=config))


@pytest.mark.parametrize("name", ["llama", "qwen3-window", "gemma3"])
@torch.no_grad()
def test_a_cached_column_that_is_masked_later_is_hidden(name: str) -> None:
    """Keeping everything, so that the dense model says what is right; in steps and in a turn of several tokens."""
    pruned, dense, inputs = build(name, lam=1e6), build(name, enabled=False), inputs_of(LAYOUTS[:2])
    caches = [pruned.new_cache(), DynamicCache(config=dense.config.text_config)]
    assert caches[0] is not None
    mask_BL = inputs["attention_mask"]
    for built, cache in zip((pruned, dense), caches, strict=True):
        built(**inputs, past_key_values=cache)
    hides: list[tuple[int, int]] = [(0, mask_BL.shape[1] - 2), (1, mask_BL.shape[1] - 1)]
    for new in (1, 2, 1):
        ids = torch.full((2, new), 9)
        mask_BL = F.pad(mask_BL, (0, new), value=1)
        seen = [built(ids, mask_BL, past_key_values=c).logits for built, c in zip((pruned, dense), caches, strict=True)]
        torch.testing.assert_close(*seen, rtol=1e-3, atol=1e-4)
        for row, column in hides:
            mask_BL[row, column] = 0
    shown = F.pad(mask_BL, (0, 1), value=1)
    shown[1, 0] = 1
    with pytest.raises(ValueError, match="the attention mask shows columns of sample 1 that were padding"):
        pruned(torch.full((2, 1), 9), shown, past_key_values=caches[0])


@torch.no_grad()
def test_what_stages_1_and_2_kept_lies_beside_the_decision() -> None:
    built, inputs = build(), inputs_of()
    expected = built.get_image_features(inputs["pixel_values"]).pruning_stats
    for beams in (1, 2):
        cache = built.new_cache()
        assert cache is not None
        built.generate(**inputs, **GREEDY, num_beams=beams, past_key_values=cache)
        stats = cache.pruning_stats
        assert stats is not None
        assert expected is not None
        assert torch.equal(stats.fuse, expected.fuse)
        assert all(torch.equal(a, b) for a, b in zip(stats.encode["clip"], expected.encode["clip"], strict=True))
        assert len(decided(cache).kept_counts_B) == len(LAYOUTS) * beams
    filled = built.new_cache()
    output = built(**inputs, past_key_values=filled)
    assert cache_of(output) is filled
    assert filled is not None
    assert filled.pruning_stats is output.pruning_stats
    assert torch.equal(output.pruning_stats.decode, decided(filled).kept_counts_B)
    filled.reset()
    assert filled.pruning_stats is None
    assert CACHE in output


def test_training_takes_what_trainers_of_the_library_pass() -> None:
    """Trainer and PEFT name everything that a model may take, with None for what is not asked."""
    built = model(UNDECODED)
    ids = torch.full((2, 6), 9)
    loss = built(ids, labels=ids, num_items_in_batch=torch.tensor(5), output_attentions=None, return_dict=None).loss
    torch.testing.assert_close(loss * 5, built(ids, labels=ids, num_items_in_batch=1.0).loss)
    assert PRUNED.decode.enabled
