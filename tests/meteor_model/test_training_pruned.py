"""Stage 3 in training: each sample as its first question would prune it, against one sample and token at a time.

Legend: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from tests.meteor_model.decoder.oracle import decide_literally, last_hidden_literally
from tests.meteor_model.test_generation import IMAGE_TOKEN, PER_IMAGE, Batch, build, make_batch

#: Two turns with a reply each, text alone, two images, a prompt that ends in its image.
LAYOUTS = ("tIttRRtRR", "tttRR", "tItttItRR", "ttIRRR")
KEEP = 3.0


def training(**decode: Any) -> MeteorForConditionalGeneration:
    built = copy.deepcopy(build())
    settings = DecodePruning(num_heads=2, budget="fixed", target_mean=KEEP, train=True, **decode)
    built.config = built.config.with_pruning(replace(built.config.pruning, decode=settings))
    return built.train()


def batch_with_replies(side: str) -> tuple[Batch, Tensor, Tensor, Tensor, list[list[bool]]]:
    """The samples, and together: ids, mask and labels (B, T), padded on one side; and which tokens are replies."""
    batch = make_batch(tuple(layout.replace("R", "t") for layout in LAYOUTS))
    replies = [[kind == "R" for kind in layout for _ in range(PER_IMAGE if kind == "I" else 1)] for layout in LAYOUTS]
    longest = max(map(len, replies))
    rows, masks, labels = [], [], []
    for ids, learned in zip(batch.ids, replies, strict=True):
        gap = longest - len(learned)
        pad = (gap, 0) if side == "left" else (0, gap)
        rows.append(F.pad(ids, pad))
        masks.append(F.pad(torch.ones_like(ids), pad))
        labels.append(F.pad(ids.masked_fill(~torch.tensor([learned]), -100), pad, value=-100))
    return batch, torch.cat(rows), torch.cat(masks), torch.cat(labels), replies


def loss_literally(built: MeteorForConditionalGeneration, batch: Batch, replies: list[list[bool]]) -> Tensor:
    settings, total, count = built.config.pruning.decode, torch.zeros(()), 0
    for ids, images, learned in zip(batch.ids, batch.images, replies, strict=True):
        embeds, is_image = built.embed_prompts(ids, images if len(images) else None)
        end = learned.index(True)
        images_before = int(is_image[0, :end].sum()) // PER_IMAGE
        own = replace(settings, target_mean=KEEP * max(images_before, 1))
        kept = decide_literally(built.language_model, embeds[:, :end], is_image[0, :end], own).kept
        if bool(is_image[0, end - 1]):  # the reply is read off it
            lost = next(i for i in sorted(kept, key=lambda i: rank_of(built, embeds, is_image, own, end, i)))
            kept = kept if end - 1 in kept else (kept - {lost}) | {end - 1}
        for t, learns in enumerate(learned):
            if learns:
                hidden = last_hidden_literally(built.language_model, embeds[:, :t], kept, end, settings.layer)
                logits = built.lm_head(hidden)
                total, count = total + F.cross_entropy(logits[None], ids[0, t : t + 1]), count + 1
    return total / count


def rank_of(
    built: MeteorForConditionalGeneration, embeds: Tensor, is_image: Tensor, own: DecodePruning, end: int, column: int
) -> int:
    """Place of a visual column from the worst on: in how many smaller selections it is kept, text last."""
    if not bool(is_image[0, column]):
        return 10**6
    smaller = range(1, int(own.target_mean or 0) + 1)
    return sum(
        column in decide_literally(
            built.language_model, embeds[:, :end], is_image[0, :end], replace(own, target_mean=float(keep))
        ).kept
        for keep in smaller
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("query", ["last", "all_text"])
def test_loss_and_gradients_are_those_of_the_definition(query: str, side: str, checkpointing: bool) -> None:
    built = training(query=query)
    batch, ids, mask, labels, replies = batch_with_replies(side)
    expected = loss_literally(built, batch, replies)
    expected.backward()
    gradients = {name: item.grad for name, item in built.language_model.named_parameters()}
    built.zero_grad()
    if checkpointing:
        built.language_model.gradient_checkpointing_enable()
    output = built(ids, mask, batch.inputs["pixel_values"], labels=labels)
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-5)
    output.loss.backward()
    for name, item in built.language_model.named_parameters():
        if gradients[name] is not None and item.grad is not None:
            torch.testing.assert_close(item.grad, gradients[name], rtol=1e-3, atol=1e-4)
    assert all(bool(torch.isfinite(item.grad).all()) for item in built.parameters() if item.grad is not None)
    assert output.logits.shape == (len(LAYOUTS), ids.shape[1], built.config.text_config.vocab_size)
    assert int(torch.isnan(output.logits[..., 0]).sum()) == 4 * PER_IMAGE - 4 * int(KEEP), "4 images"


def test_off_it_is_the_dense_loss_and_what_cannot_train_is_refused() -> None:
    built = training()
    batch, ids, mask, labels, _ = batch_with_replies("right")
    pruned = built(ids, mask, batch.inputs["pixel_values"], labels=labels).loss
    everything = replace(built.config.pruning.decode, target_mean=float(PER_IMAGE))
    built.config = built.config.with_pruning(replace(built.config.pruning, decode=everything))
    kept = built(ids, mask, batch.inputs["pixel_values"], labels=labels).loss
    built.config = built.config.with_pruning(replace(built.config.pruning, decode=replace(everything, train=False)))
    dense = built(ids, mask, batch.inputs["pixel_values"], labels=labels).loss
    torch.testing.assert_close(kept, dense)
    assert not torch.isclose(pruned, dense)
    assert IMAGE_TOKEN in ids
    with pytest.raises(ValueError, match="train chooses once a sample"):
        DecodePruning(train=True, budget="fixed", target_mean=3.0, reselect_every=2)
    unsolved = DecodePruning(num_heads=2, target_mean=3.0, train=True)
    built.config = built.config.with_pruning(replace(built.config.pruning, decode=unsolved))
    with pytest.raises(ValueError, match="train needs to know how many tokens stay"):
        built(ids, mask, batch.inputs["pixel_values"], labels=labels)
