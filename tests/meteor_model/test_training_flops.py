"""FLOPs of training, counted on shapes, against closed forms and what real forward and backward passes dispatch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import cache

import pytest
import torch

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, PruningConfig
from meteor_model.flops import PassFlops, TrainingFlops, count_flops, count_training, counted, flop_counter, meta_model
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from tests.meteor_model.builders import DENSE, config, model, pixels

PRUNED = PruningConfig(EncodePruning(totals=(96, 64, 60)), FusePruning(keep=24), DecodePruning(False))
PRUNINGS = {"dense": DENSE, "pruned": PRUNED}
PARTS = {"towers": ("encoders.",), "projector": ("projectors.",), "llm": ("language_model.", "lm_head.")}
ALL = frozenset(PARTS)
LEARNS = [ALL, {"projector"}, {"llm"}, {"projector", "llm"}, {"towers"}]


def prepared(net: MeteorForConditionalGeneration, learns: Collection[str], recomputes: bool) -> TrainingFlops | None:
    """Set what learns and what recomputes, as a training does; counted where the model is on the meta device."""
    starts = tuple(start for part in learns for start in PARTS[part])
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name.startswith(starts))
    if recomputes:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    net.train()
    return count_training(net) if net.device.type == "meta" else None


@cache
def count(pruning: str, learns: frozenset[str] = ALL, recomputes: bool = False) -> TrainingFlops:
    found = prepared(meta_model(config(PRUNINGS[pruning])), learns, recomputes)
    assert found is not None, "it is on the meta device"
    return found


@torch.no_grad()
def rotary(length: int) -> int:
    """FLOPs of the rotary table, which some releases make by a (tiny) product, once a batch and not once a row."""
    rope = model(DENSE).language_model.rotary_emb
    return counted(rope, torch.empty(1, length, 128), torch.arange(length)[None])[1]


def batch(net: MeteorForConditionalGeneration, texts: Collection[int]) -> dict[str, torch.Tensor]:
    """A sample of one image with so many text tokens in each row, padded on the right."""
    images = [net.config.image_token_id] * net.config.tokens_per_image
    rows = [torch.tensor([*images, *range(10, 10 + text)]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = ids.masked_fill(ids == net.config.image_token_id, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels(len(rows))}


def supervised(inputs: dict[str, torch.Tensor]) -> int:
    """Tokens that the loss counts."""
    return int((inputs["labels"][:, 1:] != -100).sum())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("learns", LEARNS, ids=lambda parts: "+".join(sorted(parts)))
@pytest.mark.parametrize("pruning", PRUNINGS)
def test_the_count_is_what_a_real_step_dispatches(pruning: str, learns: Collection[str], recomputes: bool) -> None:
    """Two rows, the shorter one padded: the device computes both as long as the longest."""
    net = model(PRUNINGS[pruning])
    prepared(net, learns, recomputes)
    inputs = batch(net, (10, 23))
    rows, length = inputs["input_ids"].shape
    with flop_counter() as forward, torch.no_grad():
        net(**inputs)
    with flop_counter() as step:
        net(**inputs).loss.backward()
    found = count(pruning, frozenset(learns), recomputes).of(2, [length] * rows, supervised(inputs))
    tables = rotary(length) * (1 - rows)
    assert forward.get_total_flops() == found.forward + tables
    assert step.get_total_flops() == found.hardware + tables
    assert (found.recomputed > 0) == recomputes, "gradients reach the LLM's blocks in every case"


@pytest.mark.parametrize("learns", [ALL, {"projector"}], ids=["all", "projector"])
def test_a_loss_in_chunks_runs_the_head_on_supervised_tokens_alone(learns: Collection[str]) -> None:
    net = model(PRUNED)
    prepared(net, learns, recomputes=False)
    inputs = batch(net, (10, 23))
    rows, length = inputs["input_ids"].shape
    with flop_counter() as step:
        net(**inputs, loss_chunk=7).loss.backward()
    whole = count("pruned", frozenset(learns))
    found = replace(whole, whole_head=False).of(2, [length] * rows, supervised(inputs))
    assert step.get_total_flops() == found.hardware + rotary(length) * (1 - rows)
    assert whole.of(2, [length] * rows, 1).model - found.model == whole.head.model * (
        rows * length - supervised(inputs)
    )


def test_all_parts_learning_cost_their_closed_form() -> None:
    """Backward is twice forward, but for the first layers: nobody asks for the gradient of the pixels."""
    first_layers = 2 * 64 * 192 * 64 * 2 + 2 * 256 * (3 * 16) * 32
    report, found = count_flops(config(DENSE), 8), count("dense")
    assert found.towers == PassFlops(report.encoding, 2 * report.encoding - first_layers)
    assert found.projector == PassFlops(report.projection, 2 * report.projection)
    pairs = 4 * 128 * 4  # two products of width 128 in each of 4 layers
    layers, head = 4 * 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320), 2 * 128 * 300
    assert found.head == PassFlops(head, 2 * head)
    assert found.llm_pair == PassFlops(pairs, 2 * pairs)
    assert found.llm_token.forward == pytest.approx(layers, rel=1e-3), "a rotary table may come by a product"
    assert found.llm_token.backward == 2 * layers


def test_frozen_parts_have_the_products_that_gradients_pass_through_alone() -> None:
    everything, projector = count("dense"), count("dense", frozenset({"projector"}))
    assert projector.towers == PassFlops(everything.towers.forward), "nothing that learns lies below"
    per_image = everything.projector.forward
    first_inputs = 3 * 2 * 64 * 64 * 128  # nobody asks for the gradient of a frozen tower's output
    assert projector.projector == PassFlops(per_image, 2 * per_image - first_inputs)
    assert projector.llm_token.backward * 2 == everything.llm_token.backward, "no gradients of weights"
    assert projector.head == PassFlops(everything.head.forward, everything.head.forward)
    assert projector.llm_pair == everything.llm_pair, "attention has no weights of its own"
    llm = count("dense", frozenset({"llm"}))
    assert (llm.towers.backward, llm.projector.backward) == (0, 0)
    assert (llm.llm_token, llm.llm_pair, llm.head) == (everything.llm_token, everything.llm_pair, everything.head)


def test_recomputing_adds_to_hardware_flops_and_not_to_model_flops() -> None:
    kept, again = count("pruned", ALL), count("pruned", ALL, True)
    images, lengths = 3, [40, 50]
    one, other = again.of(images, lengths, 20), kept.of(images, lengths, 20)
    assert one.model == other.model == other.hardware
    parts = again.by_part(images, lengths, 20)
    assert sum(part.hardware for part in parts.values()) == one.hardware
    assert again.head.recomputed == 0
    assert parts["projector"].recomputed == 0, "it is no block"
    for name in ("towers", "llm"):
        assert 0 < parts[name].recomputed < parts[name].forward, "embeddings, last products of a block and the head"


def test_pruned_tokens_cost_nothing_where_they_are_gone() -> None:
    dense, pruned = count("dense"), count("pruned")
    assert pruned.towers.model < dense.towers.model
    assert pruned.projector.backward == dense.projector.backward * 60 // 192, "60 tokens leave the encoders"
    assert (pruned.llm_token, pruned.llm_pair) == (dense.llm_token, dense.llm_pair), "shorter, not cheaper, sequences"


def test_stage_3_in_training_is_refused() -> None:
    decode = DecodePruning(layer=2, target_mean=12.0, budget="fixed", train=True)
    with pytest.raises(ValueError, match=r"pruning\.decode\.train.*depend on its data"):
        count_training(meta_model(config(replace(PRUNED, decode=decode))))
