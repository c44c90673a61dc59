"""The loss in chunks against the plain form: same loss and gradients, with the logits of a chunk alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from meteor_model.language_head import LanguageHead
from meteor_model.logits import logits_of_kept, supervised_rows
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.packing import collate_packed
from tests.meteor_model.builders import DENSE, PRUNED, config, decided, model
from tests.meteor_model.decoder.oracle import DECODERS
from tests.meteor_model.test_generation import build, make_batch
from tests.meteor_model.test_modeling import batch
from tests.meteor_model.test_packing import samples
from tests.meteor_model.test_training_pruned import batch_with_replies, training

WIDTH, VOCABULARY, TOKENS = 16, 50, 23


def cap(logits_nV: Tensor) -> Tensor:
    return 3 * torch.tanh(logits_nV / 3)


def learned(built: nn.Module, inputs: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradient of every parameter that has one."""
    built.zero_grad()
    loss = built(**inputs, **options).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}


def assert_same(built: nn.Module, inputs: dict[str, Any], chunk: int, tolerance: float = 1e-5, **options: Any) -> None:
    """Loss to `tolerance`, gradients to that of their largest value."""
    expected_loss, expected = learned(built, inputs, **options)
    loss, gradients = learned(built, inputs, loss_chunk=chunk, **options)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        assert float((gradient - expected[name]).abs().max()) <= tolerance * scale + 1e-8, name


# ------------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("finish", [None, cap])
@pytest.mark.parametrize("trained", ["both", "head", "hidden"])
@pytest.mark.parametrize("chunk", [1, 7, TOKENS, 10 * TOKENS, None])
def test_the_head_alone(chunk: int | None, trained: str, finish: Callable[[Tensor], Tensor] | None) -> None:
    torch.manual_seed(0)
    head, hidden_nC = LanguageHead(WIDTH, VOCABULARY, bias=False), torch.randn(TOKENS, WIDTH)
    head.requires_grad_(trained != "hidden")
    hidden_nC.requires_grad_(trained != "head")
    labels_n = torch.randint(0, VOCABULARY, (TOKENS,))
    ends = [one for one in (hidden_nC, head.weight) if one.requires_grad]
    logits_nV = head(hidden_nC)
    expected = F.cross_entropy(logits_nV if finish is None else finish(logits_nV), labels_n, reduction="sum")
    options = {} if finish is None else {"finish": finish}
    found = head(hidden_nC, labels_n, chunk, **options)
    torch.testing.assert_close(found, expected)
    for gradient, other in zip(
        torch.autograd.grad(found / 7, ends), torch.autograd.grad(expected / 7, ends), strict=True
    ):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden_nC, labels_n, chunk, **options), expected)


def test_weight_gradients_of_bf16_are_summed_in_fp32() -> None:
    """As near to the fp32 gradient as that of one product of matrices, however many chunks there are."""
    torch.manual_seed(0)
    head = LanguageHead(WIDTH, VOCABULARY, bias=False).bfloat16()
    hidden_nC, labels_n = torch.randn(512, WIDTH, dtype=torch.bfloat16), torch.randint(0, VOCABULARY, (512,))
    wide = head.weight.detach().float().requires_grad_()
    exact = F.cross_entropy(F.linear(hidden_nC.float(), wide), labels_n, reduction="sum")
    (expected,) = torch.autograd.grad(exact, wide)
    errors = []
    for chunk in (512, 4):
        (found,) = torch.autograd.grad(head(hidden_nC, labels_n, chunk), head.weight)
        assert found.dtype == torch.bfloat16
        errors.append(float((found.float() - expected).norm() / expected.norm()))
    assert errors[1] < 1.5 * errors[0] < 0.02


def test_no_tokens_give_zero_and_gradients_of_zero() -> None:
    """A rank without a supervised token takes part in everything."""
    head = LanguageHead(WIDTH, VOCABULARY, bias=False)
    hidden_nC = torch.empty(0, WIDTH, requires_grad=True)
    loss = head(hidden_nC, torch.empty(0, dtype=torch.long), 8)
    loss.backward()
    assert loss.item() == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


class Scored(TorchDispatchMode):
    """The tokens of each log-softmax, which cross entropy alone takes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._log_softmax.default:
            self.tokens.append(len(out))
        return out


@pytest.mark.parametrize("chunk", [1, 3])
def test_logits_exist_for_a_chunk_alone(chunk: int) -> None:
    built = model(PRUNED).train()
    inputs = batch(PRUNED)
    supervised = int((inputs["labels"][:, 1:] != -100).sum())
    with Scored() as seen:
        built(**inputs, loss_chunk=chunk).loss.backward()
    assert max(seen.tokens) == chunk < sum(seen.tokens) == supervised
    with Scored() as plain:
        built(**inputs).loss.backward()
    assert plain.tokens == [inputs["labels"][:, 1:].numel()]


# ------------------------------------------------------------------------------------------------------------ the model


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("divisor", [None, 7.0])
def test_the_model_learns_the_same_of_padded_rows(divisor: float | None, chunk: int) -> None:
    built = model(PRUNED).train()
    assert_same(built, batch(PRUNED), chunk, num_items_in_batch=divisor)
    output = built(**batch(PRUNED), loss_chunk=chunk, return_dict=False)
    assert built(**batch(PRUNED), loss_chunk=chunk).logits is None
    assert output[0].ndim == 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_of_packed_rows_tied_heads_and_recomputed_blocks(checkpointing: bool, tied: bool) -> None:
    text = {**config(PRUNED).to_dict()["text_config"], "tie_word_embeddings": tied}
    torch.manual_seed(0)
    built = MeteorForConditionalGeneration(config(PRUNED, text_config=text, tie_word_embeddings=tied)).train()
    assert (built.lm_head.weight is built.get_input_embeddings().weight) == tied
    if checkpointing:
        built.gradient_checkpointing_enable({"use_reentrant": False})
    each = samples()
    assert_same(built, collate_packed([each[:2], each[2:]], 0, 64), 3)


def test_of_bf16_it_is_as_near_to_fp32_as_the_plain_form() -> None:
    inputs = batch(DENSE)
    _, exact = learned(model(DENSE).train(), inputs)
    errors = []
    for chunk in (None, 3):
        _, found = learned(model(DENSE).bfloat16().train(), inputs, loss_chunk=chunk)
        errors.append(sum(float((found[name].float() - exact[name]).square().sum()) for name in exact))
    assert errors[1] < 1.1 * errors[0]


def test_under_autocast() -> None:
    built = model(PRUNED).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = built(**batch(PRUNED)).loss, built(**batch(PRUNED), loss_chunk=3).loss
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    found.backward()
    assert built.lm_head.weight.grad is not None
    assert built.lm_head.weight.grad.dtype == torch.float32


def test_of_adapters_beside_a_frozen_head() -> None:
    adapted: Any = get_peft_model(model(PRUNED), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert_same(adapted.train(), batch(PRUNED), 3)
    assert adapted.base_model.model.lm_head.weight.grad is None


@pytest.mark.parametrize("name", sorted({name.split("-")[0] for name in DECODERS}))
def test_of_every_decoder_family(name: str) -> None:
    """Gemma's logits are capped."""
    built = copy.deepcopy(build(name)).train()
    inputs = dict(make_batch(("tIttt", "ttt")).inputs)
    ids = inputs["input_ids"]
    labels = ids.masked_fill((inputs["attention_mask"] == 0) | (ids == built.config.image_token_id), -100)
    assert_same(built, {**inputs, "labels": labels}, 2, tolerance=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_where_stage_3_has_dropped_tokens(side: str) -> None:
    built = training(query="last")
    asked, ids, mask, labels, _ = batch_with_replies(side)
    images = asked.inputs["pixel_values"]
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images, "labels": labels}
    assert_same(built, inputs, 2, tolerance=1e-4)


@torch.no_grad()
def test_rows_of_columns_that_are_gone_are_those_of_their_logits() -> None:
    built, inputs = model(PRUNED), batch(PRUNED)
    ids = inputs.pop("input_ids")
    inputs.pop("labels")
    built(ids, **inputs, past_key_values=(cache := built.new_cache()))
    decision = decided(cache)
    hidden_BWC = torch.randn(*decision.kept_index_BW.shape, WIDTH)
    head = LanguageHead(WIDTH, VOCABULARY, bias=False)
    hidden_nC, labels_n = supervised_rows(hidden_BWC, ids, decision)
    expected_nV = logits_of_kept(hidden_BWC, decision, 0, head)[:, :-1].flatten(0, 1)
    assert torch.equal(labels_n, ids[:, 1:].flatten())
    torch.testing.assert_close(head(hidden_nC), expected_nV, equal_nan=True)
    assert expected_nV.isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_chunk": 0}, "loss_chunk is 0; it must be a number of tokens above 0"),
        ({"loss_chunk": 2.5}, "loss_chunk is 2.5"),
        ({"loss_chunk": 8, "labels": None}, "loss_chunk=8 is of a loss, which needs labels"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(PRUNED)(**{**batch(PRUNED), **options})


def test_another_head_is_refused_by_name() -> None:
    built: Any = get_peft_model(model(PRUNED), LoraConfig(r=2, target_modules=["lm_head"]))
    call = partial(built, **batch(PRUNED))
    with pytest.raises(ValueError, match="needs the head that the model was built with"):
        call(loss_chunk=8)
    assert call().loss.isfinite()
