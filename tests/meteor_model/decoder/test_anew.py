"""Stage 3 that chooses later than at prefill, against a pass without a cache at every step.

By its definition: whenever it is due, the tokens are chosen from all visual ones by the newest asking tokens; from then
on every layer above the cut reads the whole text so far, and of the image only what is kept.

Legend: B samples, T prompt tokens, L all tokens, S steps, C width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.decoder.loop import decode_pruned
from meteor_model.decoder.scores import attention_mass
from tests.meteor_model.decoder.batches import LAYOUTS, Generation, Prompts, build_prompts, new_cache, prefill
from tests.meteor_model.decoder.oracle import (
    LISTENING,
    build_model,
    decide_literally,
    last_hidden_literally,
    pick_token,
)

FIXED: dict[str, Any] = {"budget": "fixed", "target_mean": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "last, every 2": {"query": "last", "reselect_every": 2, "lam": 4.0},
    "all text, every 3": {"query": "all_text", "reselect_every": 3, "lam": 4.0},
    "answer": {"query": "answer", "answer_tokens": 2, **FIXED},
    "answer, every 1": {"query": "answer", "answer_tokens": 2, "reselect_every": 1, **FIXED},
    "renumbered, every 2": {"query": "last", "reselect_every": 2, "lam": 4.0, "positions": "renumbered"},
    "answer of one token, every 3": {"query": "answer", "answer_tokens": 1, "reselect_every": 3, **FIXED},
}


class Literal:
    """One prompt without padding; every reading starts from nothing."""

    def __init__(self, model: Any, single: tuple[Tensor, Tensor], settings: DecodePruning) -> None:
        self.model, self.settings = model, settings
        self.embeds_1LC, self.visual_T = single
        self.prompt = self.grown = 0
        self.held: set[int] = set()
        self.kept = set(range(len(self.visual_T)))
        self.asked = settings.query != "answer"
        if self.asked:
            self.choose()

    def choose(self) -> None:
        length = self.embeds_1LC.shape[1]
        visual_L = F.pad(self.visual_T, (0, length - len(self.visual_T)))
        answer = self.settings.answer_tokens if self.settings.query == "answer" else 0
        self.kept = decide_literally(self.model, self.embeds_1LC, visual_L, self.settings, answer=answer).kept
        if self.settings.later_turn == "union":
            visual = {int(i) for i in self.visual_T.nonzero().flatten()}
            self.kept |= self.held
            self.held = self.kept & visual
        self.grown, self.asked = 0, True

    def follow(self, tokens: list[int]) -> None:
        embeds_1QC = self.model.embed_tokens(torch.tensor([tokens]))
        self.embeds_1LC = torch.cat([self.embeds_1LC, embeds_1QC], dim=1)
        self.grown += len(tokens)
        settings = self.settings
        if len(tokens) > 1 and settings.later_turn != "kept":
            if settings.query == "answer":
                self.kept, self.asked, self.grown = set(range(self.embeds_1LC.shape[1])), False, 0
            else:
                self.choose()
            return
        every = settings.reselect_every if self.asked else settings.answer_tokens
        if every and self.grown >= every:
            self.choose()

    def hidden(self) -> Tensor:
        prompt_length, layer = len(self.visual_T), self.settings.layer
        renumber = self.settings.positions == "renumbered"
        return last_hidden_literally(self.model, self.embeds_1LC, self.kept, prompt_length, layer, renumber)

    def generate(self, steps: int) -> tuple[list[int], Tensor]:
        tokens, hidden_SC = [], [self.hidden()]
        for _ in range(steps):
            tokens.append(int(pick_token(self.model, hidden_SC[-1])))
            self.follow(tokens[-1:])
            hidden_SC.append(self.hidden())
        return tokens, torch.stack(hidden_SC)


def kept_of(generation: Generation, row: int) -> set[int]:
    """Columns of the sample without its padding."""
    decision = generation.cache.decision
    assert decision is not None
    start = int(decision.attended_BT[row].int().argmax())
    return {int(i) - start for i in decision.kept_index_BW[row] if int(i) >= 0}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3"])
@torch.no_grad()
def test_every_step_equals_a_pass_without_a_cache(name: str, case: str) -> None:
    model, prompts, settings = build_model(name), build_prompts(), DecodePruning(**CASES[case])
    generation = Generation(model, prompts, new_cache(model, settings))
    literals = [Literal(model, single, settings) for single in prompts.singles]
    seen = [set[frozenset[int]]() for _ in literals]
    for step in range(6):
        for row, literal in enumerate(literals):
            torch.testing.assert_close(generation.hidden[-1][row], literal.hidden(), rtol=2e-4, atol=2e-5)
            length = literal.embeds_1LC.shape[1] - literal.grown
            assert kept_of(generation, row) == {i for i in literal.kept if i < length}, f"step {step}, sample {row}"
            seen[row].add(frozenset(i for i in literal.kept if literal.visual_T[i : i + 1].any()))
            literal.follow([int(generation.tokens[-1][row])])
        generation.step()
    assert len(seen[0]) > 1, "the case must choose more than once"
    assert not seen[2] - {frozenset()}, "text alone has nothing to choose from"


@pytest.mark.parametrize("query", ["last", "all_text", "answer"])
@pytest.mark.parametrize("later_turn", ["kept", "anew", "union"])
@torch.no_grad()
def test_a_later_turn_sees_what_the_setting_says(later_turn: Any, query: Any) -> None:
    own = FIXED if query == "answer" else {"lam": 4.0}
    settings = DecodePruning(query=query, later_turn=later_turn, answer_tokens=2, **own)
    model, prompts = build_model(), build_prompts()
    generation = Generation(model, prompts, new_cache(model, settings))
    for _ in range(3):
        generation.step()
    turns = [[9, 8, 7], [5, 4], [30, 31, 32], [11], [12, 13, 14]]
    first = [[int(tokens_B[row]) for tokens_B in generation.tokens] for row in range(len(LAYOUTS))]
    longest = max(map(len, turns))
    new_BQ = torch.tensor(
        [[said[-1], *[0] * (longest - len(turn)), *turn] for said, turn in zip(first, turns, strict=True)]
    )
    mask_BQ = torch.tensor([[1, *[0] * (longest - len(turn)), *[1] * len(turn)] for turn in turns])
    generation.attention_BL = torch.cat([generation.attention_BL, mask_BQ], dim=1)
    positions_BQ = generation.next_B1 + (mask_BQ.cumsum(dim=1) - 1)
    output = decode_pruned(
        model, model.embed_tokens(new_BQ), generation.attention_BL, positions_BQ, None, generation.cache
    )
    generation.next_B1 = positions_BQ[:, -1:] + 1
    generation.hidden.append(output.last_hidden_state[:, -1])
    generation.tokens.append(pick_token(model, generation.hidden[-1]))
    literals = [Literal(model, single, settings) for single in prompts.singles]
    changed = False
    for row, literal in enumerate(literals):
        for token in first[row][:-1]:
            literal.follow([token])
        visual = {int(i) for i in literal.visual_T.nonzero().flatten()}
        before = literal.kept & visual
        literal.follow([first[row][-1], *turns[row]])
        changed = changed or literal.kept & visual != before
        if later_turn == "union":
            assert before <= literal.kept
    assert changed == (later_turn != "kept")
    for _ in range(4):
        for row, literal in enumerate(literals):
            torch.testing.assert_close(generation.hidden[-1][row], literal.hidden(), rtol=2e-4, atol=2e-5)
            literal.follow([int(generation.tokens[-1][row])])
        generation.step()
    rows_BQC = output.last_hidden_state
    assert rows_BQC.shape[:2] == new_BQ.shape


@torch.no_grad()
def test_until_the_answer_asks_this_is_the_library_s_own_forward() -> None:
    model, prompts = build_model(), build_prompts()
    settings = DecodePruning(query="answer", answer_tokens=2, **FIXED)
    generation, dense = Generation(model, prompts, new_cache(model, settings)), DynamicCache(config=model.config)
    whole = model(
        inputs_embeds=prompts.embeds_BTC,
        attention_mask=prompts.attention_BT,
        position_ids=prompts.positions_BT,
        past_key_values=dense,
        use_cache=True,
    )
    assert torch.equal(generation.output.last_hidden_state, whole.last_hidden_state)
    assert torch.equal(generation.output.decision.kept_counts_B, prompts.visual_BT.sum(dim=1))
    token_B1C, position_B1 = model.embed_tokens(generation.tokens[-1][:, None]), generation.next_B1
    generation.step()
    stepped = model(
        inputs_embeds=token_B1C, attention_mask=generation.attention_BL, position_ids=position_B1, past_key_values=dense
    )
    assert torch.equal(generation.hidden[-1], stepped.last_hidden_state[:, -1])
    generation.step()
    decision = generation.cache.decision
    assert decision is not None
    assert decision.kept_counts_B.tolist() == [4, 4, 0, 4, 4]
    assert generation.cache.get_seq_length(3) < generation.cache.get_seq_length()
    assert generation.cache.waiting is None, "nothing is chosen after this, so nothing waits"


@pytest.mark.parametrize("case", ["last, every 2", "answer, every 1"])
@torch.no_grad()
def test_rows_may_be_reordered_and_tokens_taken_back_between_two_choices(case: str) -> None:
    model, prompts, settings = build_model(), build_prompts(), DecodePruning(**CASES[case])
    generation = Generation(model, prompts, new_cache(model, settings))
    generation.step()
    rows = torch.tensor([4, 1, 1, 0, 2])
    generation.cache.reorder_cache(rows)
    generation.reorder(rows)
    if settings.reselect_every > 1:
        taken = generation.tokens[-1]
        generation.step()  # chooses anew
        generation.step()
        generation.cache.crop(-1)
        generation.attention_BL, generation.next_B1 = generation.attention_BL[:, :-1], generation.next_B1 - 1
        del generation.tokens[-1], generation.hidden[-1]
        assert torch.equal(generation.tokens[1], taken)
        with pytest.raises(ValueError, match="were pruned together"):
            generation.cache.crop(-1)
    for _ in range(3):
        generation.step()
    for place, row in enumerate(rows.tolist()):
        tokens, hidden_SC = Literal(model, prompts.singles[row], settings).generate(len(generation.tokens) - 1)
        assert [int(tokens_B[place]) for tokens_B in generation.tokens][:-1] == tokens
        torch.testing.assert_close(torch.stack([h[place] for h in generation.hidden]), hidden_SC, rtol=2e-4, atol=2e-5)


@torch.no_grad()
def test_several_cuts_are_made_anew_together() -> None:
    """Everything above the first layer is what a fresh prefill of all tokens so far would leave."""
    settings = DecodePruning(layer=1, later_layers=(3,), later_keep=(2,), reselect_every=2, **FIXED)
    model, prompts = build_model(), build_prompts()
    generation = Generation(model, prompts, new_cache(model, settings))
    for _ in range(2):
        generation.step()
    said_B2C = model.embed_tokens(torch.stack(generation.tokens[:2], dim=1))
    positions_B2 = prompts.positions_BT[:, -1:] + torch.arange(1, 3)
    whole = Prompts(
        torch.cat([prompts.embeds_BTC, said_B2C], dim=1),
        generation.attention_BL,
        torch.cat([prompts.positions_BT, positions_B2], dim=1),
        F.pad(prompts.visual_BT, (0, 2)),
        [],
    )
    fresh = new_cache(model, settings)
    expected = prefill(model, whole, fresh)
    torch.testing.assert_close(generation.hidden[-1], expected.last_hidden_state[:, -1], rtol=2e-4, atol=2e-5)
    assert generation.cache.decision is not None
    for mine, theirs in zip(generation.cache.decision.cuts, expected.decision.cuts, strict=True):
        assert torch.equal(mine.kept_index_BW, theirs.kept_index_BW)
    assert [layer.get_seq_length() for layer in generation.cache.layers] == [
        layer.get_seq_length() for layer in fresh.layers
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": "answer", "lam": 4.0}, "query 'answer' does not go with budget 'attention_mass'"),
        ({"equal_layers": True, "reselect_every": 2}, "equal_layers drops tokens everywhere"),
        ({"later_turn": "union", "reselect_every": 2}, "later_turn 'union' would keep all of it"),
        ({"later_turn": "again"}, "later_turn must be one of kept, anew, union, got 'again'"),
        ({"query": "first"}, "query must be one of last, all_text, answer, got 'first'"),
        ({"answer_tokens": 0}, "answer_tokens"),
        ({"reselect_every": -1}, "reselect_every"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodePruning(**changes)


@torch.no_grad()
def test_padding_is_never_looked_at_whoever_asks() -> None:
    """Whatever the padding holds, the choice, its mass and every later state are the same."""
    model = build_model()
    for changes in ({"query": "last"}, {"query": "all_text"}, *CASES.values()):
        settings = DecodePruning(**({"lam": 4.0} | changes))
        found = []
        for filling in (7.0, -300.0):
            prompts = build_prompts()
            prompts.embeds_BTC[prompts.attention_BT == 0] = filling
            generation = Generation(model, prompts, new_cache(model, settings))
            for _ in range(3):
                generation.step()
            assert generation.cache.decision is not None
            found.append([generation.cache.decision.kept_index_BW, torch.stack(generation.hidden)])
            if settings.query != "answer":
                shown = (prompts.attention_BT, prompts.positions_BT, prompts.visual_BT, settings, LISTENING)
                found[-1].append(attention_mass(model, prompts.embeds_BTC, *shown))
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
