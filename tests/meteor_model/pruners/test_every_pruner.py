"""Every named pruner through the same table: batches, images, text alone, padding, beams, turns, streams, bf16, LoRA.

What a published rule makes impossible is refused by name; `REFUSALS` lists it.

Legend: B prompts, T prompt tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.pruners.named import PRUNERS, REFUSED, with_pruner
from tests.meteor_model.pruners.build import (
    FIXED,
    LAYOUTS,
    NEW,
    PER_IMAGE,
    batch_for,
    cache_of,
    decision_of,
    dense_model,
    inputs_of_layers,
    logits_literally,
    pruned_model,
)
from tests.meteor_model.test_pruning import largest_tensor

KEEP = {"none": PER_IMAGE}
NAMES = list(PRUNERS)
IN_LLM = [name for name in NAMES if "language model" in PRUNERS[name].acts]
POOLED = [name for name in NAMES if "projected" in PRUNERS[name].acts]
#: Hidden states are merged inside the language model: a mask alone cannot say it.
MERGES_IN_LLM = {"sparsevlm"}
#: How many tokens stay is the prompt's affair.
ADAPTIVE = {"e_adaprune", "autoprune"}
SETTINGS: dict[str, dict[str, Any]] = {"e_adaprune": {"share": 0.9}, "meteor": {"leave": 20, "fused": 12}}


def keep_of(name: str) -> int:
    return KEEP.get(name, 8)


def build(name: str) -> Any:
    return pruned_model(name, keep_of(name), **SETTINGS.get(name, {}))


def kept_in_llm(kv: Any) -> list[list[list[int]]]:
    """For each pruning and sample, which visual tokens stay."""
    decision = decision_of(kv)
    cuts = [] if decision is None else range(len(decision.cuts))
    return [[kept.tolist() for kept in decision.kept_visual(cut)] for cut in cuts]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_batch_keeps_and_says_what_each_prompt_alone_does(name: str) -> None:
    model = build(name)
    batch, kv = batch_for(model), cache_of(model)
    together = model.generate(**batch.inputs, past_key_values=kv, **FIXED)[:, -NEW:]
    kept = kept_in_llm(kv)
    for row, (ids, images) in enumerate(zip(batch.ids, batch.images, strict=True)):
        alone = cache_of(model)
        pixels = {"pixel_values": images} if len(images) else {}
        tokens = model.generate(ids, past_key_values=alone, **pixels, **FIXED)[:, -NEW:]
        assert [cut[0] for cut in kept_in_llm(alone)] == [cut[row] for cut in kept]
        assert tokens[0].tolist() == together[row].tolist()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_cached_generation_with_a_second_turn_equals_an_uncached_one(name: str) -> None:
    model = build(name)
    batch = batch_for(model)
    turn = torch.tensor([[7, 8, 9]])
    for ids, images in list(zip(batch.ids, batch.images, strict=True))[2:]:
        kv = cache_of(model)
        with inputs_of_layers(model) as given:
            first = model.generate(ids, pixel_values=images, past_key_values=kv, **FIXED)
        ids_1L = torch.cat([first, turn], dim=1)
        mask_1L = torch.ones_like(ids_1L)  # the padding token may have been said
        second = model.generate(ids_1L, attention_mask=mask_1L, past_key_values=kv, **FIXED)
        said = second[0, ids.shape[1] :].tolist()
        embeds_1TC, _ = model.embed_prompts(ids, images)
        decision, merged = decision_of(kv), given if name in MERGES_IN_LLM else None
        for step in (*range(NEW), *range(NEW + 3, NEW + 3 + NEW)):
            assert int(logits_literally(model, embeds_1TC, decision, said[:step], merged).argmax()) == said[step]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_keeping_everything_is_the_dense_model_exactly(name: str) -> None:
    settings: dict[str, Any] = {"share": 1.0} if name == "e_adaprune" else {}
    model, dense = pruned_model(name, PER_IMAGE, **settings), dense_model()
    # (Energy fills at most as many tokens as the language model is wide, here 32: two images are more.)
    batch = batch_for(dense, LAYOUTS[:2] if settings else LAYOUTS)
    expected = dense(**batch.inputs, past_key_values=DynamicCache(config=dense.config.text_config)).logits
    found = model(**batch.inputs, past_key_values=cache_of(model)).logits
    attended_BT = batch.inputs["attention_mask"].bool()
    assert torch.equal(found[attended_BT], expected[attended_BT])


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_as_many_tokens_stay_as_promised(name: str) -> None:
    model = build(name)
    images_B = torch.tensor([layout.count("I") for layout in LAYOUTS])
    kv = cache_of(model)
    model.generate(**batch_for(model).inputs, past_key_values=kv, **FIXED)
    decision = decision_of(kv)
    assert kv.pruning_stats.fuse.shape == (int(images_B.sum()), model.config.tokens_per_image)
    if decision is None:
        assert model.config.tokens_per_image == keep_of(name)
    elif name in ADAPTIVE:
        assert 0 < int(decision.kept_counts_B[0]) < PER_IMAGE
        assert int(decision.kept_counts_B[1]) == 0
    else:
        assert decision.kept_counts_B.tolist() == (images_B * keep_of(name)).tolist()
        assert [len(kept) for kept in decision.kept_visual()] == (images_B * keep_of(name)).tolist()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_beams_of_a_batch_are_those_of_each_prompt(name: str) -> None:
    model = build(name)
    batch = batch_for(model, LAYOUTS[:3])
    together = model.generate(**batch.inputs, num_beams=2, **FIXED)[:, -NEW:]
    for row, (ids, images) in enumerate(zip(batch.ids, batch.images, strict=True)):
        pixels = {"pixel_values": images} if len(images) else {}
        assert model.generate(ids, num_beams=2, **pixels, **FIXED)[0, -NEW:].tolist() == together[row].tolist()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bf16_keeps_as_many(name: str) -> None:
    model = copy.deepcopy(build(name)).to(torch.bfloat16)
    kv, plain = cache_of(model), cache_of(build(name))
    sequences = model.generate(**batch_for(model).inputs, past_key_values=kv, **FIXED)
    assert sequences.shape[1] == batch_for(model).inputs["input_ids"].shape[1] + NEW
    if name not in ADAPTIVE and decision_of(kv) is not None:
        build(name).generate(**batch_for(model).inputs, past_key_values=plain, **FIXED)
        counts = [[len(kept) for kept in cut] for cut in kept_in_llm(plain)]
        assert [[len(kept) for kept in cut] for cut in kept_in_llm(kv)] == counts


@pytest.mark.parametrize("name", IN_LLM)
@torch.no_grad()
def test_adapters_act_in_what_is_scored(name: str) -> None:
    """An adapter that is merged into the weights keeps what it keeps beside them."""
    model = copy.deepcopy(build(name))
    torch.manual_seed(3)
    adapted: Any = get_peft_model(
        model, LoraConfig(r=2, target_modules=r".*self_attn.[qkv]_proj", init_lora_weights=False)
    )
    kept = []
    for each in (adapted.base_model.model, adapted.merge_and_unload()):
        kv = cache_of(each)
        each.generate(**batch_for(each).inputs, past_key_values=kv, **FIXED)
        kept.append(kept_in_llm(kv))
    assert kept[0] == kept[1]


class Heard(BaseStreamer):
    """What a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_streamer_hears_what_generate_returns(name: str) -> None:
    model, heard = build(name), Heard()
    batch = batch_for(model)
    said = model.generate(batch.ids[2], pixel_values=batch.images[2], streamer=heard, **FIXED)[0, -NEW:].tolist()
    assert heard.tokens[-NEW - 1 :] == [*said, -1]
    assert said == model.generate(batch.ids[2], pixel_values=batch.images[2], **FIXED)[0, -NEW:].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_adapters_learn_under_it_and_nothing_else_does(name: str) -> None:
    """A step of LoRA: what prunes before the language model prunes in training, too; what prunes inside it does not."""
    losses = []
    for model in (copy.deepcopy(build(name)), copy.deepcopy(dense_model())):
        torch.manual_seed(3)
        adapted: Any = get_peft_model(
            model.train(), LoraConfig(r=2, target_modules=r".*self_attn.[qkv]_proj", init_lora_weights=False)
        )
        inputs = batch_for(model).inputs
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        labels[:, :-3] = -100
        losses.append(adapted(**inputs, labels=labels).loss)
        losses[-1].backward()
        learned = {key: item.grad for key, item in adapted.named_parameters() if item.grad is not None}
        assert all("lora" in key and bool(torch.isfinite(gradient).all()) for key, gradient in learned.items())
        assert sum(float(gradient.abs().sum()) for gradient in learned.values()) > 0
    if model.config.tokens_per_image == build(name).config.tokens_per_image:
        assert torch.equal(losses[0], losses[1])
    else:
        assert not torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("name", sorted({*POOLED, "smaller_image", "pixelprune"}))
def test_training_sends_gradients_through_what_stays(name: str) -> None:
    model = copy.deepcopy(build(name)).train()
    inputs = batch_for(model).inputs
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    labels[:, :-3] = -100
    model(**inputs, labels=labels).loss.backward()
    gradients = [parameter.grad for parameter in model.projectors.parameters()]
    assert all(gradient is not None and bool(torch.isfinite(gradient).all()) for gradient in gradients)
    assert sum(float(gradient.abs().sum()) for gradient in gradients if gradient is not None) > 0


@pytest.mark.parametrize("name", IN_LLM)
@torch.no_grad()
def test_inside_the_language_model_no_map_of_all_tokens_exists(name: str) -> None:
    """Nothing that selection makes is larger than what the layers make themselves: hidden states and logits."""
    model = build(name)
    inputs = batch_for(model, ("ttttt" + "I" * 10 + "tt",)).inputs
    length = inputs["input_ids"].shape[1]
    dense_call: Callable[[], Tensor] = lambda: dense_model()(**inputs).logits  # noqa: E731
    if model.config.tokens_per_image != PER_IMAGE:
        pytest.skip("pruned before the language model as well")
    _, dense = largest_tensor(dense_call)
    _, pruned = largest_tensor(lambda: model(**inputs, past_key_values=cache_of(model), logits_to_keep=1).logits)
    assert pruned <= max(dense, length * length), "SDPA makes the causal mask of T x T booleans itself"


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_holds_its_pruner(name: str) -> None:
    config = with_pruner(dense_model().config, name, keep_of(name), **SETTINGS.get(name, {}))
    assert MeteorConfig(**config.to_dict()).to_dict() == config.to_dict()


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("fasvt", {}, r"pruner 'fasvt' is unknown; .*did you mean 'fastv'"),
    ("fastv", {"keep": 33}, "cannot keep 33 of the 32 visual tokens"),
    ("fastv", {"layers": 3}, "pruner 'fastv' does not take these settings"),
    ("fastv", {"layer": 8}, r"pruning\.decode\.layer 8 must be below the LLM's 8 layers"),
    ("none", {"keep": 8}, "'none' keeps all 32"),
    ("smaller_image", {"keep": 7}, "no smaller image gives 7 visual tokens; the nearest give 2 and 8|give 8 and"),
    *((name, {}, rf"pruner '{name}' cannot run here: ") for name in REFUSED),
]


@pytest.mark.parametrize(("name", "settings", "message"), REFUSALS)
def test_what_cannot_be_is_refused_by_name(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_pruner(dense_model().config, name, **{"keep": 8, **settings})
