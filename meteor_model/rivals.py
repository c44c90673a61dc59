"""Other pruners, done the usual way, behind one interface: what METEOR is compared with.

A `LayerPruner` acts inside the LLM on the attention maps of single layers, as the public code of its kind does: the
whole (B, H, T, T) map is materialised. The loop here owns the calls to an unmodified decoder's layers:

    1. prefill  layers run in order; after a layer of the schedule the pruner reads that layer's map and keeps its
                number of visual tokens, text tokens all stay, at their original positions
    2. step     one new token runs through all layers; the cache is shorter above every pruning

Every row of a batch has the same length and the same number of visual tokens (no padding), so kept rows stay aligned.

Legend: B samples, T tokens of the prompt, W tokens kept, K visual tokens kept, H heads, C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from meteor_model.compat import CACHE
from meteor_model.pruning import gather_tokens, select_visual

#: Decoders whose loop is "layers, norm" on the embeddings as given, with one rotary embedding for all layers.
RIVAL_DECODERS = ("llama", "mistral", "qwen2", "qwen3")


class LayerPruner(Protocol):
    """A pruner that acts after single LLM layers on their attention maps."""

    @property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """(layers that see what came before, visual tokens kept from there on), layers ascending."""
        ...

    def scores(self, attention_BHTT: Tensor, visual_BT: Tensor) -> Tensor:
        """Importance (B, T) fp32 of the tokens, read at the visual ones, from the map of the last layer before."""
        ...


@dataclass(frozen=True)
class FastV:
    """FastV (arXiv 2403.06764).

    After `layer` layers the `keep` visual tokens stay that the last token attends to most, heads averaged.
    """

    layer: int = 2
    keep: int = 256

    def __post_init__(self) -> None:
        if self.layer < 1 or self.keep < 1:
            raise ValueError(
                f"FastV needs a layer and a number to keep of at least 1, got {self.layer} and {self.keep}"
            )

    @property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """One pruning."""
        return ((self.layer, self.keep),)

    def scores(self, attention_BHTT: Tensor, visual_BT: Tensor) -> Tensor:
        """The last token's attention, heads averaged."""
        return attention_BHTT.float().mean(dim=1)[:, -1]


@dataclass(frozen=True)
class RivalState:
    """What a prefill leaves: the cache and the position of the next token."""

    cache: DynamicCache
    next_position: int


def prefill(
    language_model: PreTrainedModel, embeds_BTC: Tensor, visual_BT: Tensor, pruner: LayerPruner
) -> tuple[Tensor, RivalState]:
    """The prompt through the decoder with a rival's pruning.

    Args:
        language_model: a bare decoder of `RIVAL_DECODERS` that attends eagerly (attention maps must exist).
        embeds_BTC: the prompt, visual tokens in place, no padding.
        visual_BT: bool, which tokens are visual; the same number in every row.
        pruner: the rival.

    Returns:
        (B, W, C) hidden states after the final norm, and the state for `step`.

    Raises:
        ValueError: another decoder or attention kernel, a schedule past the layers, or rows with unequal numbers.
    """
    schedule = dict(pruner.schedule)
    _check(language_model, visual_BT, pruner)
    length = embeds_BTC.shape[1]
    cache = DynamicCache(config=language_model.config)
    positions_BT = torch.arange(length, device=embeds_BTC.device).expand(embeds_BTC.shape[0], -1)
    hidden_BWC, inputs = embeds_BTC, _layer_inputs(language_model, embeds_BTC, positions_BT)
    for index, layer in enumerate(language_model.layers):
        with _attention_maps(layer.self_attn, index + 1 in schedule) as maps:
            hidden_BWC = layer(hidden_BWC, use_cache=True, **{CACHE: cache}, **inputs)
        if index + 1 in schedule:
            counts_B = torch.full((len(hidden_BWC),), schedule[index + 1], device=hidden_BWC.device)
            keep_BT = ~visual_BT | select_visual(pruner.scores(maps[0], visual_BT), visual_BT, counts_B)
            order_BW = keep_BT.nonzero()[:, 1].view(len(keep_BT), -1)
            hidden_BWC, positions_BT = gather_tokens(hidden_BWC, order_BW), gather_tokens(positions_BT, order_BW)
            visual_BT = gather_tokens(visual_BT, order_BW)
            inputs = _layer_inputs(language_model, hidden_BWC, positions_BT)
    return language_model.norm(hidden_BWC), RivalState(cache, length)


def step(language_model: PreTrainedModel, embeds_B1C: Tensor, state: RivalState) -> tuple[Tensor, RivalState]:
    """One new token: (B, 1, C) hidden states after the final norm, and the next state. No mask: a token sees all."""
    position_B1 = torch.full(embeds_B1C.shape[:2], state.next_position, device=embeds_B1C.device)
    rotary = language_model.rotary_emb(embeds_B1C, position_B1)
    hidden_B1C = embeds_B1C
    for layer in language_model.layers:
        hidden_B1C = layer(
            hidden_B1C, attention_mask=None, position_embeddings=rotary, use_cache=True, **{CACHE: state.cache}
        )
    return language_model.norm(hidden_B1C), RivalState(state.cache, state.next_position + 1)


def _layer_inputs(language_model: PreTrainedModel, hidden_BTC: Tensor, positions_BT: Tensor) -> dict[str, Any]:
    """Causal mask and rotary embedding; kept tokens stay in order, so causality among them is the usual one."""
    mask = create_causal_mask(
        config=language_model.config,
        inputs_embeds=hidden_BTC,
        attention_mask=torch.ones(hidden_BTC.shape[:2], dtype=torch.bool, device=hidden_BTC.device),
        position_ids=None,
        **{CACHE: None},
    )
    return {"attention_mask": mask, "position_embeddings": language_model.rotary_emb(hidden_BTC, positions_BT)}


@contextmanager
def _attention_maps(attention: nn.Module, wanted: bool) -> Iterator[list[Tensor]]:
    """The maps (B, H, T, T) that this attention computes inside, where they are wanted."""
    maps: list[Tensor] = []
    handle = (
        attention.register_forward_hook(lambda _module, _inputs, output: maps.append(output[1])) if wanted else None
    )
    try:
        yield maps
    finally:
        if handle is not None:
            handle.remove()


def _check(language_model: PreTrainedModel, visual_BT: Tensor, pruner: LayerPruner) -> None:
    config = language_model.config
    if config.model_type not in RIVAL_DECODERS:
        raise ValueError(f"rivals run on {', '.join(RIVAL_DECODERS)}, not on {config.model_type!r}")
    if config._attn_implementation != "eager":
        raise ValueError(
            f"{type(pruner).__name__} reads attention maps, which {config._attn_implementation!r} attention does not "
            "make: call set_attn_implementation('eager') on the decoder"
        )
    counts = visual_BT.sum(dim=1).tolist()
    if len(set(counts)) != 1:
        raise ValueError(f"rivals need the same number of visual tokens in every row, got {counts}")
    before, present = 0, counts[0]
    for layer, keep in pruner.schedule:
        if not before < layer < config.num_hidden_layers:
            raise ValueError(f"{pruner}: layer {layer} is not between {before + 1} and {config.num_hidden_layers - 1}")
        if keep > present:
            raise ValueError(f"{pruner}: cannot keep {keep} of {present} visual tokens")
        before, present = layer, keep
