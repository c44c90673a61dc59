"""`generate` of the whole model with stage 3, against a reference that has no cache, no gather and no padding.

One batch mixes an image with a short question, text alone, two images, and a conversation of several turns. Every
prompt is also run alone and literally: stages 1 and 2 on its own images, the decision from the library's own attention
maps, and every next token from a forward over the whole sequence in which upper layers may not see what was dropped.

Legend: B prompts, T prompt tokens, S new tokens, V vocabulary, C LLM width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from threading import Thread
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.decoder.cache import MeteorCache
from meteor_model.decoder.families import softcap_logits
from meteor_model.encoders import EncoderConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from tests.meteor_model.builders import pixels
from tests.meteor_model.decoder.oracle import (
    DECODERS,
    LAYERS,
    LISTENING,
    VOCABULARY,
    build_config,
    decide_literally,
    last_hidden_literally,
    library_attention,
)

PER_IMAGE, IMAGE_TOKEN, NEW = 8, 3, 5
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 16}
#: t: a text token, I: an image.
LAYOUTS = ("tItt", "ttttt", "tItttIt", "tIttttttItttttttt")
FIXED: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0}


@cache
def build(name: str = "llama", **decode: Any) -> MeteorForConditionalGeneration:
    """One tower of 16 tokens an image, 8 after fusion, and a decoder of 4 layers that prunes after its second."""
    settings: dict[str, Any] = {"layer": 2, "num_heads": LISTENING, "lam": 3.0} | decode
    pruning = PruningConfig(EncodePruning(totals=(14, 12)), FusePruning(keep=PER_IMAGE), DecodePruning(**settings))
    config = MeteorConfig(
        [EncoderConfig("clip", "clip", 64, {**TOWER, "image_size": 64})],
        text_config=build_config(name),
        pruning=pruning,
        image_size=64,
        image_token_id=IMAGE_TOKEN,
    )
    torch.manual_seed(11)
    built = MeteorForConditionalGeneration(config).eval()
    if not DECODERS[name][2]:  # some releases choose SDPA for it, which then leaves out its softcap
        built.language_model.set_attn_implementation("eager")
    for parameter_name, parameter in built.language_model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    return built


@dataclass
class Batch:
    """Prompts together and alone."""

    inputs: dict[str, Tensor]
    ids: list[Tensor]  # (1, T) each, without padding
    images: list[Tensor]  # (M, 3, 64, 64) each


def make_batch(layouts: tuple[str, ...] = LAYOUTS, seed: int = 0) -> Batch:
    return make_batch_of(layouts, PER_IMAGE, seed)


def make_batch_of(layouts: tuple[str, ...], per_image: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pool = pixels(sum(layout.count("I") for layout in layouts), seed)
    ids, images, used = [], [], 0
    for layout in layouts:
        text = torch.randint(4, VOCABULARY, (len(layout),), generator=generator).tolist()
        row = [
            token for kind, t in zip(layout, text, strict=True) for token in ([3] * per_image if kind == "I" else [t])
        ]
        ids.append(torch.tensor([row]))
        images.append(pool[used : used + layout.count("I")])
        used += layout.count("I")
    longest = max(row.shape[1] for row in ids)
    padded = [torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in ids]
    mask = [torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in ids]
    inputs = {"input_ids": torch.cat(padded), "attention_mask": torch.cat(mask), "pixel_values": pool}
    return Batch(inputs, ids, images)


class Literal:
    """One prompt, decided and continued from the definition."""

    def __init__(self, built: MeteorForConditionalGeneration, ids_1T: Tensor, images: Tensor) -> None:
        self.built, self.length = built, ids_1T.shape[1]
        embeds_1TC, visual_1T = built.embed_prompts(ids_1T, images)
        self.embeds_1TC, self.visual_T = embeds_1TC, visual_1T[0]
        settings, heads = built.config.pruning.decode, built.config.decode_heads
        self.decided = decide_literally(built.language_model, embeds_1TC, self.visual_T, settings, heads)

    def logits(self, tokens: list[int]) -> Tensor:
        """(V,) of the token after the prompt and these."""
        later = self.built.get_input_embeddings()(torch.tensor([tokens], dtype=torch.long))
        embeds_1LC = torch.cat([self.embeds_1TC, later], dim=1)
        layer = self.built.config.pruning.decode.layer
        hidden_C = last_hidden_literally(self.built.language_model, embeds_1LC, self.decided.kept, self.length, layer)
        logits = self.built.lm_head(hidden_C)
        cap = getattr(self.built.config.text_config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def greedy(self, steps: int, given: tuple[int, ...] = ()) -> list[int]:
        tokens = list(given)
        for _ in range(steps):
            tokens.append(int(self.logits(tokens).argmax()))
        return tokens[len(given) :]


def literals(built: MeteorForConditionalGeneration, batch: Batch) -> list[Literal]:
    return [Literal(built, ids, images) for ids, images in zip(batch.ids, batch.images, strict=True)]


def new_tokens(sequences: Tensor, batch: Batch) -> list[list[int]]:
    found: list[list[int]] = sequences[:, batch.inputs["input_ids"].shape[1] :].tolist()
    return found


# --------------------------------------------------------------------------------------------------- tokens, one by one


@pytest.mark.parametrize("query", ["last", "all_text"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_greedy_tokens_are_the_reference_s_in_every_family(name: str, query: str) -> None:
    built, batch = build(name, query=query), make_batch()
    pruning_cache = built.new_cache()
    assert pruning_cache is not None
    found = built.generate(**batch.inputs, **FIXED, do_sample=False, past_key_values=pruning_cache)
    expected = literals(built, batch)
    assert new_tokens(found, batch) == [literal.greedy(NEW) for literal in expected]
    decision = pruning_cache.decision
    assert decision is not None
    counts = [literal.decided.count for literal in expected]
    assert decision.kept_counts_B.tolist() == counts
    assert counts[1] == 0
    assert len(set(counts)) >= 3, "different prompts keep different numbers"
    assert sum(counts) < 5 * PER_IMAGE
    short = [pruning_cache.get_seq_length(layer) for layer in (2, 3)]
    assert max(short) < pruning_cache.get_seq_length() == batch.inputs["input_ids"].shape[1] + NEW - 1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
@torch.no_grad()
def test_logits_of_every_step_are_the_reference_s(name: str) -> None:
    built, batch = build(name), make_batch()
    found = built.generate(**batch.inputs, **FIXED, do_sample=False, return_dict_in_generate=True, output_logits=True)
    tokens = new_tokens(found.sequences, batch)
    for row, literal in enumerate(literals(built, batch)):
        for step in range(NEW):
            expected_V = literal.logits(tokens[row][:step])
            torch.testing.assert_close(found.logits[step][row], expected_V, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("copies", [1, 2])
@torch.no_grad()
def test_sampled_tokens_are_the_reference_s_with_the_same_random_numbers(copies: int) -> None:
    built, batch = build("qwen3"), make_batch()
    torch.manual_seed(23)
    found = built.generate(
        **batch.inputs, **FIXED, do_sample=True, temperature=0.8, top_k=0, num_return_sequences=copies
    )
    rows = [literal for literal in literals(built, batch) for _ in range(copies)]
    tokens: list[list[int]] = [[] for _ in rows]
    torch.manual_seed(23)
    for _ in range(NEW):
        logits_BV = torch.stack([literal.logits(said) for literal, said in zip(rows, tokens, strict=True)])
        drawn_B1 = torch.multinomial((logits_BV / 0.8).softmax(-1), 1)
        for said, token in zip(tokens, drawn_B1.flatten().tolist(), strict=True):
            said.append(token)
    assert new_tokens(found, batch) == tokens
    greedy = built.generate(**batch.inputs, **FIXED, do_sample=True, top_k=1)
    assert new_tokens(greedy, batch) == [literal.greedy(NEW) for literal in literals(built, batch)]


def beams_literally(literal: Literal, beams: int, steps: int) -> list[list[int]]:
    """All continuations of all beams, sorted; the best go on."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        grown = []
        for score, tokens in running:
            logprobs = literal.logits(tokens).log_softmax(-1).tolist()
            grown += [(score + logprob, [*tokens, token]) for token, logprob in enumerate(logprobs)]
        running = sorted(grown, key=lambda item: -item[0])[:beams]
    return [tokens for _, tokens in running]


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
@torch.no_grad()
def test_beam_search_finds_the_reference_s_beams(name: str) -> None:
    built, batch = build(name), make_batch()
    found = built.generate(
        **batch.inputs, max_new_tokens=4, eos_token_id=None, pad_token_id=0, num_beams=3, num_return_sequences=2,
        do_sample=False,
    )  # fmt: skip
    reference = literals(built, batch)
    expected = [beams_literally(literal, 3, 4)[:2] for literal in reference]
    assert new_tokens(found, batch) == [tokens for row in expected for tokens in row]
    differing = [literal.greedy(4) != row[0] for literal, row in zip(reference, expected, strict=True)]
    assert any(differing), "the case must be one where beams matter"


class Numbers:
    """A tokenizer, as far as a streamer needs one."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"{int(token)} " for token in ids)


@torch.no_grad()
def test_streamers_hear_every_token_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    built, batch = build(), make_batch(LAYOUTS[2:3])
    expected = literals(built, batch)[0].greedy(NEW)
    tokenizer: Any = Numbers()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=built.generate, kwargs={**batch.inputs, **FIXED, "do_sample": False, "streamer": streamer})
    thread.start()
    heard = "".join(streamer).split()
    thread.join()
    assert [int(token) for token in heard] == expected
    built.generate(**batch.inputs, **FIXED, do_sample=False, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert [int(token) for token in capsys.readouterr().out.split()] == expected


@torch.no_grad()
def test_two_questions_about_one_image_keep_different_tokens() -> None:
    built, batch = build(), make_batch(("tItt", "tItt"))
    batch.inputs["pixel_values"] = batch.images[0].repeat(2, 1, 1, 1)
    decision = built.prune_prompts(**batch.inputs)
    first, second = decision.kept_visual()
    assert first.tolist() != second.tolist()
    assert decision.kept_counts_B.tolist() == [len(first), len(second)]
    assert len(first) != len(second)


# ----------------------------------------------------------------------------------------------------------- more turns


@pytest.mark.parametrize("only_new_ids", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2-window"])
@torch.no_grad()
def test_a_second_turn_goes_on_with_the_used_cache(name: str, only_new_ids: bool) -> None:
    """Of different length by sample, so that there is padding between the turns."""
    built, batch = build(name), make_batch()
    used = built.new_cache()
    assert used is not None
    first = built.generate(**batch.inputs, **FIXED, do_sample=False, past_key_values=used)
    turns = [[9, 8, 7, 6], [5, 4], [30, 31, 32], [11]]
    longest = max(map(len, turns))
    turn_BQ = torch.tensor([[0] * (longest - len(turn)) + turn for turn in turns])
    mask_BL = torch.cat(
        [batch.inputs["attention_mask"], torch.ones(4, NEW, dtype=torch.long), (turn_BQ != 0).long()], dim=1
    )
    whole_BL = torch.cat([first, turn_BQ], dim=1)
    ids = whole_BL[:, used.get_seq_length() :] if only_new_ids else whole_BL
    again = None if only_new_ids else batch.inputs["pixel_values"]
    second = built.generate(ids, again, attention_mask=mask_BL, **FIXED, do_sample=False, past_key_values=used)
    spoken = new_tokens(first, batch)
    for row, literal in enumerate(literals(built, batch)):
        given = (*spoken[row], *turns[row])
        assert second[row, -NEW:].tolist() == literal.greedy(NEW, given), f"sample {row}"


@torch.no_grad()
def test_a_turn_that_the_used_cache_cannot_take_is_refused() -> None:
    built, batch = build(), make_batch()
    used = built.new_cache()
    assert used is not None
    first = built.generate(**batch.inputs, **FIXED, do_sample=False, past_key_values=used)
    length = used.get_seq_length()
    more = torch.cat([first, torch.full((4, 3), 9)], dim=1)
    for ids, mask in ((more, None), (more[:, length:], torch.ones_like(more))):
        with pytest.raises(ValueError, match=f"1 images on a cache that already holds {length} tokens"):
            built.generate(ids, pixels(1), past_key_values=used, attention_mask=mask)
    with_image = torch.cat([first, torch.full((4, PER_IMAGE), 9)], dim=1)
    with_image[2, -PER_IMAGE:] = IMAGE_TOKEN
    with pytest.raises(ValueError, match=f"sample 2 of the batch has 8 image placeholders after the {length} tokens"):
        built.generate(with_image, past_key_values=used)
    with pytest.raises(ValueError, match=f"holds {length} tokens and the {length} ids bring no new one"):
        built.generate(first[:, :length], past_key_values=used)


# ------------------------------------------------------------------------------------ what a prompt tells, and refusals


@torch.no_grad()
def test_a_prompt_s_decision_and_head_attention_without_generating() -> None:
    built, batch = build("qwen2"), make_batch()
    decision = built.prune_prompts(**batch.inputs)
    by_head = built.visual_attention_by_head(**cast(dict[str, Any], batch.inputs))
    some = built.visual_attention_by_head(**batch.inputs, layers=[1])
    mass_B, visual_B = built.visual_attention_mass(**batch.inputs)
    assert by_head.shape == (4, LAYERS, 4)
    assert torch.equal(some[:, 0], by_head[:, 1])
    torch.testing.assert_close(mass_B, decision.mass_B)
    assert visual_B.tolist() == [PER_IMAGE, 0, 2 * PER_IMAGE, 2 * PER_IMAGE]
    for row, literal in enumerate(literals(built, batch)):
        visual = literal.visual_T.nonzero().flatten().tolist()
        kept = [place for place, column in enumerate(visual) if column in literal.decided.kept]
        assert decision.kept_visual()[row].tolist() == kept
        maps = library_attention(built.language_model, literal.embeds_1TC)
        for layer in range(LAYERS):
            expected_H = maps[layer][0, :, -1, literal.visual_T].sum(-1)
            torch.testing.assert_close(by_head[row, layer], expected_H, rtol=1e-3, atol=1e-5)
    output = built(**batch.inputs, past_key_values=built.new_cache())
    assert output.pruning_stats.decode.tolist() == decision.kept_counts_B.tolist()
    assert output.pruning_stats.as_metrics()["visual_tokens/decode/kept_mean"] == pytest.approx(
        decision.kept_counts_B.float().mean().item()
    )
    alone = {"input_ids": batch.ids[3], "pixel_values": batch.images[3]}
    ones = torch.ones_like(batch.ids[3])
    for ask in (lambda m, **k: m.prune_prompts(**k).mass_B, lambda m, **k: m.visual_attention_by_head(**k),
                lambda m, **k: m.visual_attention_mass(**k)[0]):  # fmt: skip
        assert torch.equal(ask(built, **alone), ask(built, **alone, attention_mask=ones)), "no mask is no padding"
    with pytest.raises(ValueError, match=r"enabled is false or .*, so stage 3 does not act"):
        build("qwen2", enabled=False).prune_prompts(**batch.inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation 'static' is not supported: stage 3"),
        ({"generation_config": GenerationConfig(cache_implementation="offloaded")}, "'offloaded' is not supported"),
        ({"prefill_chunk_size": 4}, "prefill_chunk_size is not supported"),
        ({"generation_config": GenerationConfig(prefill_chunk_size=4)}, "prefill_chunk_size is not supported"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens is not supported: assisted decoding guesses"),
        ({"assistant_early_exit": 2}, "assistant_early_exit is not supported: assisted decoding guesses"),
    ],
)
@torch.no_grad()
def test_what_stage_3_cannot_serve_is_refused(settings: dict[str, Any], message: str) -> None:
    built, batch = build(), make_batch(LAYOUTS[:1])
    with pytest.raises(ValueError, match=message):
        built.generate(**batch.inputs, max_new_tokens=2, **settings)


@torch.no_grad()
def test_assisted_decoding_is_refused_with_stage_3_and_right_without() -> None:
    batch = make_batch(LAYOUTS[3:])
    ids = torch.cat([batch.ids[0], batch.ids[0][:, -6:]], dim=1)  # said twice: there is something to look up
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": batch.images[0]}
    dense = build(enabled=False)
    greedy = dense.generate(**inputs, **FIXED, do_sample=False)
    for assistance in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": build("llama", enabled=False, k_min=2)}):
        assert torch.equal(dense.generate(**inputs, **FIXED, do_sample=False, **assistance), greedy)
    twin = build("llama", enabled=False, k_min=3)
    called: list[Any] = []
    twin.register_forward_pre_hook(lambda *_: called.append(None))
    assert torch.equal(dense.generate(**inputs, **FIXED, do_sample=False, assistant_model=twin), greedy)
    assert len(called) <= NEW + 1, "its prompt and one guess each: the same weights see the same images and guess right"
    with pytest.raises(ValueError, match="assistant_model is not supported: assisted decoding guesses"):
        build().generate(**inputs, **FIXED, do_sample=False, assistant_model=dense)


@torch.no_grad()
def test_without_a_cache_nothing_is_pruned_in_the_llm() -> None:
    batch = make_batch()
    pruned, dense = build(), build(enabled=False)
    without = pruned.generate(**batch.inputs, **FIXED, do_sample=False, use_cache=False)
    assert torch.equal(without, dense.generate(**batch.inputs, **FIXED, do_sample=False))
    assert not torch.equal(without, pruned.generate(**batch.inputs, **FIXED, do_sample=False))


def test_a_config_with_a_decoder_that_stage_3_cannot_run_names_the_family() -> None:
    data = build().config.to_dict()
    data["text_config"] = {"model_type": "gpt2", "vocab_size": VOCABULARY, "n_layer": 4, "n_head": 4, "n_embd": 32}
    with pytest.raises(ValueError, match=r"decoder family 'gpt2' of text_config\.model_type"):
        MeteorConfig(**data)


@torch.no_grad()
def test_gemma_s_logits_are_capped_in_the_whole_model_too() -> None:
    built, batch = build("gemma2"), make_batch(LAYOUTS[:2])
    logits = built(**batch.inputs).logits
    assert float(logits.abs().max()) < 3.0
    assert torch.equal(softcap_logits(build().config.text_config, logits), logits)
    assert isinstance(built.new_cache(), MeteorCache)
