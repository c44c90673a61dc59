"""Stage 3 from its definition: no cache, no gather, no padding, one prompt at a time. And tiny decoders to try it on.

Legend: B samples, T prompt tokens, S generated tokens, C width, H heads.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

from meteor_model.configuration_meteor import DecodePruning

VOCABULARY, WIDTH, HEADS, LAYERS, LISTENING, WINDOW = 40, 32, 4, 4, 2, 6

#: Every decoder family, and those that can slide a second time with windows shorter than the prompts: name ->
#: (model type, what its configuration adds, whether SDPA can run it).
DECODERS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("llama", {}, True),
    "mistral": ("mistral", {"sliding_window": None}, True),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}, True),
    "qwen2": ("qwen2", {"use_sliding_window": False}, True),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, True),
    "qwen3": ("qwen3", {"use_sliding_window": False}, True),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3}, True),
    "gemma": ("gemma", {}, True),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        False,
    ),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
        True,
    ),
}


def build_config(name: str = "llama", **changes: Any) -> Any:
    family, own, sdpa = DECODERS[name]
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // HEADS,
        "initializer_range": 0.25,  # wide, so that attention is far from uniform
        "attn_implementation": "sdpa" if sdpa else "eager",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(family, **(values | own | changes))


def build_model(name: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(5)
    model = AutoModel.from_config(build_config(name, **changes)).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:  # as initialised they are 1 everywhere: a norm left out would not be noticed
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.3)
    return model


def settings_for(lam: float | None = 4.0, layer: int = 2, query: Any = "last", k_min: int = 1) -> DecodePruning:
    return DecodePruning(layer=layer, query=query, lam=lam, k_min=k_min)


def windows_of(config: Any) -> list[int | None]:
    """How far back each layer looks, read from the configuration by hand."""
    if config.model_type == "mistral":
        return [config.sliding_window] * config.num_hidden_layers
    if config.model_type in ("llama", "gemma"):
        return [None] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types]


def library_attention(model: Any, embeds_1TC: Tensor) -> tuple[Tensor, ...]:
    """(1, H, T, T) attention of every layer as the library itself computes it."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    weights: tuple[Tensor, ...] = eager(inputs_embeds=embeds_1TC, output_attentions=True, use_cache=False).attentions
    return weights


@dataclass
class LiteralDecision:
    """Kept prompt columns, how many of them are visual, the mass over the chosen heads, the heads, VAV by head."""

    kept: set[int]
    count: int
    mass: float
    heads: list[int]
    mass_H: list[float]


def decide_literally(
    model: Any,
    embeds_1TC: Tensor,
    visual_T: Tensor,
    settings: DecodePruning,
    num_heads: int = LISTENING,
    answer: int = 0,
) -> LiteralDecision:
    """What stage 3 decides on one unpadded prompt, whose last `answer` tokens are an answer's that asks."""
    attention_HTT = library_attention(model, embeds_1TC)[settings.layer - 1][0]
    heads = range(attention_HTT.shape[0])
    visual = [int(i) for i in visual_T.nonzero().flatten()]
    length = embeds_1TC.shape[1]
    if answer:
        rows = list(range(length - answer, length))
    elif settings.query in ("last", "answer"):
        rows = [length - 1]
    else:
        rows = [i for i in range(length) if i not in visual and any(j < i for j in visual)] or [length - 1]
    row_HT = [[sum(attention_HTT[h, q, t].item() for q in rows) / len(rows) for t in range(length)] for h in heads]
    mass_H = [sum(row_HT[h][t] for t in visual) for h in heads]
    listening = sorted(heads, key=lambda h: (-mass_H[h], h))[:num_heads]
    score = {t: sum(row_HT[h][t] for h in listening) for t in visual}
    mass = sum(score.values())
    wanted = (
        settings.target_mean if settings.budget == "fixed" else None if settings.lam is None else settings.lam * mass
    )
    assert wanted is not None
    count = min(max(math.floor(wanted + 0.5), min(settings.k_min, len(visual))), len(visual))
    chosen = sorted(visual, key=lambda t: (-score[t], t))[:count]
    kept = {i for i in range(length) if i not in visual} | set(chosen)
    return LiteralDecision(kept, count, mass, sorted(listening), mass_H)


def last_hidden_literally(
    model: Any, embeds_1TC: Tensor, kept: set[int], prompt_length: int, layer: int, renumber: bool = False
) -> Tensor:
    """(C,) hidden state of the last token: no cache, no gather; upper layers just may not look at dropped tokens.

    With `renumber` they number the tokens that are left anew.
    """
    config, length = model.config, embeds_1TC.shape[1]
    dropped = [i for i in range(prompt_length) if i not in kept]
    place_T = torch.arange(length)
    hidden = embeds_1TC
    for index, (block, window) in enumerate(zip(model.layers, windows_of(config), strict=True)):
        seen_TT = torch.ones(length, length, dtype=torch.bool).tril()
        if window is not None:
            seen_TT &= place_T[:, None] - place_T < window
        if index >= layer:
            seen_TT[:, dropped] = False
            seen_TT[dropped, dropped] = True  # a dropped row's own result is never read; let it be finite
        mask: Tensor = seen_TT[None, None]
        if config._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        kind = (config.layer_types[index],) if config.model_type == "gemma3_text" else ()
        position_T = place_T
        if renumber and index >= layer:
            position_T = torch.tensor([sum(1 for i in range(t) if i not in dropped) for t in range(length)])
        rotary = model.rotary_emb(embeds_1TC, position_T[None], *kind)
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
    last: Tensor = model.norm(hidden)[0, -1]
    return last


def pick_token(model: Any, hidden_BC: Tensor) -> Tensor:
    """Greedy next token through tied embeddings."""
    return (hidden_BC @ model.embed_tokens.weight.T).argmax(-1)


def generate_literally(
    model: Any, single: tuple[Tensor, Tensor], settings: DecodePruning, steps: int
) -> tuple[list[int], Tensor, int]:
    """Tokens, (S, C) hidden states and visual count of one prompt, recomputed from scratch at every step."""
    embeds_1TC, visual_T = single
    prompt_length = embeds_1TC.shape[1]
    decided = decide_literally(model, embeds_1TC, visual_T, settings)
    tokens, hidden_SC = [], []
    for _ in range(steps):
        hidden_SC.append(last_hidden_literally(model, embeds_1TC, decided.kept, prompt_length, settings.layer))
        tokens.append(int(pick_token(model, hidden_SC[-1])))
        embeds_1TC = torch.cat([embeds_1TC, model.embed_tokens(torch.tensor([tokens[-1:]]))], dim=1)
    return tokens, torch.stack(hidden_SC), decided.count
