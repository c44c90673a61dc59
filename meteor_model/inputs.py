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


def check_arguments(input_ids: Any, inputs_embeds: Any, labels: Any, logits_to_keep: Any, cache: Any) -> None:
    """Arguments of `forward` that exclude one another.

    Raises:
        ValueError: for ids and embeddings at once or neither; for labels with a pruned decoder, or with part of the
            logits.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if labels is not None and isinstance(cache, MeteorCache):
        raise ValueError("labels go with an unpruned decoder: stage 3 leaves no logits for dropped tokens")
    if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        raise ValueError("labels need the logits of every token: leave logits_to_keep out")


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


def check_tokens(embeds_BTC: torch.Tensor, attention_mask: Any, past_key_values: Any) -> None:
    """There are tokens, and a (B, L) mask has their samples and columns. Shapes only.

    Raises:
        ValueError: naming both shapes.
    """
    check_not_empty(embeds_BTC)
    grows = past_key_values is None or isinstance(past_key_values, DynamicCache)  # others: a mask of their whole length
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 and grows:
        check_mask(embeds_BTC, attention_mask, past_key_values.get_seq_length() if past_key_values is not None else 0)


def check_padding(attention_mask: Any) -> None:
    """A prompt for `generate` ends in its last column: the next token and its position are counted from there.

    (One pass of stage 3 takes padding on either side; `generate` would go on at the wrong positions.)

    Raises:
        ValueError: naming the sample that is padded on the right, or all padding.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2 or 0 in attention_mask.shape:
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


def scatter_visual(embeds_BTC: torch.Tensor, is_image_BT: torch.Tensor, visual_MKC: torch.Tensor) -> torch.Tensor:
    """4. scatter: visual tokens in the place of the placeholders, in order.

    Tokens of a blank image find no placeholder. They stay in the graph, with gradients of zero.
    """
    is_image_BTC = is_image_BT.to(embeds_BTC.device).unsqueeze(-1).expand_as(embeds_BTC)
    return embeds_BTC.masked_scatter(is_image_BTC, visual_MKC.to(embeds_BTC))
