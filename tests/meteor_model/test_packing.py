"""Packed rows against the slow literal oracle: every sample in a row, and a forward, of its own, in fp32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meteor_model.chat import IGNORE_INDEX
from meteor_model.collate import collate
from meteor_model.configuration_meteor import FusePruning
from meteor_model.decoder.packed import Packed
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.packing import collate_packed, first_fit_decreasing, pack_evenly, share_beginning
from meteor_model.pruners.fuse_criteria import FUSE_CRITERIA
from tests.meteor_model.builders import DENSE, PRUNED, model, pixels, processor
from tests.meteor_model.decoder.oracle import DECODERS, WIDTH, WINDOW, build_model

Example = Mapping[str, Any]
QUESTIONS = (("What colour?", "red"), ("Where is it? Name it.", "left"), ("What colour is the face?", "a face"))


def example(images: torch.Tensor, question: str, answer: str) -> Example:
    """A sample whose images come first."""
    turns = [("user", "<image>" * len(images) + question), ("assistant", answer)]
    encoded = processor(PRUNED).encode(turns, len(images))
    return {"input_ids": encoded.input_ids, "labels": encoded.labels, "images": images}


def samples() -> list[Example]:
    """No image, one, and two, with texts of several lengths."""
    pool = pixels(5)
    cuts = ((0, 1), (1, 1), (1, 3), (3, 4), (4, 5))
    return [example(pool[slice(*cut)], *QUESTIONS[index % 3]) for index, cut in enumerate(cuts)]


def summed(built: MeteorForConditionalGeneration, batches: Sequence[dict[str, torch.Tensor]]) -> Any:
    """Sum of the losses of some batches, and the gradient of every parameter."""
    built.zero_grad()
    total = torch.zeros(())
    for inputs in batches:
        loss = built(**inputs, num_items_in_batch=1.0).loss
        loss.backward()
        total = total + loss.detach()
    return total, {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        scale = expected[1][name].abs().max()
        assert (gradient - expected[1][name]).abs().max() <= 1e-5 * scale + 1e-6, name


def alone(examples: Sequence[Example]) -> list[dict[str, torch.Tensor]]:
    return [collate([one], 0, 64) for one in examples]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [((0, 1, 2, 3, 4),), ((4, 0), (2,), (3, 1))])
def test_documents_learn_what_they_learn_alone(rows: tuple[tuple[int, ...], ...], kernel: str) -> None:
    built, each = model(PRUNED).train(), samples()
    built.language_model.config._attn_implementation = kernel
    packed = collate_packed([[each[index] for index in row] for row in rows], 0, 64)
    assert_same(summed(built, [packed]), summed(built, alone(each)))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_questions_of_an_image_learn_what_they_learn_alone(kernel: str) -> None:
    built, (first, second) = model(PRUNED).train(), pixels(2)
    built.language_model.config._attn_implementation = kernel
    asked = [[example(image[None], *pair) for pair in QUESTIONS] for image in (first, second)]
    text = example(pixels(0), *QUESTIONS[0])  # a document without branches
    packed = collate_packed([[share_beginning(asked[0]), text, share_beginning(asked[1][:2])]], 0, 64, length=400)
    assert len(packed["pixel_values"]) == 2
    assert_same(summed(built, [packed]), summed(built, alone([*asked[0], text, *asked[1][:2]])))


def test_recomputation_of_packed_rows_changes_nothing() -> None:
    built, each = model(PRUNED).train(), samples()
    packed = collate_packed([each], 0, 64)
    expected = summed(built, [packed])
    built.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(summed(built, [packed]), expected)


@torch.no_grad()
def test_no_token_sees_another_document_or_branch() -> None:
    """Other ids in one branch change its own logits alone, to the last bit."""
    built, image = model(PRUNED), pixels(1)
    shared = share_beginning([example(image, *pair) for pair in QUESTIONS])
    packed = collate_packed([[samples()[0], shared, samples()[0]]], 0, 64)
    before = built(**packed).logits
    of_second = (packed["document_ids"] == 1) & (packed["branch_ids"] == 2)
    ids = packed["input_ids"].masked_fill(of_second, 77)
    changed = (built(**{**packed, "input_ids": ids}).logits != before).any(dim=-1)
    assert torch.equal(changed, of_second)


# ------------------------------------------------------------------------------------------------- every decoder family


def literal_positions(documents: Sequence[int], branches: Sequence[int]) -> list[int]:
    """How many tokens each one sees, itself left out, by the rule as it is written."""
    ids = list(zip(documents, branches, strict=True))
    return [
        sum(document == own and branch in (0, mine) for document, branch in ids[:index])
        for index, (own, mine) in enumerate(ids)
    ]


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_every_family_keeps_documents_and_branches_apart(name: str, kernel: str) -> None:
    """Documents longer than the sliding window, whose columns in a row are further apart than their positions."""
    if kernel == "sdpa" and not DECODERS[name][2]:
        pytest.skip("the library does not run this family with SDPA")
    built = build_model(name, attn_implementation=kernel)
    prefix, first, second, other = (torch.randn(1, n, WIDTH) for n in (WINDOW, WINDOW, WINDOW + 3, 2 * WINDOW + 1))
    row = torch.cat([prefix, first, second, other], dim=1)
    lengths = torch.tensor([part.shape[1] for part in (prefix, first, second, other)])
    documents, branches = (torch.repeat_interleave(torch.tensor(ids), lengths) for ids in ([0, 0, 0, 1], [0, 1, 2, 0]))
    packed = Packed(documents[None], branches[None])
    assert packed.positions_BT()[0].tolist() == literal_positions(documents.tolist(), branches.tolist())
    found = built(inputs_embeds=row, **packed.decoder_arguments(built.config, row.dtype)).last_hidden_state
    parts = [torch.cat([prefix, first], dim=1), torch.cat([prefix, second], dim=1), other]
    singles = [built(inputs_embeds=part).last_hidden_state for part in parts]
    expected = torch.cat([singles[0], singles[1][:, WINDOW:], singles[2]], dim=1)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def test_flash_attention_gets_the_lengths_of_documents_and_refuses_branches() -> None:
    """What is given to its varlen kernel, which no CPU runs."""
    config = build_model().config
    config._attn_implementation = "flash_attention_2"
    documents = torch.tensor([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]])
    given = Packed(documents, None).decoder_arguments(config, torch.bfloat16)
    assert given["attention_mask"] is None
    assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 12]
    assert given["cu_seq_lens_q"].dtype == torch.int32
    assert given["max_length_q"] == given["max_length_k"] == 6
    assert given["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match=r"'flash_attention_2' of the LLM cannot keep branches of packed rows apart"):
        Packed(documents, torch.zeros_like(documents)).decoder_arguments(config, torch.bfloat16)
    config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' of the LLM cannot keep packed documents apart"):
        Packed(documents, None).decoder_arguments(config, torch.bfloat16)


# ------------------------------------------------------------------------------------------------------- making of rows


def test_a_common_beginning_ends_before_what_is_learned() -> None:
    """Two answers to one question part where the reply begins, a token before which the branches do."""
    image = pixels(1)
    pair = [example(image, "What colour?", answer) for answer in ("red", "left")]
    shared = share_beginning(pair)
    reply = next(place for place, label in enumerate(pair[0]["labels"]) if label != IGNORE_INDEX)
    assert (shared["branch_ids"] == 0).sum() == reply - 1
    built = model(PRUNED).train()
    assert_same(summed(built, [collate_packed([[shared]], 0, 64)]), summed(built, alone(pair)))
    with pytest.raises(ValueError, match="begin with different tokens"):
        share_beginning([{**pair[0], "input_ids": [9, *pair[0]["input_ids"][1:]]}, pair[1]])
    with pytest.raises(ValueError, match=r"have the same images; these have \[0, 1\]"):
        share_beginning([pair[0], {**pair[1], "images": pixels(0)}])
    with pytest.raises(ValueError, match="no samples are given"):
        share_beginning([])


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 300))
def test_every_document_is_in_one_row_that_has_room(lengths: list[int], capacity: int) -> None:
    rows = first_fit_decreasing(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < tokens <= capacity for tokens in filled)
    assert sum(2 * tokens <= capacity for tokens in filled) <= 1, "two half-empty rows would be one"


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(100, 300), st.integers(1, 6))
def test_batches_hold_every_document_and_pad_no_more_than_one_a_row(
    lengths: list[int], capacity: int, groups: int
) -> None:
    batches = pack_evenly(lengths, capacity, groups)
    rows = [row for batch in batches for row in batch]
    assert len(batches) == groups
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [[sum(lengths[index] for index in row) for row in batch] for batch in batches]
    assert all(0 < tokens <= capacity for batch in filled for tokens in batch)
    longest = [tokens for batch in filled for tokens in batch]
    assert longest == sorted(longest, reverse=True)
    each = -(-len(lengths) // groups)
    assert max(map(len, batches)) <= each, "no batch has more rows than with one document a row"
    ordered = sorted(lengths, reverse=True)
    singles = [ordered[cut : cut + each] for cut in range(0, len(lengths), max(1, each))]
    places, before = (sum(len(batch) * max(batch) for batch in some if batch) for some in (filled, singles))
    assert places <= 1.01 * before


def test_rows_of_one_length_leave_no_padding() -> None:
    assert pack_evenly([6, 5, 4, 3, 2, 2], 16, 2) == [[[0], [2, 5]], [[1], [3, 4]]], "the most rows of no padding"
    assert pack_evenly([8] * 16, 23, 1) == [[[index] for index in range(16)]], "equal documents are not packed"
    assert pack_evenly([7, 1, 7, 1], 16, 1) == [[[0, 1], [2, 3]]]
    assert pack_evenly([3], 16, 2) == [[[0]], []]
    assert pack_evenly([], 16, 2) == [[], []]


def test_the_longest_come_first_and_ties_in_their_order() -> None:
    assert first_fit_decreasing([3, 5, 3, 7, 2], 10) == [[0, 3], [1, 2, 4]]
    assert first_fit_decreasing([], 10) == []
    with pytest.raises(ValueError, match="document 1 has 11 tokens, a packed row holds 10"):
        first_fit_decreasing([3, 11], 10)


def test_rows_that_hold_nothing_or_too_much_are_refused() -> None:
    for rows in ([], [[samples()[0]], []]):
        with pytest.raises(ValueError, match="every row at least one document"):
            collate_packed(rows, 0, 64)
    with pytest.raises(ValueError, match=r"a row of \d+ tokens does not fit into 8"):
        collate_packed([samples()], 0, 64, length=8)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_packed_rows_out_of_order_are_refused() -> None:
    built, image = model(PRUNED), pixels(1)
    shared = share_beginning([example(image, *pair) for pair in QUESTIONS])
    packed = collate_packed([[samples()[0], shared]], 0, 64)
    documents, branches = packed["document_ids"], packed["branch_ids"]
    start = int((branches == 1).nonzero()[0, 1])
    learned = packed["labels"].clone()
    learned[0, start] = 5
    cases = (
        ({"document_ids": 1 - documents}, "row 0 of the batch: document_ids do not count up"),
        ({"branch_ids": branches.flip(1)}, "row 0 of the batch: branch_ids do not count up within a document"),
        ({"labels": learned}, "row 0 of the batch: a branch begins with a learned token"),
        ({"document_ids": None}, "branch_ids go with document_ids"),
        ({"document_ids": documents[:, 1:]}, r"document_ids is torch.int64 \(1, \d+\), the tokens are"),
        ({"attention_mask": torch.ones_like(documents)}, r"\['attention_mask'\] cannot go with document_ids"),
        ({"use_cache": True}, r"\['use_cache'\] cannot go with document_ids"),
        ({"past_key_values": built.new_cache(), "labels": None}, "so without stage 3, which decides question by"),
    )
    for change, words in cases:
        with pytest.raises(ValueError, match=words):
            built(**{**packed, **change})


def test_an_image_that_ends_in_the_next_document_is_refused() -> None:
    built, each = model(PRUNED), samples()
    packed = collate_packed([[each[0], each[3]]], 0, 64)
    ids, documents = packed["input_ids"].clone(), packed["document_ids"]
    places = (ids == 3).nonzero()[:, 1]
    ids[0, places[0]] = 50  # one placeholder less in the first document, one more in the second
    ids[0, (documents == 1).nonzero()[-1, 1]] = 3
    count = built.config.tokens_per_image
    with pytest.raises(ValueError, match=f"document 0 of packed row 0 has {count - 1} image placeholders"):
        built(**{**packed, "input_ids": ids})


def test_a_fusion_that_reads_the_question_is_refused() -> None:
    name = next(name for name in FUSE_CRITERIA if FUSE_CRITERIA[name].facts["text"])
    built = model(replace(PRUNED, fuse=FusePruning(keep=24, criterion=name)))
    with pytest.raises(ValueError, match=rf"pruning.fuse.criterion '{name}' reads the text"):
        built(**collate_packed([samples()], 0, 64))


def test_a_dense_model_takes_packed_rows() -> None:
    built = model(DENSE).train()
    pool = pixels(2)
    each = []
    for image, (question, answer) in zip(pool.split(1), QUESTIONS, strict=False):
        encoded = processor(DENSE).encode([("user", "<image>" + question), ("assistant", answer)], 1)
        each.append({"input_ids": encoded.input_ids, "labels": encoded.labels, "images": image})
    assert_same(summed(built, [collate_packed([each], 0, 64)]), summed(built, alone(each)))
