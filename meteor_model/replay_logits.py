"""The forward pass whose choices of tokens are given (`meteor_model.replay`): logits to compare with another pass's.

Legend: B samples, M images, K visual tokens of an image, T sequence length, V vocabulary, C width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meteor_model.inputs import at_least_one, scatter_visual
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.replay import GivenTokens


@torch.no_grad()
def replay_logits(
    model: MeteorForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    pixel_values: Tensor,
    given: GivenTokens,
) -> Tensor:
    """Logits (B, T, V) of a model that keeps the given tokens in stages 1 and 2; stage 3 is not run.

    Args:
        model: in eval mode.
        input_ids: (B, T).
        attention_mask: (B, T).
        pixel_values: (M, 3, S, S) uint8, the images of all samples in order; M = 0 runs the towers on a blank one.
        given: the tokens; its counts are added to.

    Raises:
        ValueError: tokens of other encoders, of another number, or that cannot be kept.
    """
    is_image_BT = input_ids == model.config.image_token_id
    embeds_BTC = model.get_input_embeddings()(input_ids)
    pixels = at_least_one(pixel_values, model.config.image_size)
    text_MC = model.text_of_images(embeds_BTC, is_image_BT, attention_mask, None, len(pixels))
    visual_MKC, stats = model.encode_images(pixels, given, text_MC)
    position_ids = model.positions_of_prompts(is_image_BT, attention_mask, stats)
    embeds_BTC = scatter_visual(embeds_BTC, is_image_BT, visual_MKC)
    logits: Tensor = model(
        inputs_embeds=embeds_BTC,
        attention_mask=attention_mask,
        position_ids=position_ids,
        image_mask=is_image_BT,
        use_cache=False,
    ).logits
    return logits
