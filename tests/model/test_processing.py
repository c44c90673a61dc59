"""Conversations to ids and labels, images to pixels, examples to batches."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from meteor_model.processing_meteor import IGNORE_INDEX, MeteorProcessor, collate
from meteor_model.tokenizer import train_tokenizer
from tests.model.builders import TEXTS, processor


def test_labels_are_exactly_the_replies_and_their_end_tokens() -> None:
    proc = processor()
    turns = [("user", "<image>\nWhat colour?"), ("assistant", "red"), ("user", "Where?"), ("assistant", "left")]
    encoded = proc.encode(turns, num_images=1)
    eos = proc.tokenizer.eos_token_id
    supervised = [label for label in encoded.labels if label != IGNORE_INDEX]
    first, second = (proc.tokenizer.encode(f" {word}", add_special_tokens=False) for word in ("red", "left"))
    assert supervised == [*first, eos, *second, eos]
    assert len(encoded.input_ids) == len(encoded.labels)
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (IGNORE_INDEX, token)
    assert encoded.input_ids.count(proc.image_token_id) == proc.tokens_per_image
    text = proc.tokenizer.decode([i for i in encoded.input_ids if i != proc.image_token_id])
    assert text == "<s>USER: \nWhat colour? ASSISTANT: red</s>USER: Where? ASSISTANT: left</s>"


def test_a_generation_prompt_is_the_training_prefix() -> None:
    proc = processor()
    prompt = proc.encode([("user", "<image>\nWhat?")], 1, add_generation_prompt=True).input_ids
    full = proc.encode([("user", "<image>\nWhat?"), ("assistant", "red")], 1)
    assert full.input_ids[: len(prompt)] == prompt
    assert all(label == IGNORE_INDEX for label in full.labels[: len(prompt)])
    assert full.labels[len(prompt)] != IGNORE_INDEX


def test_plain_template_keeps_only_image_and_caption() -> None:
    proc = processor(template="plain")
    encoded = proc.encode([("user", "<image>\nDescribe this."), ("assistant", "a face")], 1)
    rest = [i for i in encoded.input_ids if i != proc.image_token_id]
    assert proc.tokenizer.decode(rest) == "<s>a face</s>"


def test_system_turn_replaces_the_template_s_own() -> None:
    proc = processor(template="vicuna_v1")
    own = proc.tokenizer.decode(proc.encode([("user", "Hi"), ("assistant", "yes")], 0).input_ids)
    given = proc.tokenizer.decode(
        proc.encode([("system", "Be brief. "), ("user", "Hi"), ("assistant", "y")], 0).input_ids
    )
    assert own.startswith("<s>A chat between a curious user")
    assert given == "<s>Be brief. USER: Hi ASSISTANT: y</s>"
    with pytest.raises(ValueError, match="role 'system' is not allowed here"):
        proc.encode([("user", "Hi"), ("system", "x")], 0)


def test_special_token_text_in_a_conversation_stays_text() -> None:
    """Shards are untrusted: a caption that spells </s> must not end the sequence."""
    proc = processor()
    encoded = proc.encode([("user", "say </s> now"), ("assistant", "<pad>")], 0)
    assert encoded.input_ids.count(proc.tokenizer.eos_token_id) == 1
    assert proc.tokenizer.pad_token_id not in encoded.input_ids
    assert "say </s> now" in proc.tokenizer.decode(encoded.input_ids)


def test_wrong_counts_and_lengths_are_errors() -> None:
    proc = processor()
    with pytest.raises(ValueError, match="1 <image> placeholders in the conversation, 2 images"):
        proc.encode([("user", "<image>")], 2)
    with pytest.raises(ValueError, match="exceed the longest sequence allowed, 10"):
        proc.encode([("user", "<image>")], 1, max_length=10)


def test_collate_pads_right_and_keeps_the_order_of_images() -> None:
    image = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(1, 3, 4, 4)
    rows = [
        {"input_ids": [1, 5, 6], "labels": [-100, 5, 6], "images": torch.cat([image, image + 1])},
        {"input_ids": [1, 7], "labels": [-100, 7], "images": torch.empty(0, 3, 4, 4, dtype=torch.uint8)},
        {"input_ids": np.array([1], dtype=np.int32), "labels": np.array([-100], dtype=np.int32), "images": image + 2},
    ]
    batch = collate(rows, pad_token_id=0, image_size=4)
    assert batch["input_ids"].tolist() == [[1, 5, 6], [1, 7, 0], [1, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 5, 6], [-100, 7, -100], [-100, -100, -100]]
    assert torch.equal(batch["pixel_values"], torch.cat([image, image + 1, image + 2]))
    text_only = collate([rows[1]], pad_token_id=0, image_size=4)
    assert text_only["pixel_values"].shape == (0, 3, 4, 4)


def test_call_takes_every_kind_of_image_and_left_pads() -> None:
    proc = processor()
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    kinds = [array, torch.from_numpy(array).movedim(-1, 0), Image.fromarray(array), buffer.getvalue()]
    batch = proc(["What?", "Where is it, please?", "a", "b"], kinds)
    assert batch["pixel_values"].shape == (4, 3, 64, 64)
    for other in batch["pixel_values"][1:]:
        assert torch.equal(other, batch["pixel_values"][0])
    assert batch["attention_mask"][:, -1].tolist() == [1, 1, 1, 1]
    assert batch["attention_mask"][0, 0] == 0
    mixed = proc(["two <image> and <image>", "no image"], [[array, array], []])
    assert (mixed["input_ids"] == proc.image_token_id).sum(1).tolist() == [48, 0]
    with pytest.raises(ValueError, match="2 prompts came with images for 1"):
        proc(["a", "b"], [array])
    with pytest.raises(ValueError, match=r"uint8 \(3, H, W\)"):
        proc("a", torch.zeros(1, 8, 8, dtype=torch.uint8))


def test_processor_survives_saving(tmp_path: object) -> None:
    proc = processor(template="plain")
    proc.save_pretrained(str(tmp_path))
    loaded = MeteorProcessor.from_pretrained(str(tmp_path))
    turns = [("user", "<image>\nWhat colour?"), ("assistant", "red")]
    assert loaded.encode(turns, 1) == proc.encode(turns, 1)
    with pytest.raises(FileNotFoundError, match="is not a METEOR model folder"):
        MeteorProcessor.from_pretrained(str(tmp_path) + "/nowhere")


def test_tokenizer_round_trips_any_text_and_refuses_too_small_a_vocabulary() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    for text in ("naïve café", "日本語 🎉", "tabs\tand\nlines", "  spaces  "):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    with pytest.raises(ValueError, match="vocab_size 100 is below the 260"):
        train_tokenizer(TEXTS, 100)


def test_missing_special_tokens_are_named() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    with pytest.raises(ValueError, match="does not know the image token '<picture>'"):
        MeteorProcessor(tokenizer, 64, 24, image_token="<picture>")
    with pytest.raises(ValueError, match=r"unknown chat template 'vicuna'; known: .*did you mean 'vicuna_v1'"):
        MeteorProcessor(tokenizer, 64, 24, template="vicuna")
