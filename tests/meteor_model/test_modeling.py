"""The whole model: keep-everything equals dense, counts are checked, loss is token-weighted, generation is right."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from meteor_model.collate import collate
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, PruningConfig
from meteor_model.inputs import scatter_visual
from meteor_model.logits import token_loss
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from tests.meteor_model.builders import DENSE, PRUNED, config, decided, model, pixels, processor


def batch(pruning: PruningConfig = PRUNED, images: tuple[int, ...] = (1, 0, 2)) -> dict[str, torch.Tensor]:
    """One image, text only, and two images in one batch."""
    proc = processor(pruning)
    pool, rows = pixels(sum(images)), []
    for index, count in enumerate(images):
        turns = [("user", "<image>" * count + "What colour?" * (index + 1)), ("assistant", "red")]
        encoded = proc.encode(turns, count)
        start = sum(images[:index])
        rows.append({"input_ids": encoded.input_ids, "labels": encoded.labels, "images": pool[start : start + count]})
    return collate(rows, pad_token_id=0, image_size=64)


def same_weights(pruning: PruningConfig) -> MeteorForConditionalGeneration:
    """The dense model's weights under another pruning configuration."""
    other = MeteorForConditionalGeneration(config(pruning)).eval()
    other.load_state_dict(model(DENSE).state_dict())
    return other


@torch.no_grad()
def test_keep_everything_is_the_dense_model_stage_by_stage() -> None:
    inputs = batch(DENSE)
    expected = model(DENSE)(**inputs).logits
    for stages in (
        PruningConfig(EncodePruning(totals=(128, 128, 192)), FusePruning(keep=192), DecodePruning(enabled=False)),
        PruningConfig(EncodePruning(enabled=False), FusePruning(keep=192), DecodePruning(enabled=False)),
        PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(lam=1e6)),
    ):
        assert torch.equal(same_weights(stages)(**inputs).logits, expected)
    with pytest.raises(ValueError, match=r"must not grow from boundary to boundary.* the last one may"):
        EncodePruning(totals=(96, 128, 192))


@torch.no_grad()
def test_stage_one_with_full_budgets_is_dense() -> None:
    """All tokens at every boundary: 128 for the two transformers, 192 once the convolutional tower joins."""
    dense = model(DENSE)
    images = pixels(2)
    features, _ = dense.encode_images(images)
    two = [item for item in config(DENSE).encoders if item.family != "convnext"]
    from meteor_model.configuration_meteor import MeteorConfig

    data = config(DENSE).to_dict()
    kept = PruningConfig(EncodePruning(totals=(128, 128, 128)), FusePruning(keep=128), DecodePruning(enabled=False))
    data.update(encoders=[item.to_dict() for item in two], pruning=kept)
    full = MeteorForConditionalGeneration(MeteorConfig(**data)).eval()
    full.load_state_dict({k: v for k, v in dense.state_dict().items() if "convnext" not in k})
    assert torch.equal(full.encode_images(images)[0], features[:, :128])


@torch.no_grad()
def test_visual_tokens_land_on_their_placeholders_in_order() -> None:
    built = model(PRUNED)
    inputs = batch(PRUNED)
    features, stats = built.encode_images(inputs["pixel_values"])
    embeds = built.get_input_embeddings()(inputs["input_ids"])
    is_image = inputs["input_ids"] == 3
    merged = scatter_visual(embeds, is_image, features)
    assert torch.equal(merged[0][is_image[0]], features[0])
    assert torch.equal(merged[2][is_image[2]], features[1:].flatten(0, 1))
    assert torch.equal(merged[~is_image], embeds[~is_image])
    assert stats.fuse.shape == (3, 24)


@torch.no_grad()
def test_fusion_keeps_the_least_redundant_in_encoder_order() -> None:
    """Oracle: the literal double sum of cosines over the other encoders' projected tokens."""
    built = model(PRUNED)
    images = pixels(2)
    unfused = PruningConfig(PRUNED.encode, FusePruning(enabled=False), PRUNED.decode)
    twin = MeteorForConditionalGeneration(config(unfused)).eval()
    twin.load_state_dict(built.state_dict())
    pool, stats = twin.encode_images(images)
    owner = [e for e, kept in enumerate(stats.encode.values()) for _ in range(kept[-1].shape[1])]
    kept_features, kept_stats = built.encode_images(images)
    for sample in range(2):
        redundancy = []
        for i in range(len(owner)):
            others = [j for j in range(len(owner)) if owner[j] != owner[i]]
            redundancy.append(sum(F.cosine_similarity(pool[sample, i], pool[sample, j], dim=0).item() for j in others))
        expected = sorted(sorted(range(len(owner)), key=lambda i: redundancy[i])[:24])
        assert kept_stats.fuse[sample].tolist() == expected
        assert torch.equal(kept_features[sample], pool[sample, expected])


def test_samples_of_a_batch_do_not_influence_each_other() -> None:
    built = model(PRUNED)
    inputs = batch(PRUNED)
    together = built(**inputs).logits
    alone = batch(PRUNED, images=(1,))
    length = int(inputs["attention_mask"][0].sum())
    torch.testing.assert_close(built(**alone).logits[0], together[0, :length], rtol=1e-4, atol=1e-5)


def test_a_batch_without_images_still_runs_every_tower() -> None:
    built = model(PRUNED).train()
    inputs = batch(PRUNED, images=(0, 0))
    assert inputs["pixel_values"].shape[0] == 0
    output = built(**inputs)
    output.loss.backward()
    for name in ("clip", "pix2struct", "convnext"):
        gradients = [p.grad for p in built.encoders[name].parameters() if p.grad is not None]
        assert gradients
        assert all(torch.count_nonzero(g) == 0 for g in gradients)
    assert output.image_hidden_states.shape == (0, 24, 128), "no image, hence no visual token"
    without = built.eval()(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"])
    assert torch.equal(without.loss, built(**inputs).loss)


def test_placeholder_counts_name_the_sample_and_both_counts() -> None:
    built = model(PRUNED)
    inputs = batch(PRUNED)
    broken = inputs["input_ids"].clone()
    broken[2, (broken[2] == 3).nonzero()[0]] = 5
    with pytest.raises(ValueError, match="sample 2 of the batch has 47 image placeholders, not a multiple of the 24"):
        built(broken, inputs["attention_mask"], inputs["pixel_values"])
    with pytest.raises(ValueError, match=r"72 image placeholders \(\[24, 0, 48\] by sample\), its 2 images give 48"):
        built(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"][:2])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        built()
    with pytest.raises(ValueError, match="labels go with an unpruned decoder"):
        built(**inputs, past_key_values=built.new_cache())
    with pytest.raises(ValueError, match="prefill_chunk_size is not supported"):
        built.generate(inputs["input_ids"], inputs["pixel_values"], prefill_chunk_size=8)


def longer(mask: torch.Tensor) -> torch.Tensor:
    return F.pad(mask, (0, 1), value=1)


#: what is changed in a batch of one image, none and two -> what the error says
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no pixels, labels": ({"pixel_values": None}, r"72 image placeholders \(\[24, 0, 48\] by sample\), its 0 images"),
    "no pixels": ({"pixel_values": None, "labels": None}, r"\(\[24, 0, 48\] by sample\) and no pixel_values"),
    "numpy": ({"pixel_values": np.zeros((3, 3, 64, 64), np.uint8)}, "a uint8 torch tensor .* got ndarray"),
    "mask too long": ({"attention_mask": longer}, r"the attention mask is \(3, \d+\), .* 3 samples need"),
    "mask of two": ({"attention_mask": lambda mask: mask[:2]}, r"the attention mask is \(2, \d+\), .* 3 samples need"),
    "labels, one logit": ({"logits_to_keep": 1}, "labels need the logits of every token"),
    "labels, some logits": ({"logits_to_keep": torch.tensor([0, 1])}, "labels need the logits of every token"),
    "no token": (
        {"input_ids": lambda ids: ids[:, :0], "attention_mask": None, "pixel_values": None, "labels": None},
        "3 samples of 0 tokens: a prompt needs at least one token",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@torch.no_grad()
def test_inputs_that_do_not_fit_are_refused(case: str) -> None:
    changes, message = REFUSED[case]
    inputs: dict[str, Any] = batch(PRUNED)
    for name, change in changes.items():
        inputs[name] = change(inputs[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        model(PRUNED)(**inputs)


@torch.no_grad()
def test_placeholders_that_a_model_says_itself_are_text() -> None:
    """Without labels: fewer than an image's in a prompt, and any number on a used cache, whose steps are not read."""
    built = model(DENSE)
    ids = torch.tensor([[1, 3, 3, 40]])
    filled = built(ids, use_cache=True).past_key_values
    assert filled.get_seq_length() == 4
    later = built(torch.full((1, built.config.tokens_per_image), 3), past_key_values=filled)
    assert later.logits.shape[1] == built.config.tokens_per_image
    with pytest.raises(ValueError, match="sample 0 of the batch has 2 image placeholders, not a multiple"):
        built(ids, labels=ids)


def test_ranks_of_no_image_are_refused() -> None:
    for call in (lambda: model().measure_ranks(pixels(0), ("effective",)), lambda: model().encode_images(pixels(0))):
        with pytest.raises(ValueError, match="pixel_values hold no image"):
            call()


@pytest.mark.parametrize("shape", [(3, 1, 64, 64), (3, 3, 64, 32), (3, 64, 64, 3), (3, 3, 64)])
def test_pixels_that_would_be_broadcast_or_squashed_are_refused(shape: tuple[int, ...]) -> None:
    inputs = {**batch(PRUNED), "pixel_values": torch.zeros(shape, dtype=torch.uint8)}
    with pytest.raises(ValueError, match=rf"squares \(M, 3, S, S\), got {re.escape(str(shape))}"):
        model(PRUNED)(**inputs)


def test_loss_is_the_sum_over_supervised_tokens_by_the_divisor() -> None:
    built = model(PRUNED)
    inputs = batch(PRUNED)
    logits, labels = built(**inputs).logits, inputs["labels"]
    literal, count = torch.zeros(()), 0
    for sample in range(3):
        for position in range(labels.shape[1] - 1):
            target = int(labels[sample, position + 1])
            if target != -100:
                literal = literal - torch.log_softmax(logits[sample, position], dim=-1)[target]
                count += 1
    torch.testing.assert_close(built(**inputs).loss, literal / count)
    torch.testing.assert_close(built(**inputs, num_items_in_batch=7.0).loss, literal / 7)
    assert token_loss(logits, torch.full_like(labels, -100)).item() == 0.0


def test_save_and_load_give_the_same_model(tmp_path: Path) -> None:
    built = model(PRUNED)
    built.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = MeteorForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = batch(PRUNED)
    assert torch.equal(loaded(**inputs).logits, built(**inputs).logits)
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), MeteorForConditionalGeneration)


@pytest.mark.parametrize("stage3", [False, True])
def test_generate_equals_uncached_greedy_decoding(stage3: bool) -> None:
    """The reference is the plain forward over the growing sequence.

    With a lambda that keeps every token stage 3 must not change a thing.
    """
    decode = DecodePruning(layer=2, lam=1e6) if stage3 else DecodePruning(enabled=False)
    built = MeteorForConditionalGeneration(config(replace(PRUNED, decode=decode))).eval()
    built.load_state_dict(model(PRUNED).state_dict())
    proc = processor(PRUNED)
    prompts = ["What colour?", "Where is the drawing, please?", "Name it."]
    images = [[pixels(1)[0]], [], [pixels(2)[0], pixels(2)[1]]]
    inputs = proc(prompts, images)
    generated = built.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(6):
        logits = built(ids, mask, inputs["pixel_values"], logits_to_keep=1).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        mask = F.pad(mask, (0, 1), value=1)
    assert torch.equal(generated, ids)


def test_generate_prunes_and_reports_per_sample_counts() -> None:
    built = model(PRUNED)
    proc = processor(PRUNED)
    inputs = proc(["What colour?", "a longer question about it?", "text"], [[pixels(1)[0]], [pixels(2)[1]], []])
    cache = built.new_cache()
    generated = built.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert generated.shape[0] == 3
    kept = decided(cache).kept_counts_B.tolist()
    assert kept[2] == 0
    assert all(1 <= k <= 24 for k in kept[:2])
    beams = built.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    assert beams.shape[0] == 3
