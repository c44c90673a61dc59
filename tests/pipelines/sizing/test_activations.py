"""Activations counted without memory, against what autograd really saves on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jobs.recipes import recipe
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from pipelines.config.settings import PARTS
from pipelines.sizing.activations import Activations, count_activations
from pipelines.sizing.model_size import model_config

BATCH, LENGTH = 2, 64


def counted(
    trained: tuple[str, ...] = PARTS, checkpointing: bool = False, batch: int = BATCH, loss_chunk: int | None = None
) -> Activations:
    config = model_config(recipe("pretrain", "tiny"))
    return count_activations(
        config,
        trained,  # type: ignore[arg-type]
        micro_batch=batch,
        length=LENGTH,
        dtype=torch.float32,
        checkpointing=checkpointing,
        loss_chunk=loss_chunk,
    )


def saved_on_cpu() -> int:
    """Bytes of everything that autograd saves in a real forward pass, but for the model's own weights."""
    config = model_config(recipe("pretrain", "tiny"))
    model = MeteorForConditionalGeneration(config).train()
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    image = config.image_token_id
    ids = torch.full((BATCH, LENGTH), 7)
    ids[:, : config.tokens_per_image] = image
    pixels = torch.zeros(BATCH, 3, config.image_size, config.image_size, dtype=torch.uint8)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, labels=ids, num_items_in_batch=1.0
        )
        assert output.loss is not None
        return sum(storage.nbytes() for storage in saved.values())


def test_it_is_what_autograd_saves() -> None:
    assert counted().kept == pytest.approx(saved_on_cpu(), rel=0.1), "beside it live the inputs and the mask"


def test_a_loss_in_chunks_keeps_no_logits() -> None:
    """The plain form keeps their logarithms; chunks the gradient of the head's weight, and hidden states' for them."""
    config = model_config(recipe("pretrain", "tiny")).text_config
    vocabulary, width, tokens = config.vocab_size, config.hidden_size, BATCH * (LENGTH - 1)
    plain, chunked = counted(), counted(loss_chunk=8)
    logarithms, of_weight = 4 * tokens * vocabulary, 4 * vocabulary * width
    assert chunked.kept == pytest.approx(plain.kept - logarithms + of_weight, rel=0.001)
    assert counted(("towers", "projector"), loss_chunk=8).kept < chunked.kept - of_weight
    assert chunked.logits == 0 < plain.logits
    assert counted(loss_chunk=8).forward < counted(loss_chunk=10**6).forward


def test_recomputing_blocks_keeps_less_and_frozen_parts_keep_nothing() -> None:
    whole, recomputed = counted(), counted(checkpointing=True)
    assert recomputed.kept < whole.kept / 3
    assert recomputed.block > 0 == whole.block
    assert counted(("llm",)).kept < counted(("projector", "llm")).kept < whole.kept
    assert whole.no_grad < whole.forward


def test_it_grows_with_the_batch() -> None:
    one, two, four = (counted(batch=batch) for batch in (1, 2, 4))
    assert four.kept - two.kept == pytest.approx(2 * (two.kept - one.kept), rel=0.01)
    assert replace(two, logits=0).peak >= two.forward
