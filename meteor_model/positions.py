"""Positions of a prompt's tokens in the language model, also where an image's tokens keep those of the dense model.

With `pruning.fuse.positions = "original"` an image takes as many positions as it would have tokens if stages 1 and 2
dropped none: a kept token stands where it would stand then, and the text behind the image goes on after all of them.
Source of the question: GAP (arXiv 2506.21873), where pruned tokens at wrong positions lose most of their grounding.

Legend: B samples, T columns, L all columns, M images of all samples in order, K visual tokens of an image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from meteor_model.pruners.select import gather_tokens

if TYPE_CHECKING:
    from meteor_model.configuration_meteor import MeteorConfig
    from meteor_model.outputs import PruningStats


def position_ids_of(attention_mask_BL: Tensor) -> Tensor:
    """Positions (B, L) counted over what is attended; 0 in left padding."""
    return (attention_mask_BL.long().cumsum(-1) - 1).clamp_min(0)


def original_places(config: MeteorConfig, stats: PruningStats) -> Tensor:
    """Place (M, K) of each kept token among all tokens that its image would have, in encoder order, then raster."""
    if config.fusion == "channel_concat":
        return stats.fuse
    places, first = [], 0
    for name, kept in stats.encode.items():
        places.append(kept[-1].to(stats.fuse.device) + first)
        first += stats.encoder_tokens[name]
    return gather_tokens(torch.cat(places, dim=1), stats.fuse)


def prompt_positions(is_image_BT: Tensor, attended_BT: Tensor | None, places_MK: Tensor, span: int) -> Tensor:
    """Positions (B, T) int64 of a prompt whose images take `span` positions each; 0 in padding.

    Args:
        is_image_BT: bool, where visual tokens are: whole images.
        attended_BT: bool or 0 and 1; None where nothing is padded.
        places_MK: int64, the place of each kept token in its image.
        span: positions of an image.
    """
    per_image, image_BT = places_MK.shape[1], is_image_BT.bool()
    seen_BT = torch.ones_like(image_BT) if attended_BT is None else attended_BT.to(image_BT.device).bool()
    image_BT = image_BT & seen_BT
    text_BT = seen_BT & ~image_BT
    rank_BT = image_BT.long().cumsum(dim=1) - image_BT.long()
    first_B = image_BT.sum(dim=1).cumsum(dim=0) - image_BT.sum(dim=1)
    flat_BT = (first_B[:, None] + rank_BT).clamp(max=places_MK.numel() - 1)
    place_BT = places_MK.to(image_BT.device).flatten()[flat_BT]
    before_BT = text_BT.long().cumsum(dim=1) - text_BT.long() + rank_BT // per_image * span
    return torch.where(image_BT, before_BT + place_BT, before_BT) * seen_BT


def skipped_positions(position_ids_BT: Tensor, attention_mask_BT: Tensor | None) -> Tensor:
    """Positions (B,) that a prompt has passed over: of its last token, beyond its number of tokens."""
    if attention_mask_BT is None:
        return position_ids_BT.amax(dim=1) - (position_ids_BT.shape[1] - 1)
    return position_ids_BT.amax(dim=1) - (attention_mask_BT.long().sum(dim=1) - 1).to(position_ids_BT.device)
