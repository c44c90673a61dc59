"""How an LLM's layers look at the visual tokens of a prompt where nothing is pruned: by layer, and by head.

Shape legend: B samples, T tokens of the whole prompt, Q tokens of one call, H heads, C language model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from meteor_model.compat import CACHE
from meteor_model.configuration_meteor import DecodePruning
from meteor_model.decoder.cache import MeteorCache
from meteor_model.decoder.families import DecoderPlan, Rotary, check_decode_settings, plan_decoder, rotary_embeddings
from meteor_model.decoder.masks import Masks, build_masks, check_kernel
from meteor_model.decoder.prompt import Prompt, Query, places, read_prompt
from meteor_model.decoder.view import KeyTap, LayerView, score_layer, view_layer


def attention_mass(
    language_model: PreTrainedModel,
    inputs_embeds_BTC: Tensor,
    attention_mask_BT: Tensor | None,
    position_ids_BT: Tensor | None,
    visual_mask_BT: Tensor,
    settings: DecodePruning,
    num_heads: int,
    cells_n2: Tensor | None = None,
) -> Tensor:
    """Mass of the criterion's scores on visual tokens, (B,) fp32, nothing pruned: what `solve_lambda` is given.

    Only the first `settings.layer` layers run. Arguments and errors as in `decode_pruned`; `settings.lam` is not used;
    `cells_n2` as in `MeteorCache`.
    """
    check_decode_settings(language_model.config, settings.layer, num_heads)
    prompt = read_prompt(inputs_embeds_BTC, attention_mask_BT, position_ids_BT, visual_mask_BT, settings.query)
    criterion = settings.scorer()
    views = view_layers(language_model, prompt, [settings.layer - 1], num_heads, cells_n2)
    scores = score_layer(next(views), criterion)
    if not scores.mass_B.is_meta:
        refuse_nan(int(torch.isnan(scores.mass_B).sum()), len(scores.mass_B))
    return scores.mass_B


def visual_attention_by_head(
    language_model: PreTrainedModel,
    inputs_embeds_BTC: Tensor,
    attention_mask_BT: Tensor | None,
    position_ids_BT: Tensor | None,
    visual_mask_BT: Tensor,
    query: Query = "last",
    layers: Sequence[int] | None = None,
) -> Tensor:
    """The visual attention value (VAV) of every head: its attention mass on visual tokens, nothing pruned.

    Which heads stage 3 listens to is `meteor_model.pruners.text_scores.select_heads` of layer `settings.layer - 1`.

    Args:
        language_model: a bare decoder, as in `decode_pruned`.
        inputs_embeds_BTC: embeddings of the prompts, visual tokens in place.
        attention_mask_BT: 0 and 1; None where nothing is padded.
        position_ids_BT: None counts from 0.
        visual_mask_BT: which tokens are visual.
        query: which text token asks, as in `DecodePruning`.
        layers: counted from 0; None is all of them. The layers above the last one are not run.

    Returns:
        (B, len(layers), H) fp32, between 0 and 1.

    Raises:
        ValueError: where a layer does not exist; else as in `decode_pruned`.
    """
    depth = language_model.config.num_hidden_layers
    chosen = range(depth) if layers is None else layers
    if not chosen or not all(0 <= index < depth for index in chosen):
        raise ValueError(f"layers {list(chosen)} must be some of 0 to {depth - 1}, the LLM's layers")
    prompt = read_prompt(inputs_embeds_BTC, attention_mask_BT, position_ids_BT, visual_mask_BT, query)
    mass_BH = {view.index: view.listen(1).mass_BH for view in view_layers(language_model, prompt, chosen, num_heads=1)}
    return torch.stack([mass_BH[index] for index in chosen], dim=1)


def run_layers(
    language_model: PreTrainedModel,
    plan: DecoderPlan,
    hidden_BQC: Tensor,
    layers: range,
    *,
    masks: Masks,
    rotary: Rotary,
    position_ids_BQ: Tensor | None,
    cache: MeteorCache | KeyTap | None,
) -> Tensor:
    """Some of the decoder's layers on hidden states (B, Q, C), each with its kind of mask and rotary embedding."""
    for index in layers:
        hidden_BQC = language_model.layers[index](
            hidden_BQC,
            attention_mask=masks.sliding if plan.slides[index] else masks.full,
            position_embeddings=rotary[plan.rotary[index]],
            position_ids=position_ids_BQ,
            **{CACHE: cache},
        )
    return hidden_BQC


def view_layers(
    language_model: PreTrainedModel,
    prompt: Prompt,
    asked: Sequence[int],
    num_heads: int,
    cells_n2: Tensor | None = None,
) -> Iterator[LayerView]:
    """Views of these layers from the lowest on, nothing pruned; layers above the last of them are not run."""
    plan, length = plan_decoder(language_model.config), prompt.embeds_BTC.shape[1]
    check_kernel(language_model.config, plan)
    binds = plan.window is not None and length >= plan.window
    rotary = rotary_embeddings(language_model, plan, prompt.embeds_BTC, prompt.position_ids_BT)
    places_BT = places(prompt.seen_BT, length, prompt.embeds_BTC) if binds else None
    masks = build_masks(
        language_model.config, plan.window, plan.slides, prompt.embeds_BTC, prompt.seen_BT, places_BT, None, layer=0
    )
    hidden_BTC = prompt.embeds_BTC
    for index in range(max(asked) + 1):
        tap, input_BTC = KeyTap(), hidden_BTC
        hidden_BTC = run_layers(
            language_model,
            plan,
            hidden_BTC,
            range(index, index + 1),
            masks=masks,
            rotary=rotary,
            position_ids_BQ=prompt.position_ids_BT,
            cache=tap if index in asked else None,
        )
        if index in asked:
            made = (tap.keys, tap.values)
            yield view_layer(language_model, plan, index, input_BTC, made, rotary, prompt, num_heads, cells_n2)


def refuse_nan(count: int, samples: int) -> None:
    """Raise ValueError where the attention of `count` samples is NaN."""
    if count:
        raise ValueError(
            f"the attention on visual tokens is NaN in {count} of {samples} samples: the embeddings or the LLM's "
            "weights are not finite"
        )
