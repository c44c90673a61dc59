"""Prompts that `generate` refuses, and a stage 3 that cannot act and says so."""

from __future__ import annotations

import warnings
from typing import Any, cast

import pytest
import torch

from tests.meteor_model.test_generation import FIXED, LAYOUTS, NEW, build, literals, make_batch


@pytest.mark.parametrize("settings", [{}, {"use_cache": False}])
@pytest.mark.parametrize("enabled", [False, True])
@torch.no_grad()
def test_padding_on_the_right_is_refused(enabled: bool, settings: dict[str, Any]) -> None:
    """New tokens would be read from the padding, or go on at its positions."""
    built, batch = build(enabled=enabled), make_batch(LAYOUTS[:2])
    rows = batch.inputs["attention_mask"].argsort(dim=1, descending=True, stable=True)
    padded = {name: batch.inputs[name].gather(1, rows) for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r'sample 1 of the batch is padded on the right.* padding_side="left"'):
        built.generate(**{**batch.inputs, **padded}, **FIXED, **settings)


@torch.no_grad()
def test_a_second_turn_padded_on_the_right_is_refused() -> None:
    built, batch = build(), make_batch(LAYOUTS[:2])
    used = built.new_cache()
    first = built.generate(**batch.inputs, **FIXED, do_sample=False, past_key_values=used)
    turn = torch.cat([first, torch.tensor([[9, 8], [7, 0]])], dim=1)
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones(2, NEW + 2, dtype=torch.long)], dim=1)
    mask[1, -1] = 0
    with pytest.raises(ValueError, match="sample 1 of the batch is padded on the right"):
        built.generate(turn, attention_mask=mask, past_key_values=used, **FIXED)


@pytest.mark.parametrize("enabled", [False, True])
@torch.no_grad()
def test_prompts_without_tokens_are_refused_with_and_without_stage_3(enabled: bool) -> None:
    built, batch = build(enabled=enabled), make_batch(LAYOUTS[:2])
    batch.inputs["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="sample 1 of the batch is all padding: a prompt needs"):
        built.generate(**batch.inputs, **FIXED)
    with pytest.raises(ValueError, match="2 samples of 0 tokens: a prompt needs at least one token"):
        built.generate(torch.zeros(2, 0, dtype=torch.long), **FIXED)
    with pytest.raises(ValueError, match=r"pixel_values must be a uint8 torch tensor .* got ndarray"):
        built.generate(batch.ids[0], cast(Any, batch.images[0].numpy()), **FIXED)


@torch.no_grad()
def test_a_stage_3_that_cannot_act_says_so() -> None:
    batch = make_batch(LAYOUTS[:1])
    settings = {**FIXED, "do_sample": False}
    with pytest.warns(UserWarning, match=r"lambda is not known.* set pruning\.decode\.lam") as caught:
        build(lam=None, target_mean=4.0).generate(**batch.inputs, **settings)
    assert caught[0].filename == __file__
    built = build()
    embeds_BTC, is_image_BT = built.embed_prompts(batch.inputs["input_ids"], batch.inputs["pixel_values"])
    mask = batch.inputs["attention_mask"]
    with pytest.warns(UserWarning, match="finds no placeholder in inputs_embeds.* image_mask") as caught:
        dense = built.generate(inputs_embeds=embeds_BTC, attention_mask=mask, **settings)
    assert caught[0].filename == __file__
    silent = {"inputs_embeds": embeds_BTC, "attention_mask": mask, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pruned = built.generate(**silent, image_mask=is_image_BT)
        assert torch.equal(build(enabled=False).generate(**silent), dense)
    assert pruned.tolist() == [literals(built, batch)[0].greedy(NEW)]
