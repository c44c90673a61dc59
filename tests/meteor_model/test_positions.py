"""Positions in the language model: of the dense model for what stages 1 and 2 keep, and renumbered above stage 3.

Legend: B prompts, T prompt tokens, M images, K visual tokens of an image, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.encoders import EncoderConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.positions import original_places, prompt_positions
from tests.meteor_model.decoder.batches import Generation, build_prompts, new_cache
from tests.meteor_model.decoder.oracle import build_config, build_model, decide_literally, last_hidden_literally
from tests.meteor_model.pruners.build import CLIP, CONV, FIXED, IMAGE_TOKEN, LAYOUTS, NEW
from tests.meteor_model.test_generation import Batch, make_batch_of

PER_IMAGE, SPAN = 10, 32


@cache
def build(**decode: Any) -> MeteorForConditionalGeneration:
    """Two towers of 16 tokens, 12 + 10 after stage 1, 10 of them in the language model."""
    encoders = [
        EncoderConfig("clip", "clip", 64, {**CLIP, "image_size": 64}),
        EncoderConfig("convnext", "convnext", 64, {**CONV, "layer_scale_init_value": 1.0}),
    ]
    pruning = PruningConfig(
        EncodePruning(totals=(14, 22)),
        FusePruning(keep=PER_IMAGE, floor=0.5, positions="original"),
        DecodePruning(**(decode or {"enabled": False})),
    )
    config = MeteorConfig(
        encoders,
        text_config=build_config("llama"),
        pruning=pruning,
        image_size=64,
        image_token_id=IMAGE_TOKEN,
    )
    torch.manual_seed(11)
    return MeteorForConditionalGeneration(config).eval()


def positions_literally(ids: list[int], places: list[list[int]], span: int) -> list[int]:
    """Of one prompt without padding."""
    found, start, image, slot = [], 0, 0, 0
    for token in ids:
        if token != IMAGE_TOKEN:
            found.append(start)
            start += 1
            continue
        found.append(start + places[image][slot])
        slot += 1
        if slot == len(places[image]):
            start, image, slot = start + span, image + 1, 0
    return found


def batch_for() -> Batch:
    return make_batch_of(LAYOUTS, PER_IMAGE)


def places_of(model: MeteorForConditionalGeneration, images: Tensor) -> list[list[int]]:
    """From the kept tokens of each stage, token by token."""
    if not len(images):
        return []
    _, stats = model.encode_images(images)
    found = []
    for image in range(len(images)):
        pool = [(0, int(cell)) for cell in stats.encode["clip"][-1][image]]
        pool += [(16, int(cell)) for cell in stats.encode["convnext"][-1][image]]
        found.append([sum(pool[int(index)]) for index in stats.fuse[image]])
        assert found[-1] == original_places(model.config, stats)[image].tolist()
    return found


@torch.no_grad()
def test_kept_tokens_stand_where_they_would_if_none_were_dropped() -> None:
    model, batch = build(), batch_for()
    stats = model.encode_images(batch.inputs["pixel_values"])[1]
    mask_BT = batch.inputs["attention_mask"]
    is_image_BT = batch.inputs["input_ids"] == IMAGE_TOKEN
    found_BT = prompt_positions(is_image_BT, mask_BT, original_places(model.config, stats), SPAN)
    for row, (ids, images) in enumerate(zip(batch.ids, batch.images, strict=True)):
        expected = positions_literally(ids[0].tolist(), places_of(model, images), SPAN)
        assert found_BT[row, mask_BT[row].bool()].tolist() == expected
        assert not found_BT[row, ~mask_BT[row].bool()].any()
    alone = prompt_positions(is_image_BT[3:], None, original_places(model.config, stats)[3:], SPAN)
    assert alone[0].tolist() == positions_literally(batch.ids[3][0].tolist(), places_of(model, batch.images[3]), SPAN)


@torch.no_grad()
def logits_uncached(model: MeteorForConditionalGeneration, ids: Tensor, images: Tensor, said: list[int]) -> Tensor:
    """(V,) after a prompt and what was said, in the decoder's own forward."""
    embeds, is_image = model.embed_prompts(ids, images)
    later = model.get_input_embeddings()(torch.tensor([said], dtype=torch.long))
    positions = positions_literally(ids[0].tolist(), places_of(model, images), SPAN)
    next_one = SPAN * len(images) + int((~is_image).sum())
    positions += [next_one + index for index in range(len(said))]
    whole = torch.cat([embeds, later], dim=1)
    seen = torch.ones(1, whole.shape[1], dtype=torch.long)  # without it gaps would end packed sequences
    hidden = model.language_model(
        inputs_embeds=whole, attention_mask=seen, position_ids=torch.tensor([positions]), use_cache=False
    )
    logits: Tensor = model.lm_head(hidden.last_hidden_state[0, -1])
    return logits


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_generation_forward_and_a_later_turn_go_on_from_the_dense_model_s_positions(cached: bool) -> None:
    model, batch = build(), batch_for()
    arguments: dict[str, Any] = {"past_key_values": model.recording_cache()} if cached else {"use_cache": False}
    first = model.generate(**batch.inputs, **arguments, **FIXED)
    logits = model(**batch.inputs, logits_to_keep=1).logits[:, 0]
    said = first[:, batch.inputs["input_ids"].shape[1] :].tolist()
    for row, (ids, images) in enumerate(zip(batch.ids, batch.images, strict=True)):
        torch.testing.assert_close(logits[row], logits_uncached(model, ids, images, []), rtol=1e-4, atol=1e-5)
        for step in range(NEW):
            assert int(logits_uncached(model, ids, images, said[row][:step]).argmax()) == said[row][step]
    alone = model(batch.ids[2], pixel_values=batch.images[2], logits_to_keep=1).logits[0, 0]
    torch.testing.assert_close(alone, logits[2], rtol=1e-4, atol=1e-5)
    if not cached:
        return
    turn = torch.tensor([[7, 8, 9]] * len(first))
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones(len(first), NEW + 3, dtype=torch.long)], dim=1)
    second = model.generate(torch.cat([first, turn], dim=1), attention_mask=mask, **arguments, **FIXED)
    for row, (ids, images) in enumerate(zip(batch.ids, batch.images, strict=True)):
        whole = [*said[row], 7, 8, 9]
        for token in second[row, -NEW:].tolist():
            assert int(logits_uncached(model, ids, images, whole).argmax()) == token
            whole.append(token)


@torch.no_grad()
def test_stage_3_and_beams_keep_them_and_steps_by_hand_go_on() -> None:
    model, batch = build(layer=2, lam=1e6), batch_for()  # keeps everything, through stage 3's own loop
    used = model.new_cache()
    first = model.generate(**batch.inputs, **FIXED, past_key_values=used)
    plain = build().generate(**batch.inputs, **FIXED)
    assert torch.equal(first, plain)
    beams = model.generate(**batch.inputs, **FIXED, num_beams=2)
    assert torch.equal(beams, build().generate(**batch.inputs, **FIXED, num_beams=2))
    for kv in (model.new_cache(), build().recording_cache()):
        model(**batch.inputs, past_key_values=kv, use_cache=True)
        mask = torch.cat([batch.inputs["attention_mask"], torch.ones(len(first), 1, dtype=torch.long)], dim=1)
        start = batch.inputs["input_ids"].shape[1]
        stepped = model(first[:, start : start + 1], mask, past_key_values=kv).logits[:, -1]
        assert stepped.argmax(dim=1).tolist() == first[:, start + 1].tolist()
    plain_cache = DynamicCache(config=model.config.text_config)
    model(**batch.inputs, past_key_values=plain_cache, use_cache=True)
    with pytest.raises(ValueError, match="does not know where its positions stand"):
        model(first[:, :1], past_key_values=plain_cache)


def test_positions_that_cannot_be_are_refused() -> None:
    config = build().config
    with pytest.raises(ValueError, match="gives an image 32 positions, the LLM has 20"):
        MeteorConfig(**{**config.to_dict(), "text_config": build_config("llama", max_position_embeddings=20)})
    with pytest.raises(ValueError, match=r"pruning\.fuse\.positions must be one of original, renumbered, got 'old'"):
        replace(config.pruning.fuse, positions="old")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pruning\.decode\.positions must be one of original, renumbered, got 'old'"):
        DecodePruning(positions="old")  # type: ignore[arg-type]
    everything = PruningConfig(EncodePruning(False), FusePruning(False, positions="original"), DecodePruning(False))
    assert not config.with_pruning(everything).keeps_positions, "nothing is dropped"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2-window"])
@torch.no_grad()
def test_above_stage_3_tokens_are_numbered_anew(name: str, side: str) -> None:
    model, prompts = build_model(name), build_prompts(side=side)
    settings = DecodePruning(lam=4.0, positions="renumbered")
    generation = Generation(model, prompts, new_cache(model, settings))
    for _step in range(3):
        generation.step()
    differs = False
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        kept = decide_literally(model, embeds_1TC, visual_T, settings).kept
        for step in range(4):
            said = [int(tokens_B[row]) for tokens_B in generation.tokens[:step]]
            later = model.embed_tokens(torch.tensor([said], dtype=torch.long))
            whole = torch.cat([embeds_1TC, later], dim=1)
            expected = last_hidden_literally(model, whole, kept, len(visual_T), 2, renumber=True)
            torch.testing.assert_close(generation.hidden[step][row], expected, rtol=2e-4, atol=2e-5)
            original = last_hidden_literally(model, whole, kept, len(visual_T), 2)
            differs = differs or not torch.allclose(original, expected, atol=1e-3)
    assert differs


@torch.no_grad()
def test_keeping_everything_renumbered_is_the_library_s_forward() -> None:
    model, prompts = build_model(), build_prompts()
    generation = Generation(model, prompts, new_cache(model, DecodePruning(lam=1e6, positions="renumbered")))
    whole = model(
        inputs_embeds=prompts.embeds_BTC, attention_mask=prompts.attention_BT, position_ids=prompts.positions_BT
    ).last_hidden_state
    attended_BT = prompts.attention_BT.bool()
    assert torch.equal(generation.output.last_hidden_state[attended_BT], whole[attended_BT])
