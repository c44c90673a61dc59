"""What the model returns.

Legend: B samples, M images of the batch, K visual tokens per image, T sequence length, C LLM width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast, ModelOutput


@dataclass
class PruningStats:
    """What each stage was given and what it kept.

    Attributes:
        encode: for each encoder, the kept positions (M, K_b) in its full grid at every boundary.
        encoder_tokens: for each encoder, the tokens of its full grid.
        fuse: kept indices (M, K) into the pool of all encoders' tokens, in encoder order.
        decode: visual tokens kept per sample (B,) where stage 3 acted, else None.
    """

    encode: dict[str, tuple[torch.Tensor, ...]]
    encoder_tokens: dict[str, int]
    fuse: torch.Tensor
    decode: torch.Tensor | None = None

    def as_metrics(self) -> dict[str, float]:
        """Tokens per image by stage, under the names that are logged."""
        metrics: dict[str, float] = {}
        for name, kept in self.encode.items():
            metrics[f"visual_tokens/{name}/in"] = self.encoder_tokens[name]
            for boundary, positions in enumerate(kept, start=1):
                metrics[f"visual_tokens/{name}/kept_{boundary}"] = positions.shape[1]
        metrics["visual_tokens/in"] = sum(self.encoder_tokens.values())
        metrics["visual_tokens/fuse/in"] = sum(kept[-1].shape[1] for kept in self.encode.values())
        metrics["visual_tokens/fuse/kept"] = self.fuse.shape[1]
        if self.decode is not None:
            metrics["visual_tokens/decode/kept_mean"] = self.decode.float().mean().item()
        return metrics


def with_decision(stats: PruningStats | None, decoded: Any) -> PruningStats | None:
    """What all stages kept: of stages 1 and 2, with what stage 3 decided where `decoded` says so."""
    decision = getattr(decoded, "decision", None)
    return stats if stats is None or decision is None else replace(stats, decode=decision.kept_counts_B)


class _TensorTuple(ModelOutput):
    """As a tuple an output holds tensors alone: what libraries gather, detach and compare."""

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value for key, value in self.items() if key != "pruning_stats")


@dataclass
class MeteorImageFeatures(_TensorTuple, BaseModelOutputWithPooling):
    """Output of `get_image_features`.

    Attributes:
        last_hidden_state: (M, K, C) visual tokens as the LLM gets them, in encoder order, then raster order.
        pooler_output: the same, under the name that VLMs of transformers use for it.
        pruning_stats: what stages 1 and 2 kept.
    """

    pruning_stats: PruningStats | None = None


@dataclass
class MeteorOutput(_TensorTuple, CausalLMOutputWithPast):
    """Output of `MeteorForConditionalGeneration.forward`.

    Attributes:
        loss: scalar, where labels were given.
        logits: (B, T, V), or the last `logits_to_keep` positions; None where `loss_chunk` made the loss without.
        past_key_values: the cache, where one is used; from transformers 5.24 on the field is named `cache`.
        hidden_states: of the LLM: the embeddings and each layer's output, (B, T, C) each, where asked for.
        attentions: of the LLM's layers, where asked for and its kernel is "eager".
        image_hidden_states: (M, K, C) visual tokens as they entered the LLM, where images were run.
        pruning_stats: what stages 1 to 3 kept, where images were run; not part of the tuple form.
    """

    image_hidden_states: torch.Tensor | None = None
    pruning_stats: PruningStats | None = None
