"""Batches of prompts for stage 3, and a step-by-step run of `decode_pruned` over them.

Legend: B samples, T prompt tokens, Q new tokens, S generated tokens, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.decoder.cache import MeteorCache
from meteor_model.decoder.loop import decode_pruned
from tests.meteor_model.decoder.oracle import LISTENING, WIDTH, pick_token


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


def new_cache(model: Any, settings: DecodePruning, num_heads: int = LISTENING) -> MeteorCache:
    return MeteorCache(model.config, settings, num_heads)


def prefill(model: Any, prompts: Prompts, cache: MeteorCache, **changes: Any) -> Any:
    return decode_pruned(
        model, prompts.embeds_BTC, prompts.attention_BT, prompts.positions_BT, prompts.visual_BT, cache, **changes
    )


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
