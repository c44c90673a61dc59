"""The decoders that stage 3 can run, and how each of them differs from the plain one.

A decoder is plain when its loop is "embed, layers, norm" and a layer's attention is "project, rotate whole heads by
halves, scaled dot product". What a family adds to that is one row of `DECODER_FAMILIES`; everything else (weights,
widths, scaling, rotary frequencies) is read from the decoder's own modules. A new family needs a row here and passes
tests/meteor_model/decoder/test_loop.py, which compares every row with the library's own forward.

Legend: B samples, Q tokens, H heads, C width, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

Rotary = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DecoderFamily:
    """What a family adds to the plain decoder."""

    windows: Literal["none", "every layer", "by layer type"] = "none"
    """Where `config.sliding_window` limits attention: nowhere, everywhere, or in `config.layer_types`."""
    head_norms: bool = False
    """Queries and keys are normalised head by head (`q_norm`, `k_norm`) before the rotation."""
    softcaps_attention: bool = False
    """Attention logits go through cap * tanh(logits / cap) with the attention's `attn_logit_softcapping`."""
    softcaps_logits: bool = False
    """So do the head's logits, with `config.final_logit_softcapping`."""
    rotary_by_layer_type: bool = False
    """The rotary embedding differs between the types of `config.layer_types`."""
    may_look_ahead: bool = False
    """`config.use_bidirectional_attention` exists; stage 3 needs it off."""


DECODER_FAMILIES: dict[str, DecoderFamily] = {
    "llama": DecoderFamily(),
    "mistral": DecoderFamily(windows="every layer"),
    "qwen2": DecoderFamily(windows="by layer type"),
    "qwen3": DecoderFamily(windows="by layer type", head_norms=True),
    "gemma": DecoderFamily(may_look_ahead=True),
    "gemma2": DecoderFamily(
        windows="by layer type", softcaps_attention=True, softcaps_logits=True, may_look_ahead=True
    ),
    "gemma3_text": DecoderFamily(
        windows="by layer type",
        head_norms=True,
        softcaps_logits=True,
        rotary_by_layer_type=True,
        may_look_ahead=True,
    ),
}


@dataclass(frozen=True)
class DecoderPlan:
    """A decoder's layers as stage 3 runs them.

    Attributes:
        family: the family's row.
        window: columns that a sliding layer sees, its own included; None where no layer slides.
        slides: for each layer, whether it does.
        rotary: for each layer, the key of its rotary embedding.
    """

    family: DecoderFamily
    window: int | None
    slides: tuple[bool, ...]
    rotary: tuple[str, ...]


def plan_decoder(config: PreTrainedConfig) -> DecoderPlan:
    """How to run the decoder of this configuration.

    Raises:
        ValueError: where stage 3 does not know the family, or the configuration asks for attention that it cannot
            prune (looking ahead, a layer type other than full or sliding attention), naming the field.
    """
    if config.model_type not in DECODER_FAMILIES:
        raise ValueError(
            f"stage 3 does not know the decoder family {config.model_type!r} of text_config.model_type (known: "
            f"{', '.join(DECODER_FAMILIES)}); set pruning.decode.enabled to false or choose one of these"
        )
    family = DECODER_FAMILIES[config.model_type]
    if family.may_look_ahead and config.use_bidirectional_attention:
        raise ValueError("text_config.use_bidirectional_attention is set: stage 3 needs a decoder that looks back only")
    layers = config.num_hidden_layers
    types = tuple(config.layer_types) if family.windows == "by layer type" else ("full_attention",) * layers
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown or len(types) != layers:
        raise ValueError(
            f"text_config.layer_types has {len(types)} entries for {layers} layers and the unknown types {unknown}: "
            "stage 3 runs full_attention and sliding_attention"
        )
    slides = tuple(kind == "sliding_attention" for kind in types)
    if family.windows == "every layer" and config.sliding_window is not None:
        slides = (True,) * layers
    window = config.sliding_window if any(slides) else None
    return DecoderPlan(family, window, slides, types if family.rotary_by_layer_type else ("all",) * layers)


def check_decode_settings(config: PreTrainedConfig, layer: int, num_heads: int) -> None:
    """Can stage 3 act after `layer` layers of this decoder, listening to `num_heads` heads? Raises ValueError."""
    plan_decoder(config)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if not 1 <= layer < layers:
        raise ValueError(f"pruning.decode.layer {layer} is not between 1 and {layers - 1}, the LLM's last layer")
    if not 1 <= num_heads <= heads:
        raise ValueError(f"pruning.decode.num_heads {num_heads} is not between 1 and the LLM's {heads} heads")


def rotary_embeddings(
    language_model: PreTrainedModel, plan: DecoderPlan, hidden_BQC: Tensor, position_ids_BQ: Tensor
) -> Rotary:
    """The decoder's own (cos, sin), each (B, Q, d), under the keys of `plan.rotary`."""
    if plan.family.rotary_by_layer_type:
        return {kind: language_model.rotary_emb(hidden_BQC, position_ids_BQ, kind) for kind in set(plan.rotary)}
    return {"all": language_model.rotary_emb(hidden_BQC, position_ids_BQ)}


def layer_queries(
    language_model: PreTrainedModel, plan: DecoderPlan, index: int, hidden_BQC: Tensor, rotary: Rotary
) -> Tensor:
    """Queries (B, H, Q, d) of layer `index` for these rows of its input, rotated as the layer itself rotates them."""
    block = language_model.layers[index]
    attention = block.self_attn
    states_BQHd = attention.q_proj(block.input_layernorm(hidden_BQC)).unflatten(-1, (-1, attention.head_dim))
    if plan.family.head_norms:
        states_BQHd = attention.q_norm(states_BQHd)
    return _rotated(states_BQHd.transpose(1, 2), rotary[plan.rotary[index]])


def layer_states(
    language_model: PreTrainedModel, plan: DecoderPlan, index: int, hidden_BQC: Tensor, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    """Keys and values (B, G, Q, d) of layer `index`, as the layer makes them of its input; G key/value heads."""
    block = language_model.layers[index]
    attention = block.self_attn
    normed_BQC = block.input_layernorm(hidden_BQC)
    keys_BQGd = attention.k_proj(normed_BQC).unflatten(-1, (-1, attention.head_dim))
    values_BQGd = attention.v_proj(normed_BQC).unflatten(-1, (-1, attention.head_dim))
    if plan.family.head_norms:
        keys_BQGd = attention.k_norm(keys_BQGd)
    return _rotated(keys_BQGd.transpose(1, 2), rotary[plan.rotary[index]]), values_BQGd.transpose(1, 2)


def _rotated(states_BHQd: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Heads (B, H, Q, d) rotated by halves."""
    cos_BQd, sin_BQd = (part.to(states_BHQd.device) for part in rotary)
    low, high = states_BHQd.chunk(2, dim=-1)
    return states_BHQd * cos_BQd[:, None] + torch.cat([-high, low], dim=-1) * sin_BQd[:, None]


def attention_softcap(language_model: PreTrainedModel, plan: DecoderPlan, index: int) -> float | None:
    """The cap on layer `index`'s attention logits, or None."""
    if not plan.family.softcaps_attention:
        return None
    cap: float | None = language_model.layers[index].self_attn.attn_logit_softcapping
    return cap


def softcap_logits(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """The head's logits as the family's own causal model gives them: capped where the Gemmas cap, else unchanged."""
    family = DECODER_FAMILIES.get(config.model_type)
    if family is None or not family.softcaps_logits or config.final_logit_softcapping is None:
        return logits
    return torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
