"""Activation memory of one micro-batch of any `MeteorConfig`, counted by dispatch on the meta device.

The modules themselves run forward on shape-only tensors; what lives then is what autograd holds for the backward pass.
No formula here knows an architecture. Attention counts as a fused kernel: queries, keys, values and the result stay,
no matrix of scores does (towers with a kernel of their own, as Pix2Struct's, count as they are).

Legend: B samples of a micro-batch, T tokens of the longest of them, C LLM width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.flops import META
from meteor_model.logits import token_loss
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from pipelines.checkpoint.zero3 import checkpoint_activations, part_of
from pipelines.compat.torch_memory import LivingTensors
from pipelines.config.settings import Part


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one worker.

    Attributes:
        kept: what autograd holds at the end of the forward pass.
        forward: the most that lives in the forward pass.
        block: what one block holds while it is recomputed; 0 where every block is kept.
        logits: of the micro-batch, in the number format of training, and in fp32 for the loss, with their gradients; 0
            where the loss is made in chunks: then `forward` holds those of a chunk.
        no_grad: the most that lives in a forward pass without a backward one that gives all logits, as parity takes it.
    """

    kept: int
    forward: int
    block: int
    logits: int
    no_grad: int

    @property
    def peak(self) -> int:
        """The most of a forward and backward pass: gradients pass through the logits, or through one block.

        A checkpoint that is validated also carries the logits of a batch, from a forward pass between two steps.
        """
        return max(self.forward, self.kept + max(self.logits, 2 * self.block), self.no_grad)


def count_activations(
    config: MeteorConfig,
    trained: Collection[Part],
    *,
    micro_batch: int,
    length: int,
    dtype: torch.dtype,
    checkpointing: bool,
    loss_chunk: int | None = None,
) -> Activations:
    """Bytes of a micro-batch of `micro_batch` samples with an image each, all of `length` tokens.

    Args:
        config: any model.
        trained: the parts that get gradients.
        micro_batch: samples.
        length: tokens of each, visual ones included.
        dtype: number format of weights and activations.
        checkpointing: whether blocks keep their input alone and are recomputed.
        loss_chunk: tokens whose logits exist at a time, every token being supervised; None: all.
    """
    model = _model(config, trained, dtype)
    shape = (micro_batch, length)
    kept, forward = _run(model, shape, dtype, loss_chunk)
    block = 0
    if checkpointing:
        without = kept
        checkpoint_activations(model)
        kept, forward = _run(model, shape, dtype, loss_chunk)
        block = (without - kept) // config.text_config.num_hidden_layers
    with torch.no_grad():
        _, no_grad = _run(model.eval(), shape, dtype, None)
    elements = 0 if loss_chunk else micro_batch * length * config.text_config.vocab_size
    logits = 2 * elements * (dtype.itemsize + torch.float32.itemsize)
    return Activations(kept, forward, block, logits, no_grad)


def _model(config: MeteorConfig, trained: Collection[Part], dtype: torch.dtype) -> MeteorForConditionalGeneration:
    config = copy.deepcopy(config)
    config.text_config._attn_implementation = "sdpa"
    with META:
        model = MeteorForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in trained)
    return model.to(dtype).train()


def _run(
    model: MeteorForConditionalGeneration, shape: tuple[int, int], dtype: torch.dtype, loss_chunk: int | None
) -> tuple[int, int]:
    """What lives after a forward pass with its loss, and the most that lived in it."""
    config, (batch, length) = model.config, shape
    with _FusedAttention(), LivingTensors(model) as living:
        pixels = torch.empty(batch, 3, config.image_size, config.image_size, dtype=torch.uint8, device=META)
        visual_BKC = model.encode_images(pixels)[0]
        width = config.text_config.hidden_size
        text_BTC = torch.empty(batch, length - visual_BKC.shape[1], width, dtype=dtype, device=META)
        embeds_BTC = torch.cat([visual_BKC, text_BTC], dim=1)
        mask_B1TT = torch.ones(batch, 1, length, length, dtype=torch.bool, device=META)  # a 2-D one would be read
        hidden_BTC = model.language_model(
            inputs_embeds=embeds_BTC, attention_mask=mask_B1TT, use_cache=False
        ).last_hidden_state
        labels_BT = torch.empty(batch, length, dtype=torch.long, device=META)
        if loss_chunk is None:
            loss = token_loss(model.lm_head(hidden_BTC), labels_BT, num_items_in_batch=1.0)
        else:
            loss = model.lm_head(hidden_BTC[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), loss_chunk)
        del text_BTC, hidden_BTC, labels_BT, pixels, visual_BKC, embeds_BTC
        kept = living.now
        del loss
    return kept, living.peak


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel holds it; torch's own choice for shape-only tensors makes the matrix of scores."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            return _Attention.apply(query, key, value)
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """The shapes of an attention: what it keeps and what it gives."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (..., T, d) and values (..., S, e) -> (..., T, e)."""
        result = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the three."""
        query, key, value, _ = ctx.saved_tensors
        return tuple(torch.empty_like(one) for one in (query, key, value))
