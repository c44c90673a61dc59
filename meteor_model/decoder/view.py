"""One layer of the decoder as a criterion of stage 3 sees it: what the layer was given and made, computed when asked.

A layer is asked with the queries of a few rows only, and the keys that it has just made itself, read where it hands
them to the cache: attention kernels stay untouched, nothing is projected twice, and no T x T map exists.

Legend: B samples, T tokens present, R rows that ask, H heads, G key/value heads, C language model width, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from meteor_model.decoder.families import DecoderPlan, Rotary, attention_softcap, layer_queries
from meteor_model.decoder.prompt import Prompt, places
from meteor_model.pruners.select import gather_tokens
from meteor_model.pruners.text_scores import VisualScores, attention_rows, text_guided_scores


class KeyTap:
    """Takes a cache's place in a pass without one, and holds on to what the layer that is asked has made."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What a layer calls; the keys and values go back as they came."""
        self.keys, self.values = keys, values
        return keys, values


@dataclass(frozen=True)
class LayerView:
    """A layer that has just run, at prefill.

    Attributes:
        language_model: the bare decoder.
        plan: how its layers run.
        index: of the layer, counted from 0.
        input_BTC: what the layer was given.
        key_BGTd: its keys, rotated as the layer rotates them.
        value_BGTd: its values.
        rotary: the decoder's (cos, sin) of the tokens present.
        prompt: which of them are visual, attended, and ask.
        num_heads: heads that METEOR listens to.
        cells_n2: row and column of each visual token of an image in its grid; None where stages 1 and 2 decide that
            image by image.
    """

    language_model: PreTrainedModel
    plan: DecoderPlan
    index: int
    input_BTC: Tensor
    key_BGTd: Tensor
    value_BGTd: Tensor
    rotary: Rotary
    prompt: Prompt
    num_heads: int
    cells_n2: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The layer's own, where the model is spread over several."""
        return self.key_BGTd.device

    @property
    def visual_BT(self) -> Tensor:
        """Which tokens are visual, bool, where the layer is."""
        return self.prompt.visual_BT.to(self.device)

    @property
    def scaling(self) -> float:
        """Of the layer's attention logits."""
        scaling: float = self.language_model.layers[self.index].self_attn.scaling
        return scaling

    @property
    def softcap(self) -> float | None:
        """The cap on the layer's attention logits, or None."""
        return attention_softcap(self.language_model, self.plan, self.index)

    def asking(self) -> tuple[Tensor, Tensor]:
        """The queries (B, H, R, d) of the rows that ask, and which tokens each may see, (B, R, T) bool."""
        device, prompt = self.device, self.prompt
        asking_BR = prompt.asking_BR.to(device)
        asking_at = {
            kind: (gather_tokens(cos.to(device), asking_BR), gather_tokens(sin.to(device), asking_BR))
            for kind, (cos, sin) in self.rotary.items()
            if kind == self.plan.rotary[self.index]
        }
        rows_BRC = gather_tokens(self.input_BTC.to(device), asking_BR)
        query_BHRd = layer_queries(self.language_model, self.plan, self.index, rows_BRC, asking_at)
        columns_T = torch.arange(self.input_BTC.shape[1], device=device)
        allowed_BRT = prompt.asks_BR.to(device)[:, :, None] & (columns_T <= asking_BR[:, :, None])
        if prompt.padded:
            allowed_BRT = allowed_BRT & prompt.attended_BT.to(device)[:, None]
        if self.plan.window is not None and self.plan.slides[self.index]:
            places_BT = prompt.places_BT
            if places_BT is None:
                places_BT = places(prompt.seen_BT, len(columns_T), prompt.embeds_BTC)
            places_BT = places_BT.to(device).expand(len(asking_BR), -1)
            near_BRT = places_BT[:, None] > gather_tokens(places_BT, asking_BR)[:, :, None] - self.plan.window
            allowed_BRT = allowed_BRT & near_BRT
        return query_BHRd, allowed_BRT

    def grid_cells(self) -> Tensor:
        """Row and column of each visual token in its grid, (B, T, 2) int64; meaningless off the visual tokens.

        At the first pruning only: later the tokens of an image are no longer all there.
        """
        assert self.cells_n2 is not None, "MeteorConfig refuses a criterion that needs cells where there are none"
        rank_BT = self.visual_BT.cumsum(dim=1) - self.visual_BT.long()
        cells_n2: Tensor = self.cells_n2.to(self.device)
        return cells_n2[rank_BT % len(cells_n2)]

    def asking_without_rotary(self) -> tuple[Tensor, Tensor]:
        """`asking` with queries that are not rotated."""
        turned = self.rotary
        plain = {kind: (torch.ones_like(cos), torch.zeros_like(sin)) for kind, (cos, sin) in turned.items()}
        return replace(self, rotary=plain).asking()

    def keys_without_rotary(self) -> Tensor:
        """The keys turned back, (B, G, T, d) fp32."""
        cos_BTd, sin_BTd = (part.to(self.device).float() for part in self.rotary[self.plan.rotary[self.index]])
        cos_B1Td, sin_B1Td = cos_BTd[:, None], sin_BTd[:, None]
        low, high = self.key_BGTd.float().chunk(2, dim=-1)
        back_BGTd = self.key_BGTd.float() * cos_B1Td - torch.cat([-high, low], dim=-1) * sin_B1Td
        return back_BGTd / (cos_B1Td.square() + sin_B1Td.square())  # (a scaled rotary embedding scales, too)

    def attention(self, asks_BR: Tensor | None = None) -> Tensor:
        """Attention of each head to each token, (B, H, T) fp32, mean over the rows that ask (those in `asks_BR`)."""
        query_BHRd, allowed_BRT = self.asking()
        if asks_BR is not None:
            allowed_BRT = allowed_BRT & asks_BR.to(allowed_BRT.device)[:, :, None]
        return attention_rows(query_BHRd, self.key_BGTd, allowed_BRT, self.scaling, self.softcap)

    def listen(self, num_heads: int, *, rotary: bool = True) -> VisualScores:
        """How the text looks at each visual token, by the `num_heads` heads that look at the image most."""
        query_BHRd, allowed_BRT = self.asking() if rotary else self.asking_without_rotary()
        key_BGTd = self.key_BGTd if rotary else self.keys_without_rotary()
        return text_guided_scores(
            query_BHRd, key_BGTd, self.visual_BT, allowed_BRT, self.scaling, num_heads, self.softcap
        )


def cached_states(cache: Cache, index: int) -> tuple[Tensor, Tensor]:
    """Keys and values that a layer has just cached."""
    layer: Any = cache.layers[index]
    return layer.keys, layer.values


def view_layer(  # noqa: PLR0913 (what a view holds)
    language_model: PreTrainedModel,
    plan: DecoderPlan,
    index: int,
    input_BTC: Tensor,
    made: tuple[Tensor | None, Tensor | None],
    rotary: Rotary,
    prompt: Prompt,
    num_heads: int,
    cells_n2: Tensor | None = None,
) -> LayerView:
    """A view of layer `index` from its input and the keys and values that it `made` of it.

    Raises:
        ValueError: where the layer handed none out: it was recomputed, or a training pass ran.
    """
    keys, values = made
    if keys is None or values is None or keys.shape[2] != input_BTC.shape[1]:
        raise ValueError(
            f"LLM layer {index} left no keys of the prompt: stage 3 is for inference, call eval() or turn gradient "
            "checkpointing off"
        )
    return LayerView(language_model, plan, index, input_BTC, keys, values, rotary, prompt, num_heads, cells_n2)


def score_layer(view: LayerView, criterion: Callable[..., Tensor | VisualScores]) -> VisualScores:
    """What a criterion says of the visual tokens; scores are 0 off them."""
    found = criterion(view)
    if isinstance(found, VisualScores):
        return found
    scores_BT = found.float().masked_fill(~view.visual_BT, 0.0)
    none_B0 = scores_BT.new_zeros(len(scores_BT), 0)
    return VisualScores(scores_BT, scores_BT.sum(dim=-1), none_B0.long(), none_B0)
