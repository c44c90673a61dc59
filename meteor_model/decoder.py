"""Stage 3: text-guided pruning inside an unmodified Hugging Face decoder, at inference.

    1. lower    layers [0, layer) run on the whole prompt
    2. score    the last of them is asked how much the text looks at each visual token; only that score row is computed,
                from the layer's own q and k projections, so attention kernels stay untouched
    3. keep     K visual tokens per sample, from its own attention mass; text tokens all stay
    4. upper    layers [layer, L) run on the kept tokens: gathered, left-padded to the longest sample, masked, at their
                original positions
    5. decode   new tokens run through all layers; the cache is full below `layer` and short above it

What was decided at prefill lives in the cache (`MeteorCache`), never on a module: several requests at once, beam search
and batch selection need nothing else. The loop owns the calls to the decoder's layers and changes none of them.

Shape legend: B samples, T tokens of the whole prompt, W kept tokens of the longest sample, Q new tokens of this call,
L all tokens so far (cached and new), H heads, G key/value heads, C language model width, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.pruning import adaptive_counts, gather_tokens, select_visual, text_guided_scores

# Decoders whose loop is the plain one (embed, layers, norm) and whose attention rotates whole heads by halves. Others
# scale embeddings or residuals, or rotate differently: each needs its own check against its library's forward.
DECODER_FAMILIES = ("gemma", "llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Decision:
    """What stage 3 decided at prefill.

    Attributes:
        prompt_length: T, columns of the whole prompt.
        mask_BW: bool, which columns of the upper layers hold a kept token (they are left-padded).
        kept_index_BW: int64, the prompt column of each kept token, -1 in the padding.
        kept_counts_B: int64, visual tokens kept of each sample.
        mass_B: fp32, attention mass on visual tokens over the chosen heads.
    """

    prompt_length: int
    mask_BW: Tensor
    kept_index_BW: Tensor
    kept_counts_B: Tensor
    mass_B: Tensor

    def select(self, rows: Tensor) -> Decision:
        """The decision for these rows of the batch, in this order."""
        parts = (self.mask_BW, self.kept_index_BW, self.kept_counts_B, self.mass_B)
        return Decision(self.prompt_length, *(part[rows.to(part.device)] for part in parts))


@dataclass
class DecodedOutput(BaseModelOutputWithPast):
    """Output of `decode_pruned`.

    Attributes:
        last_hidden_state: (B, W, C) at prefill, (B, Q, C) afterwards. Index -1 is each sample's last token. Pruned
            positions have no hidden state, hence no logits.
        past_key_values: the `MeteorCache`, or None without a cache.
        kept_index: (B, W) at prefill: the prompt column of each row of the output, -1 in the padding. None afterwards.
        kept_counts: (B,) visual tokens kept of each sample's prompt.
    """

    kept_index: Tensor | None = None
    kept_counts: Tensor | None = None


class MeteorCache(DynamicCache):
    """A key/value cache that carries stage 3: its settings, and from prefill on its decision.

    Full below `settings.layer`, short from there on; `get_seq_length()` is the full length. Give a fresh one to
    `decode_pruned` (or to `generate`, where it makes the model prune).

    Args:
        config: the decoder's configuration.
        settings: stage 3's settings; `lam` must be known.
        num_heads: heads that are listened to.

    Raises:
        ValueError: when lambda is unknown, the layer or the heads do not exist, or a layer does not attend to all
            earlier tokens (sliding windows count columns, which pruning changes).
    """

    layers: list[DynamicLayer]

    def __init__(self, config: PreTrainedConfig, settings: DecodePruning, num_heads: int) -> None:
        super().__init__(config=config)
        if settings.lam is None:
            raise ValueError("pruning.decode.lam is not set: solve it for a target_mean on a calibration batch")
        _check_settings(config, settings, num_heads)
        for index, layer in enumerate(self.layers):
            if type(layer) is not DynamicLayer:
                raise ValueError(
                    f"LLM layer {index} caches as {type(layer).__name__}: stage 3 supports full attention only; "
                    "set pruning.decode.enabled to false or choose a decoder without sliding windows"
                )
        self.settings = settings
        self.num_heads = num_heads
        self.lam = settings.lam
        self.decision: Decision | None = None

    def reset(self) -> None:
        """Empty, with the decision forgotten."""
        # Fresh layers: some releases' own reset only zeroes a growing layer and leaves its length.
        self.layers = [DynamicLayer() for _ in self.layers]
        self.decision = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        super().reorder_cache(beam_idx)
        if self.decision is not None:
            self.decision = self.decision.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        if self.decision is not None:
            self.decision = self.decision.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        super().batch_repeat_interleave(repeats)
        if self.decision is not None:
            rows = torch.arange(len(self.decision.kept_counts_B), device=self.decision.kept_counts_B.device)
            self.decision = self.decision.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of every layer; 0 drops none.

        Raises ValueError for a positive number and where the prompt itself would be cut: above the layer its tokens are
        not the ones that a shorter prompt would have kept.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        prompt_length = self.decision.prompt_length if self.decision is not None else 0
        if tokens_to_remove < 0 and self.get_seq_length() + tokens_to_remove < prompt_length:
            raise ValueError(
                f"cannot remove {-tokens_to_remove} of {self.get_seq_length()} tokens: the prompt's {prompt_length} "
                "were pruned together and cannot be cut; start a new cache"
            )
        super().crop(tokens_to_remove)


@dataclass(frozen=True)
class _UpperView:
    """The cache as the mask maker sees it from the first upper layer.

    `create_causal_mask` measures one layer, by default the first; the argument that chooses another came only in later
    releases. It takes its numbers from these two methods in all of them.
    """

    cache: MeteorCache

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.cache.get_seq_length(self.cache.settings.layer)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.cache.get_mask_sizes(query_length, self.cache.settings.layer)


def decode_pruned(
    language_model: PreTrainedModel,
    inputs_embeds_BQC: Tensor,
    attention_mask_BL: Tensor | None,
    position_ids_BQ: Tensor | None,
    visual_mask_BQ: Tensor | None,
    past_key_values: MeteorCache,
    use_cache: bool = True,
) -> DecodedOutput:
    """One pass of a decoder with stage 3: the prefill on an empty cache, decode steps after it.

    At prefill the whole prompt must come in one call. Padding may be on either side; from the layer on it is on the
    left. Tokens that come later are never pruned, visual or not. When nothing is dropped the result equals the
    decoder's own forward bit for bit (for left-padded input).

    Args:
        language_model: a bare decoder (`LlamaModel`, ...) of one of `DECODER_FAMILIES`.
        inputs_embeds_BQC: embeddings of the prompt (Q = T), or of the new tokens.
        attention_mask_BL: 0 and 1 for all tokens so far, cached and new. None: no padding.
        position_ids_BQ: the original positions. None: counted up from the length of the cache.
        visual_mask_BQ: which tokens of the prompt are visual; ignored after prefill. None: none.
        past_key_values: carries settings and decision.
        use_cache: without, keys and values are dropped: one pass over a prompt, no decode steps.

    Raises:
        ValueError: an unsupported decoder, masks that do not fit, a sample without any token, or a cache that was
            filled elsewhere.
    """
    _check_family(language_model.config)
    past_length = _check_cache(past_key_values, use_cache)
    cache = past_key_values if use_cache else None
    layer = past_key_values.settings.layer
    attended_BL = _attended(inputs_embeds_BQC, attention_mask_BL, past_length)
    position_ids_BQ = _positions(inputs_embeds_BQC, position_ids_BQ, past_length)
    visual_BQ = _visual(inputs_embeds_BQC, visual_mask_BQ, attended_BL)

    # 1. lower, pausing before the layer that is asked
    rotary = language_model.rotary_emb(inputs_embeds_BQC, position_ids_BQ)
    mask = _causal_mask(language_model, inputs_embeds_BQC, attended_BL, cache)
    lower = {"mask": mask, "rotary": rotary, "position_ids_BQ": position_ids_BQ, "cache": cache}
    asked_BQC = _run_layers(language_model, inputs_embeds_BQC, range(layer - 1), **lower)
    hidden_BQC = _run_layers(language_model, asked_BQC, range(layer - 1, layer), **lower)

    kept_index_BW = None
    if past_key_values.decision is None:  # 2. score, 3. keep
        settings, num_heads = past_key_values.settings, past_key_values.num_heads
        scores_BT, mass_B = _score(language_model, asked_BQC, rotary, attended_BL, visual_BQ, settings, num_heads)
        counts_B = adaptive_counts(mass_B, past_key_values.lam, visual_BQ.sum(dim=-1), settings.k_min)
        decision, order_BW = _decide(scores_BT, mass_B, counts_B, visual_BQ, attended_BL)
        hidden_BQC, position_ids_BQ = gather_tokens(hidden_BQC, order_BW), gather_tokens(position_ids_BQ, order_BW)
        upper_mask, kept_index_BW = decision.mask_BW, decision.kept_index_BW
        if use_cache:
            past_key_values.decision = decision
    else:  # 5. decode
        decision = past_key_values.decision
        upper_mask = torch.cat([decision.mask_BW, attended_BL[:, decision.prompt_length :]], dim=1)

    # 4. upper. Positions reach the layers through the rotary embedding only: as position_ids their gaps would look like
    # packed sequences to flash attention.
    hidden_BQC = _run_layers(
        language_model,
        hidden_BQC,
        range(layer, language_model.config.num_hidden_layers),
        mask=_causal_mask(language_model, hidden_BQC, upper_mask, None if cache is None else _UpperView(cache)),
        rotary=language_model.rotary_emb(hidden_BQC, position_ids_BQ),
        position_ids_BQ=None,
        cache=cache,
    )
    return DecodedOutput(
        last_hidden_state=language_model.norm(hidden_BQC),
        past_key_values=cache,
        kept_index=kept_index_BW,
        kept_counts=decision.kept_counts_B,
    )


def attention_mass(
    language_model: PreTrainedModel,
    inputs_embeds_BTC: Tensor,
    attention_mask_BT: Tensor | None,
    position_ids_BT: Tensor | None,
    visual_mask_BT: Tensor,
    settings: DecodePruning,
    num_heads: int,
) -> Tensor:
    """Attention mass on visual tokens of each prompt, (B,) fp32, nothing pruned: what `solve_lambda` is given.

    Only the layers below `settings.layer` are needed, and of the last of them only its queries and keys. Arguments and
    errors as in `decode_pruned`; `settings.lam` is not used.
    """
    _check_family(language_model.config)
    _check_settings(language_model.config, settings, num_heads)
    attended_BT = _attended(inputs_embeds_BTC, attention_mask_BT, 0)
    position_ids_BT = _positions(inputs_embeds_BTC, position_ids_BT, 0)
    visual_BT = _visual(inputs_embeds_BTC, visual_mask_BT, attended_BT)
    rotary = language_model.rotary_emb(inputs_embeds_BTC, position_ids_BT)
    mask = _causal_mask(language_model, inputs_embeds_BTC, attended_BT, None)
    asked_BTC = _run_layers(
        language_model,
        inputs_embeds_BTC,
        range(settings.layer - 1),
        mask=mask,
        rotary=rotary,
        position_ids_BQ=position_ids_BT,
        cache=None,
    )
    return _score(language_model, asked_BTC, rotary, attended_BT, visual_BT, settings, num_heads)[1]


# ------------------------------------------------------------------------------------------------------------ the steps


def _causal_mask(language_model: PreTrainedModel, hidden_BQC: Tensor, attended_BL: Tensor, past: Any) -> Any:
    """The decoder's own kind of mask (None, bool, additive, 2-D), for whatever attention kernel it is set to."""
    return create_causal_mask(
        config=language_model.config,
        inputs_embeds=hidden_BQC,
        attention_mask=attended_BL,
        past_key_values=past,
        position_ids=None,
    )


def _run_layers(
    language_model: PreTrainedModel,
    hidden_BQC: Tensor,
    layers: range,
    *,
    mask: Any,
    rotary: tuple[Tensor, Tensor],
    position_ids_BQ: Tensor | None,
    cache: MeteorCache | None,
) -> Tensor:
    for index in layers:
        hidden_BQC = language_model.layers[index](
            hidden_BQC,
            attention_mask=mask,
            position_embeddings=rotary,
            position_ids=position_ids_BQ,
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return hidden_BQC


def _rotate(states_BHTd: Tensor, cos_BTd: Tensor, sin_BTd: Tensor) -> Tensor:
    """Rotary embedding by halves, as in every family of `DECODER_FAMILIES`."""
    low, high = states_BHTd.chunk(2, dim=-1)
    turned_BHTd = torch.cat([-high, low], dim=-1)
    return states_BHTd * cos_BTd[:, None] + turned_BHTd * sin_BTd[:, None]


def _score(
    language_model: PreTrainedModel,
    asked_BTC: Tensor,
    rotary: tuple[Tensor, Tensor],
    attended_BT: Tensor,
    visual_BT: Tensor,
    settings: DecodePruning,
    num_heads: int,
) -> tuple[Tensor, Tensor]:
    """Scores (B, T) and mass (B,) from the queries and keys of layer `settings.layer - 1`, given that layer's input."""
    block = language_model.layers[settings.layer - 1]
    attention = block.self_attn
    normed_BTC = block.input_layernorm(asked_BTC)

    def project(linear: nn.Module, norm: nn.Module | None, hidden_BTC: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
        states_BTHd = linear(hidden_BTC).unflatten(-1, (-1, attention.head_dim))
        if norm is not None:
            states_BTHd = norm(states_BTHd)
        return _rotate(states_BTHd.transpose(1, 2), *at)

    # Qwen3 and its kin normalise queries and keys head by head before the rotation.
    query_norm, key_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    if settings.query == "last":
        last_B1 = _last_index(attended_BT)
        asking_BQC = gather_tokens(normed_BTC, last_B1)
        asking_at = (gather_tokens(rotary[0], last_B1), gather_tokens(rotary[1], last_B1))
        allowed_BQT = attended_BT[:, None]
    else:
        asking_BQC, asking_at = normed_BTC, rotary
        allowed_BQT = _text_rows(attended_BT, visual_BT)
    query_BHQd = project(attention.q_proj, query_norm, asking_BQC, asking_at)
    key_BGTd = project(attention.k_proj, key_norm, normed_BTC, rotary)
    return text_guided_scores(query_BHQd, key_BGTd, visual_BT, allowed_BQT, attention.scaling, num_heads)


def _last_index(attended_BT: Tensor) -> Tensor:
    """Column of each sample's last token, (B, 1)."""
    columns_T = torch.arange(attended_BT.shape[1], device=attended_BT.device)
    return torch.where(attended_BT, columns_T, -1).amax(dim=1, keepdim=True)


def _text_rows(attended_BT: Tensor, visual_BT: Tensor) -> Tensor:
    """Who sees what when all text asks, (B, T, T): text rows after the first visual token, causally, no padding.

    Text before the image sees no visual token: it would only dilute the mean.
    """
    length = attended_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=attended_BT.device).tril()
    asks_BT = attended_BT & ~visual_BT & (visual_BT.cumsum(dim=1) > 0)
    return asks_BT[:, :, None] & causal_TT & attended_BT[:, None, :]


def _decide(
    scores_BT: Tensor, mass_B: Tensor, counts_B: Tensor, visual_BT: Tensor, attended_BT: Tensor
) -> tuple[Decision, Tensor]:
    """The decision, and the gather order (B, W): prompt columns of the kept tokens, after those that pad the row."""
    keep_BT = (attended_BT & ~visual_BT) | select_visual(scores_BT, visual_BT, counts_B)
    # Nothing dropped: keep the prompt's width, so that this is the decoder's own forward to the last bit.
    width = keep_BT.shape[1] if torch.equal(keep_BT, attended_BT) else int(keep_BT.sum(dim=1).max())
    # A stable sort of 0 (not kept) before 1 (kept) is the left-padded gather; what pads is masked, whatever it is.
    order_BW = torch.sort(keep_BT.to(torch.uint8), dim=1, stable=True).indices[:, -width:]
    mask_BW = gather_tokens(keep_BT, order_BW)
    kept_index_BW = order_BW.masked_fill(~mask_BW, -1)
    return Decision(keep_BT.shape[1], mask_BW, kept_index_BW, counts_B, mass_B), order_BW


# ------------------------------------------------------------------------------------------------- arguments and checks


def _check_family(config: PreTrainedConfig) -> None:
    if config.model_type not in DECODER_FAMILIES:
        raise ValueError(
            f"stage 3 does not know the decoder family {config.model_type!r} (known: {', '.join(DECODER_FAMILIES)}); "
            "set pruning.decode.enabled to false or choose one of these"
        )


def _check_settings(config: PreTrainedConfig, settings: DecodePruning, num_heads: int) -> None:
    layers = config.num_hidden_layers
    if not 1 <= settings.layer < layers:
        raise ValueError(
            f"pruning.decode.layer {settings.layer} is not between 1 and {layers - 1}, the LLM's last layer"
        )
    if not 1 <= num_heads <= config.num_attention_heads:
        raise ValueError(
            f"pruning.decode.num_heads {num_heads} is not between 1 and the LLM's {config.num_attention_heads} heads"
        )


def _check_cache(cache: MeteorCache, use_cache: bool) -> int:
    """Tokens in the cache, 0 at prefill."""
    length = cache.get_seq_length()
    if length and cache.decision is None:
        raise ValueError(
            f"the cache holds {length} tokens that stage 3 has not seen: give decode_pruned a new MeteorCache and the "
            "whole prompt"
        )
    if length and not use_cache:
        raise ValueError(f"a pass without a cache got one that holds {length} tokens: give it a new MeteorCache")
    return length


def _attended(embeds_BQC: Tensor, attention_mask_BL: Tensor | None, past_length: int) -> Tensor:
    """The attention mask as bool (B, L)."""
    shape = (embeds_BQC.shape[0], past_length + embeds_BQC.shape[1])
    if attention_mask_BL is None:
        return torch.ones(shape, dtype=torch.bool, device=embeds_BQC.device)
    if tuple(attention_mask_BL.shape) != shape:
        raise ValueError(
            f"the attention mask is {tuple(attention_mask_BL.shape)}, but the cache's {past_length} tokens and the "
            f"{embeds_BQC.shape[1]} new ones of {shape[0]} samples need {shape}"
        )
    attended_BL = attention_mask_BL.to(device=embeds_BQC.device, dtype=torch.bool)
    if past_length == 0 and not bool(attended_BL.any(dim=1).all()):
        empty = (~attended_BL.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"samples {empty} of the batch are all padding: a prompt needs at least one token")
    return attended_BL


def _positions(embeds_BQC: Tensor, position_ids_BQ: Tensor | None, past_length: int) -> Tensor:
    """Positions (B, Q); by default counted up from the length of the cache, as the decoders do themselves."""
    if position_ids_BQ is None:
        position_ids_BQ = torch.arange(embeds_BQC.shape[1], device=embeds_BQC.device)[None] + past_length
    return position_ids_BQ.expand(embeds_BQC.shape[0], -1)


def _visual(embeds_BQC: Tensor, visual_mask_BQ: Tensor | None, attended_BL: Tensor) -> Tensor:
    """Which of this call's tokens are visual and not padding, bool (B, Q)."""
    if visual_mask_BQ is None:
        return torch.zeros(embeds_BQC.shape[:2], dtype=torch.bool, device=embeds_BQC.device)
    if visual_mask_BQ.shape != embeds_BQC.shape[:2]:
        raise ValueError(
            f"the visual mask is {tuple(visual_mask_BQ.shape)}, the tokens are {tuple(embeds_BQC.shape[:2])}"
        )
    return visual_mask_BQ.to(device=embeds_BQC.device, dtype=torch.bool) & attended_BL[:, -embeds_BQC.shape[1] :]
