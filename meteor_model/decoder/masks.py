"""Attention masks for the layers below and above stage 3, built once a pass and left out where nothing is hidden.

SDPA and eager attention get the masks that the library would make (bool, additive), from the same contents; every other
kernel gets the library's own from `create_causal_mask`. Only the sliding window differs: above the layer it hides what
was too far away in the ORIGINAL sequence, so that a kept token is seen exactly as long as it would be unpruned.

Shape legend: B samples, Q new columns of this pass, L all columns of these layers (cached and new), C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_causal_mask

from meteor_model.compat import CACHE
from meteor_model.decoder.families import DecoderPlan


@dataclass(frozen=True)
class Masks:
    """What full and sliding layers are given."""

    full: Any
    sliding: Any


@dataclass(frozen=True)
class _OneLayer:
    """The cache as the library's mask maker sees it from one layer.

    `create_causal_mask` measures one layer, by default the first; the argument that chooses another came only in later
    releases. It takes its numbers from these two methods in all of them.
    """

    cache: Cache
    layer: int

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return _columns(self.cache, self.layer)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length, self.layer)


def _columns(cache: Cache, layer: int) -> int:
    """Columns that a layer of the cache holds: fewer than the tokens that it has seen where some were dropped."""
    columns: int = cache.layers[layer].get_seq_length()
    return columns


def check_kernel(config: PreTrainedConfig, plan: DecoderPlan) -> None:
    """Raises ValueError where the attention kernel would not do what the decoder's configuration says."""
    kernel = config._attn_implementation
    if plan.window is not None and kernel not in ("sdpa", "eager"):
        raise ValueError(
            f"attn_implementation {kernel!r} counts the {plan.window} columns of this decoder's sliding window itself, "
            "and pruning changes them: with stage 3 set attn_implementation to 'sdpa' or 'eager', or disable "
            "pruning.decode"
        )
    if plan.family.softcaps_attention and config.attn_logit_softcapping is not None and kernel == "sdpa":
        raise ValueError(
            "attn_implementation 'sdpa' leaves out this decoder's attn_logit_softcapping, and scores would not be "
            "those of its attention: set attn_implementation of the LLM to 'eager', or disable pruning.decode"
        )


def build_masks(
    config: PreTrainedConfig,
    window: int | None,
    slides: tuple[bool, ...],
    hidden_BQC: Tensor,
    seen_BL: Tensor | None,
    places_BL: Tensor | None,
    cache: Cache | None,
    layer: int,
) -> Masks:
    """Masks for some layers that have seen the same tokens.

    Args:
        config: the decoder's, for its attention kernel.
        window: columns that a sliding layer sees; None without such layers.
        slides: for each of the layers, whether it slides: a mask that none of them needs is not built.
        hidden_BQC: their input; Q, dtype and device are read.
        seen_BL: bool, which columns hold a token; None where none is padding.
        places_BL: int64 (B or 1, L), original place of each column; None where no two are `window` or more apart.
        cache: holds what came before; None without one.
        layer: the layer of the cache that is measured.
    """
    past = 0 if cache is None else _columns(cache, layer)
    length = hidden_BQC.shape[1]
    kernel = config._attn_implementation
    near_B1QL = None
    if window is not None and places_BL is not None and any(slides):
        near_B1QL = (places_BL[:, None, :] > places_BL[:, past:, None] - window)[:, None]
    full: Any = None
    if (length == 1 and seen_BL is None) or (near_B1QL is not None and all(slides)):
        pass  # one new token sees all there is; or nothing asks for this mask
    elif kernel in ("sdpa", "eager"):
        if kernel == "eager" or seen_BL is not None or past > 0:  # else SDPA is causal by itself
            full = _causal(past, hidden_BQC, seen_BL)
    else:
        view: Any = None if cache is None else _OneLayer(cache, layer)
        full = create_causal_mask(
            config=config, inputs_embeds=hidden_BQC, attention_mask=seen_BL, position_ids=None, **{CACHE: view}
        )
    sliding = full if near_B1QL is None else near_B1QL & _causal(past, hidden_BQC, seen_BL)
    if kernel == "eager":
        full, sliding = (None if mask is None else additive(mask, hidden_BQC.dtype) for mask in (full, sliding))
    return Masks(full, sliding)


def _causal(past: int, hidden_BQC: Tensor, seen_BL: Tensor | None) -> Tensor:
    """Bool (B or 1, 1, Q, L)."""
    length = hidden_BQC.shape[1]
    if length == 1:
        if seen_BL is not None:
            return seen_BL[:, None, None, :]
        return torch.ones(1, 1, 1, past + 1, dtype=torch.bool, device=hidden_BQC.device)
    causal_QL = torch.ones(length, past + length, dtype=torch.bool, device=hidden_BQC.device).tril(past)
    return causal_QL[None, None] if seen_BL is None else causal_QL & seen_BL[:, None, None, :]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What eager attention adds to its logits for a bool mask."""
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.finfo(dtype).min)
