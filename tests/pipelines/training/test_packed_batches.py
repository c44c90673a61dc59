"""Packed steps train what unpacked ones do: the same samples, counts, losses and weights, with hardly any padding."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from meteor_model.collate import collate
from meteor_model.packing import collate_packed
from pipelines.config.recipe import Recipe
from pipelines.data.schema import Row
from pipelines.training.batches import BatchReader, Counts, MicroBatch, Packing, Share
from tests.meteor_model.builders import PRUNED
from tests.meteor_model.builders import model as model_of_seed
from tests.pipelines.training.rows import make_row

PAD, IMAGE, SIZE = 0, 3, 64
FAULTY = (5,)
SAMPLES, STEP, MICRO = 30, 16, 4
CAPACITY = 120
PACKING = Packing(partial(collate_packed, pad_token_id=PAD, image_size=SIZE), CAPACITY)
COLLATE = partial(collate, pad_token_id=PAD, image_size=SIZE)


def member(row: int) -> Row:
    """A row of the tiny architecture: 0 to 2 images of its visual tokens and a text, every second image large."""
    made, random = make_row(row, 2 * STEP, SAMPLES, FAULTY), np.random.default_rng(row)
    if not made.usable:
        return made
    places = [IMAGE] * PRUNED.fuse.keep * made.num_images
    text = [4 + token for token in made.input_ids[made.num_images :]]
    pixels = random.integers(0, 256, made.num_images * 3 * SIZE**2, dtype=np.uint8).tobytes()
    labels = [-100] * (len(places) + 2) + text[2:]
    return replace(made, input_ids=places + text, labels=labels, images=pixels, image_size=SIZE)


def steps(packing: Packing | None) -> list[list[MicroBatch]]:
    rows = [[member(row) for row in range(first, first + MICRO)] for first in range(0, 2 * STEP, MICRO)]
    reader = BatchReader(COLLATE, PAD, MICRO, Share(0, 1, STEP // MICRO), packing=packing)
    return list(reader.read(iter(rows), 0, 2 * STEP))


def trained(members: Sequence[Sequence[MicroBatch]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of some steps of plain gradient descent, weighted as the loop weights them, and the last weights."""
    model, losses = model_of_seed(PRUNED).train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for batches in members:
        tokens = Counts.of(batches).supervised
        loss = 0.0
        for batch in batches:
            part = model(**batch.inputs, num_items_in_batch=tokens).loss
            part.backward()
            loss += part.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses, {name: weight.detach() for name, weight in model.named_parameters()}


def test_packed_steps_train_what_unpacked_ones_do() -> None:
    plain, packed = steps(None), steps(PACKING)
    for one, other in zip(plain, packed, strict=True):
        before, after = Counts.of(one), Counts.of(other)
        assert replace(before, cells=0) == replace(after, cells=0)
        assert len(one) == len(other), "as many forwards, whatever the rows"
        for ids in ("samples", "dropped"):
            assert sorted(x for batch in one for x in getattr(batch, ids)) == sorted(
                x for batch in other for x in getattr(batch, ids)
            )
        assert max(len(batch.inputs["input_ids"]) for batch in other) <= MICRO
        padding = [1 - counts.tokens / counts.cells for counts in (before, after)]
        assert padding[1] < 0.1 < 0.2 < padding[0]
    (losses, weights), (expected, learned) = trained(packed), trained(plain)
    assert losses == pytest.approx(expected, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, learned[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_packed_batch_gives_its_first_samples_one_a_row() -> None:
    """What an export is compared on takes no more room than the batch that was trained."""
    packed = [batch for batches in steps(PACKING) for batch in batches if len(batch.inputs["input_ids"]) < batch.seen]
    batch = next(batch for batch in packed if batch.num_images[0])
    alone = batch.one_a_row()
    documents, pixels = batch.inputs["document_ids"], batch.inputs["pixel_values"]
    count = len(alone["input_ids"])
    assert 1 <= count <= batch.seen
    assert alone["input_ids"].numel() <= batch.cells
    assert alone["attention_mask"][0].sum() == (documents[0] == 0).sum()
    assert torch.equal(alone["pixel_values"], pixels[: sum(batch.num_images[:count])])
    plain = steps(None)[0][0]
    assert plain.one_a_row() is plain.inputs


def test_a_step_without_samples_runs_empty_batches() -> None:
    reader = BatchReader(COLLATE, PAD, MICRO, Share(0, 1, 2), packing=PACKING)
    batches = reader.batches([member(5), member(SAMPLES)])
    assert [batch.inputs["input_ids"].tolist() for batch in batches] == [[[PAD]], [[PAD]]]
    assert [len(batch.dropped) for batch in batches] == [1, 0]
    assert model_of_seed(PRUNED)(**batches[0].inputs).loss == 0


def test_a_fusion_that_reads_the_question_is_refused_with_the_settings() -> None:
    plain = Recipe()
    packed = replace(plain.training, batching="packed")
    assert replace(plain, training=packed).digest() != plain.digest()
    fuse = replace(plain.pruning.fuse, criterion="cdpruner")
    with pytest.raises(ValueError, match=r"pruning.fuse.criterion 'cdpruner' reads the text"):
        replace(plain, training=packed, pruning=replace(plain.pruning, fuse=fuse))
