"""`generate` where stage 3 chooses while the answer grows: tokens, beams and turns of whole prompts.

Legend: B prompts, T prompt tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.meteor_model.decoder.test_anew import Literal
from tests.meteor_model.test_generation import FIXED, NEW, build, make_batch, new_tokens

ASKED: list[dict[str, Any]] = [
    {"query": "answer", "answer_tokens": 2, "reselect_every": 1, "budget": "fixed", "target_mean": 3.0, "lam": None},
    {"query": "last", "reselect_every": 2},
]
TURN: dict[str, Any] = {"query": "all_text", "later_turn": "union"}


@pytest.mark.parametrize("decode", ASKED, ids=["answer", "every 2"])
@torch.no_grad()
def test_greedy_tokens_and_beams_are_those_of_each_prompt(decode: dict[str, Any]) -> None:
    built, batch = build(**decode), make_batch()
    found = new_tokens(built.generate(**batch.inputs, **FIXED, do_sample=False), batch)
    beams = new_tokens(built.generate(**batch.inputs, **FIXED, do_sample=False, num_beams=3), batch)
    for row, (ids, images) in enumerate(zip(batch.ids, batch.images, strict=True)):
        embeds_1TC, visual_1T = built.embed_prompts(ids, images)
        settings = built.config.pruning.decode
        if settings.budget == "fixed":  # the oracle takes a prompt's images for one
            settings = replace(settings, target_mean=3.0 * max(len(images), 1))
        literal = Literal(built.language_model, (embeds_1TC, visual_1T[0]), settings)
        for token in found[row]:
            assert int(built.lm_head(literal.hidden()).argmax()) == token
            literal.follow([token])
        pixels = {"pixel_values": images} if len(images) else {}
        alone = built.generate(ids, **pixels, **FIXED, do_sample=False, num_beams=3)
        assert alone[0, -NEW:].tolist() == beams[row]


@torch.no_grad()
def test_a_later_turn_adds_what_it_asks_for() -> None:
    built, batch = build(**TURN), make_batch()
    used = built.new_cache()
    assert used is not None
    first = built.generate(**batch.inputs, **FIXED, do_sample=False, past_key_values=used)
    assert used.decision is not None
    before = used.decision.kept_visual()
    turn = torch.cat([first, torch.tensor([[9, 8, 7]] * len(first))], dim=1)
    mask = torch.cat([batch.inputs["attention_mask"], torch.ones(len(first), NEW + 3, dtype=torch.long)], dim=1)
    built.generate(turn, attention_mask=mask, **FIXED, do_sample=False, past_key_values=used)
    after = used.decision.kept_visual()
    grown = [set(b.tolist()) < set(a.tolist()) for b, a in zip(before, after, strict=True)]
    assert any(grown)
    assert all(set(b.tolist()) <= set(a.tolist()) for b, a in zip(before, after, strict=True))
