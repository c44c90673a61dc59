"""Rival pruners against literal references on a tiny decoder."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from meteor_model.rivals import FastV, prefill, step

TEXT, VISUAL = 5, 12


def decoder(attention: str = "eager") -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        initializer_range=0.2,
    )
    return LlamaModel._from_config(config, attn_implementation=attention).eval()


def prompt(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (rows, 2 + VISUAL + 3, 32) and which of them are visual."""
    embeds_BTC = torch.randn(rows, TEXT + VISUAL, 32, generator=torch.Generator().manual_seed(1))
    visual_BT = torch.zeros(rows, TEXT + VISUAL, dtype=torch.bool)
    visual_BT[:, 2 : 2 + VISUAL] = True
    return embeds_BTC, visual_BT


def masked_reference(llm: LlamaModel, embeds_BTC: torch.Tensor, visual_BT: torch.Tensor, pruner: FastV) -> torch.Tensor:
    """No token is dropped: above the layer the others are forbidden to look at what FastV would have dropped."""
    rows, length = visual_BT.shape
    rotary = llm.rotary_emb(embeds_BTC, torch.arange(length)[None])
    lowest = torch.finfo(torch.float32).min
    causal_TT = torch.ones(length, length).triu(1).bool()
    mask_B1TT = torch.zeros(rows, 1, length, length).masked_fill(causal_TT, lowest)
    hidden_BTC = embeds_BTC
    for index, layer in enumerate(llm.layers):
        before_BTC = hidden_BTC
        hidden_BTC = layer(hidden_BTC, attention_mask=mask_B1TT, position_embeddings=rotary)
        if index + 1 == pruner.layer:
            normed_BTC = layer.input_layernorm(before_BTC)
            _, map_BHTT = layer.self_attn(normed_BTC, position_embeddings=rotary, attention_mask=mask_B1TT)
            dropped_BT = visual_BT.clone()
            for row in range(rows):
                received = {t: float(map_BHTT[row, :, -1, t].mean()) for t in range(length) if visual_BT[row, t]}
                for kept in sorted(received, key=lambda t: (-received[t], t))[: pruner.keep]:
                    dropped_BT[row, kept] = False
            mask_B1TT = mask_B1TT.masked_fill(dropped_BT[:, None, None, :], lowest)
    return llm.norm(hidden_BTC)[~dropped_BT].view(rows, -1, 32)


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("keep", [1, 5, VISUAL])
def test_fastv_equals_masking_what_it_drops(layer: int, keep: int) -> None:
    llm, (embeds, visual) = decoder(), prompt()
    pruner = FastV(layer, keep)
    ours, state = prefill(llm, embeds, visual, pruner)
    torch.testing.assert_close(ours, masked_reference(llm, embeds, visual, pruner), rtol=1e-5, atol=1e-5)
    lengths = [state.cache.get_seq_length(index) for index in range(4)]
    assert lengths == [TEXT + VISUAL] * layer + [TEXT + keep] * (4 - layer)


@torch.no_grad()
def test_keeping_everything_is_the_librarys_forward_and_steps_follow_it() -> None:
    llm, (embeds, visual) = decoder(), prompt()
    ours, state = prefill(llm, embeds[:, :-1], visual[:, :-1], FastV(2, VISUAL))
    dense = llm(inputs_embeds=embeds, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours, dense[:, :-1], rtol=1e-5, atol=1e-5)
    last, state = step(llm, embeds[:, -1:], state)
    torch.testing.assert_close(last, dense[:, -1:], rtol=1e-5, atol=1e-5)
    assert state.next_position == TEXT + VISUAL


@pytest.mark.parametrize(
    ("attention", "pruner", "message"),
    [
        ("sdpa", FastV(2, 4), "FastV reads attention maps"),
        ("eager", FastV(4, 4), "layer 4 is not between 1 and 3"),
        ("eager", FastV(2, 13), "cannot keep 13 of 12"),
    ],
)
def test_bad_rivals_are_refused(attention: str, pruner: FastV, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefill(decoder(attention), *prompt(), pruner)


def test_unequal_rows_are_refused() -> None:
    embeds, visual = prompt()
    visual[0, 2] = False
    with pytest.raises(ValueError, match=r"same number of visual tokens in every row, got \[11, 12\]"):
        prefill(decoder(), embeds, visual, FastV(2, 4))
    with pytest.raises(ValueError, match="at least 1"):
        FastV(0, 4)
