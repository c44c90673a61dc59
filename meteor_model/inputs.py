"""What the model is given: what it refuses before it runs, each with what to do about it; and images put into the text.

Shapes are looked at for nothing. Values are read back to the host once a call, and not at all in a decode step.

Legend: B samples, T tokens of this call, L all tokens so far, M images, K visual tokens per image, C LLM width, S
travelling size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from meteor_model.decoder.cache import MeteorCache
from meteor_model.decoder.prompt import check_mask, check_not_empty
from meteor_model.options import refuse_options
from meteor_model.pruners.select import unit

#: What `forward` hands on to the LLM.
LLM_OPTIONS = ("output_attentions", "output_hidden_states")


def check_arguments(
    input_ids: Any,
    inputs_embeds: Any,
    labels: Any,
    logits_to_keep: Any,
    loss_chunk: Any,
    cache: Any,
    options: Mapping[str, Any],
) -> None:
    """Arguments of `forward` that exclude one another, and those that it does not have.

    Raises:
        ValueError: for ids and embeddings at once or neither; for labels with a pruned decoder, or with part of the
            logits; for chunks of a loss without labels; for an unknown argument, naming it.
    """
    refuse_options("forward", options, LLM_OPTIONS)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if labels is not None and isinstance(cache, MeteorCache):
        raise ValueError("labels go with an unpruned decoder: stage 3 leaves no logits for dropped tokens")
    if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        raise ValueError("labels need the logits of every token: leave logits_to_keep out")
    if loss_chunk is not None and labels is None:
        raise ValueError(f"loss_chunk={loss_chunk} is of a loss, which needs labels: give both or neither")
    if loss_chunk is not None and not (isinstance(loss_chunk, int) and loss_chunk > 0):
        raise ValueError(f"loss_chunk is {loss_chunk!r}; it must be a number of tokens above 0, or None")


def check_image_mask(image_mask: Any, input_ids: Any, prompt_embeds: Any, cache: Any) -> None:
    """ValueError for an image mask beside the ids of a prompt, which say themselves where its images are.

    (Steps of `generate` come with the mask of their prompt.)
    """
    at_prompt = cache is None or (isinstance(cache, DynamicCache) and cache.get_seq_length() == 0)
    if image_mask is not None and input_ids is not None and prompt_embeds is None and at_prompt:
        raise ValueError("image_mask goes with inputs_embeds: input_ids say themselves where images are")


def check_outputs(config: PreTrainedConfig, options: Mapping[str, Any]) -> None:
    """Where stage 3 prunes, layers hold different tokens, so there is nothing to stack.

    Args:
        config: the decoder's, for what it gives by default.
        options: arguments of the call.

    Raises:
        ValueError: naming the output that is asked for.
    """
    asked = []
    for name in ("output_attentions", "output_hidden_states"):
        given = options.get(name)
        if getattr(config, name) if given is None else given:
            asked.append(name)
    if asked:
        raise ValueError(
            f"{asked} cannot be given where stage 3 prunes: layers hold different tokens. Pass "
            "past_key_values=DynamicCache(), or set pruning.decode.enabled to false"
        )


def check_pixels(pixel_values: Any, *, empty: bool = False) -> None:
    """Images are a tensor, and there is at least one unless `empty`. Raises ValueError."""
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(
            f"pixel_values must be a uint8 torch tensor (M, 3, S, S), got {type(pixel_values).__name__}: ask the "
            "processor for return_tensors='pt', or use torch.from_numpy"
        )
    if not empty and len(pixel_values) == 0:
        raise ValueError("pixel_values hold no image: give at least one")


def check_placeholders(is_image_BT: torch.Tensor, num_images: int, per_image: int) -> None:
    """Every sample holds whole images, and all samples together the images that came.

    Args:
        is_image_BT: bool, where placeholders are.
        num_images: images of all samples.
        per_image: visual tokens, hence placeholders, of an image.

    Raises:
        ValueError: naming the sample and both counts. In a compiled graph, which cannot read numbers back to name
            them, the same condition is asserted on the device: a RuntimeError, never a shifted image.
    """
    counts_B = is_image_BT.sum(dim=1)
    if torch.compiler.is_compiling():
        whole = (counts_B % per_image == 0).all() & (counts_B.sum() == num_images * per_image)
        torch._assert_async(whole, "image placeholders and visual tokens differ: run the batch uncompiled to see where")
        return
    counts = counts_B.tolist()
    for sample, count in enumerate(counts):
        if count % per_image:
            raise ValueError(
                f"sample {sample} of the batch has {count} image placeholders, not a multiple of the {per_image} "
                "visual tokens of an image: was it encoded for another pruning configuration?"
            )
    if sum(counts) != num_images * per_image:
        raise ValueError(
            f"the batch has {sum(counts)} image placeholders ({counts} by sample), its {num_images} images give "
            f"{num_images * per_image} visual tokens ({per_image} each)"
        )


def check_images(pixel_values: Any, is_image_BT: torch.Tensor, per_image: int) -> None:
    """Images are a tensor, perhaps of none, and the text has room for them. Raises ValueError."""
    check_pixels(pixel_values, empty=True)
    check_placeholders(is_image_BT, len(pixel_values), per_image)


def check_no_images(
    is_image_BT: torch.Tensor, per_image: int, labels: torch.Tensor | None, past_key_values: Any
) -> None:
    """Ids that come without images hold none: a bare placeholder's embedding says nothing.

    With labels there may be no placeholder at all. A prompt may hold fewer than an image's: a model can say the token
    itself. What comes on a used cache is not looked at, so that a decode step reads nothing back.

    Raises:
        ValueError: as `check_placeholders`.
    """
    if labels is not None:
        check_placeholders(is_image_BT, 0, per_image)
        return
    if is_image_BT.shape[1] < per_image or (past_key_values is not None and past_key_values.get_seq_length()):
        return  # (a fixed-size cache counts on the device: a decode step must not ask it)
    counts_B = is_image_BT.sum(dim=1)
    if torch.compiler.is_compiling():
        torch._assert_async((counts_B < per_image).all(), "image placeholders came without pixel_values")
        return
    counts = counts_B.tolist()
    if max(counts, default=0) >= per_image:
        raise ValueError(
            f"the batch has {sum(counts)} image placeholders ({counts} by sample) and no pixel_values: give its images"
        )


def check_tokens(
    embeds_BTC: torch.Tensor,
    attention_mask: Any,
    past_key_values: Any,
    position_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    image_mask: torch.Tensor | None = None,
) -> None:
    """There are tokens, and what is given for each of them has their samples and columns. Shapes only.

    Raises:
        ValueError: naming both shapes.
    """
    check_not_empty(embeds_BTC)
    samples, length = embeds_BTC.shape[:2]
    grows = past_key_values is None or isinstance(past_key_values, DynamicCache)  # others: a mask of their whole length
    if isinstance(attention_mask, torch.Tensor):
        if attention_mask.ndim == 2 and grows:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            check_mask(embeds_BTC, attention_mask, past)
        elif attention_mask.ndim not in (2, 4) or attention_mask.dtype == torch.uint8:
            raise ValueError(
                f"the attention mask is {attention_mask.dtype} {tuple(attention_mask.shape)}: give (B, L) of 0 and 1, "
                "or what the LLM's own forward takes, (B, 1, Q, L); pixel_values is the third argument"
            )
    expected = {"position_ids": position_ids, "labels": labels, "image_mask": image_mask}
    for name, given in expected.items():
        rows = (1, samples) if name == "position_ids" else (samples,)
        if given is not None and (given.ndim != 2 or given.shape[0] not in rows or given.shape[1] != length):
            raise ValueError(f"{name} is {tuple(given.shape)}, the tokens are {(samples, length)}")


def inferred_mask(input_ids: Any, pad_token_id: Any, eos_token_id: Any) -> torch.Tensor | None:
    """The mask that `generate` of transformers makes of ids that come without one, (B, T) bool; None where it does not.

    A padding token that is no end-of-sequence token is padding wherever it stands.
    """
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2 or pad_token_id is None:
        return None
    ends = [] if eos_token_id is None else torch.as_tensor(eos_token_id).flatten().tolist()
    pad = int(torch.as_tensor(pad_token_id))
    return None if pad in ends else input_ids != pad


def check_padding(attention_mask: Any) -> None:
    """A prompt for `generate` ends in its last column: the next token and its position are counted from there.

    (One pass of stage 3 takes padding on either side; `generate` would go on at the wrong positions.)

    Raises:
        ValueError: naming the sample that is padded on the right, or all padding; for a mask that is not (B, T).
    """
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        is_tensor = isinstance(attention_mask, torch.Tensor)
        shape = tuple(attention_mask.shape) if is_tensor else type(attention_mask).__name__
        raise ValueError(f"generate takes an attention mask (B, T) of 0 and 1, got {shape}")
    if 0 in attention_mask.shape:
        return
    ends, holds = torch.stack([attention_mask[:, -1].bool(), attention_mask.bool().any(dim=1)]).tolist()
    for sample, (ends_in_token, holds_tokens) in enumerate(zip(ends, holds, strict=True)):
        if not holds_tokens:
            raise ValueError(f"sample {sample} of the batch is all padding: a prompt needs at least one token")
        if not ends_in_token:
            raise ValueError(
                f"sample {sample} of the batch is padded on the right, where new tokens go on: give the "
                'processor padding_side="left"'
            )


def at_least_one(pixel_values: torch.Tensor, size: int) -> torch.Tensor:
    """The images, or one blank image where there is none: every rank of a distributed run runs every tower."""
    return pixel_values if len(pixel_values) else pixel_values.new_zeros(1, 3, size, size)


def mean_text_of_images(
    embeds_BTC: torch.Tensor, is_text_BT: torch.Tensor, is_image_BT: torch.Tensor, per_image: int, images: int
) -> torch.Tensor:
    """The mean of the unit embeddings of the text that goes with each image, (M, C) fp32; 0 without text.

    Args:
        embeds_BTC: embeddings of the text.
        is_text_BT: which of them are text.
        is_image_BT: where placeholders are.
        per_image: placeholders of an image.
        images: M, of all samples in order.
    """
    unit_BTC = unit(embeds_BTC) * is_text_BT[..., None]
    mean_BC = unit_BTC.sum(dim=1) / is_text_BT.sum(dim=1, keepdim=True).clamp(min=1)
    ends_B = (is_image_BT.sum(dim=1) // per_image).cumsum(dim=0)
    owner_M = torch.searchsorted(ends_B, torch.arange(images, device=ends_B.device), right=True)
    return mean_BC[owner_M.clamp(max=len(mean_BC) - 1)]


def scatter_visual(embeds_BTC: torch.Tensor, is_image_BT: torch.Tensor, visual_MKC: torch.Tensor) -> torch.Tensor:
    """4. scatter: visual tokens in the place of the placeholders, in order.

    Tokens of a blank image find no placeholder. They stay in the graph, with gradients of zero.
    """
    is_image_BTC = is_image_BT.to(embeds_BTC.device).unsqueeze(-1).expand_as(embeds_BTC)
    return embeds_BTC.masked_scatter(is_image_BTC, visual_MKC.to(embeds_BTC))
