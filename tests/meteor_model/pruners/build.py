"""A small model for every pruner, its batches, and one literal run of a decision that was taken.

Two towers of 16 tokens an image (CLIP, and a convolutional one), a Llama of 8 layers.

Legend: B prompts, T prompt tokens, L all tokens, V vocabulary, C width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.decoder.cache import Decision, MeteorCache
from meteor_model.encoders import EncoderConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.pruners.named import with_pruner
from tests.meteor_model.decoder.oracle import build_config
from tests.meteor_model.test_generation import Batch, make_batch_of

PER_IMAGE, IMAGE_TOKEN, NEW, LAYERS = 32, 3, 4, 8
CLIP = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 16}
CONV = {"hidden_sizes": [8, 16, 24], "depths": [1, 1, 1], "num_stages": 3, "patch_size": 4}
FIXED: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "eos_token_id": None,
    "pad_token_id": 0,
    "do_sample": False,
}
LAYOUTS = ("tItt", "ttttt", "tItttIt", "tIttttttItttttttt")


@cache
def dense_model() -> MeteorForConditionalGeneration:
    """Nothing is pruned; weights wide enough that attention is far from uniform."""
    encoders = [
        EncoderConfig("clip", "clip", 64, {**CLIP, "image_size": 64}),
        EncoderConfig("convnext", "convnext", 64, {**CONV, "layer_scale_init_value": 1.0}),
    ]
    config = MeteorConfig(
        encoders,
        text_config=build_config("llama", num_hidden_layers=LAYERS),
        image_size=64,
        image_token_id=IMAGE_TOKEN,
    )
    torch.manual_seed(11)
    return MeteorForConditionalGeneration(config).eval()


def pruned_model(name: str, keep: int, **settings: Any) -> MeteorForConditionalGeneration:
    """The same weights under a pruner."""
    model = copy.copy(dense_model())  # modules are shared; the configuration is not
    model._modules = {**model._modules, "encoders": copy.deepcopy(model.encoders)}
    model.follow(with_pruner(model.config, name, keep, **settings))
    return model


def batch_for(model: MeteorForConditionalGeneration, layouts: tuple[str, ...] = LAYOUTS) -> Batch:
    """Unequal prompts, left-padded: an image, text alone, two images, a conversation."""
    return make_batch_of(layouts, model.config.tokens_per_image)


def cache_of(model: MeteorForConditionalGeneration) -> Any:
    """One that prunes where the pruner acts in the language model, and says what was kept."""
    return model.recording_cache()


def decision_of(kv: Any) -> Decision | None:
    """What was decided in the language model, if anything was."""
    return kv.decision if isinstance(kv, MeteorCache) else None


@contextmanager
def inputs_of_layers(model: MeteorForConditionalGeneration) -> Iterator[dict[int, Tensor]]:
    """What each layer of the language model is given in the first pass inside the block: the prompt, (1, W, C)."""
    seen: dict[int, Tensor] = {}
    handles = []
    for index, layer in enumerate(model.language_model.layers):

        def look(_: Any, given: tuple[Any, ...], index: int = index) -> None:
            seen.setdefault(index, given[0])

        handles.append(layer.register_forward_pre_hook(look))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def logits_literally(
    model: MeteorForConditionalGeneration,
    embeds_1TC: Tensor,
    decision: Decision | None,
    later: list[int],
    merged: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """(V,) logits after a prompt and later tokens: no cache, no gather; above a cut its dropped tokens are not seen.

    `merged` holds by layer what the kept columns of the prompt are when a cut has also merged tokens.
    """
    later_1SC = model.get_input_embeddings()(torch.tensor([later], dtype=torch.long))
    hidden = torch.cat([embeds_1TC, later_1SC], dim=1)
    length, prompt_length = hidden.shape[1], embeds_1TC.shape[1]
    decoder = model.language_model
    rotary = decoder.rotary_emb(hidden, torch.arange(length)[None])
    for index, block in enumerate(decoder.layers):
        seen_TT = torch.ones(length, length, dtype=torch.bool).tril()
        for cut in () if decision is None else decision.cuts:
            kept = set(cut.kept_index_BW[0].tolist())
            if merged is not None and index == cut.layer:
                hidden = hidden.index_copy(1, cut.kept_index_BW[0], merged[index])
            dropped = [column for column in range(prompt_length) if column not in kept]
            if index >= cut.layer:
                seen_TT[:, dropped] = False
            elif decision is not None and decision.everywhere:
                seen_TT[prompt_length:, dropped] = False
        seen_TT.fill_diagonal_(True)  # a dropped row's own result is never read; let it be finite
        hidden = block(hidden, attention_mask=seen_TT[None, None], position_embeddings=rotary)
    logits: Tensor = model.lm_head(decoder.norm(hidden)[0, -1])
    return logits
