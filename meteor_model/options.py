"""Arguments that other models and processors of this kind take: they are refused by name, and never merely ignored."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from meteor_model.checks import nearest

#: What stands here for an argument of LLaVA, Qwen2-VL and other models and processors of transformers.
ELSEWHERE: dict[str, str] = {
    "add_special_tokens": "the template of the conversation says which special tokens there are",
    "audio": "there is no audio",
    "cache_position": "places are counted from the cache",
    "image_grid_thw": "images travel as squares of one size",
    "image_sizes": "images travel as squares of one size",
    "input_features": "there is no audio",
    "is_causal": "the decoder looks back only",
    "mm_encoder_outputs": "give inputs_embeds with the visual tokens in place, and image_mask",
    "mm_token_type_ids": "placeholders are found by their id",
    "output_router_logits": "the decoder has no router",
    "pixel_values_videos": "there are no videos: give frames as images",
    "return_mm_token_type_ids": "placeholders are found by their id",
    "return_token_type_ids": "placeholders are found by their id",
    "shift_labels": "give labels, which are shifted here",
    "text_pair": "write one prompt",
    "token_type_ids": "placeholders are found by their id",
    "truncation": "nothing is cut, for that would cut images: max_length refuses a prompt that is longer",
    "video_grid_thw": "there are no videos: give frames as images",
    "videos": "there are no videos: give frames as images",
    "vision_feature_layer": "each encoder gives its last layer",
    "vision_feature_select_strategy": "an encoder's prefix tokens never go on into the LLM",
}
#: Packed rows: flash attention's own arguments and another model's name for them.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def refuse_options(where: str, given: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """ValueError for an argument that `where` does not have, with what stands for it. None and False ask nothing."""
    for name, value in given.items():
        if name in known or value is None or value is False:
            continue
        if name in PACKED:
            hint = ": packed rows come with document_ids, of which these are made"
        elif name in ELSEWHERE:
            hint = f": {ELSEWHERE[name]}"
        else:
            hint = nearest(name, known)
        raise ValueError(f"{where} does not take {name}={' '.join(repr(value).split())[:40]}{hint}")
