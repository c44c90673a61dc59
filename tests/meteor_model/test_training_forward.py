"""The training forward: one graph for every batch of a shape, recomputation that changes nothing, loud on bad input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from tests.meteor_model.builders import PRUNED, config, model
from tests.meteor_model.test_modeling import batch


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def other_values(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch of the same shapes with other text and other images."""
    ids = inputs["input_ids"].clone()
    text = ids > 3
    ids[text] = (ids[text] + 7) % 200 + 50
    return {**inputs, "input_ids": ids, "pixel_values": 255 - inputs["pixel_values"]}


def loss_and_gradients(
    built: MeteorForConditionalGeneration, inputs: dict[str, torch.Tensor], call: Any = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of a training step and the gradient of every parameter that has one."""
    built.zero_grad()
    loss = (built if call is None else call)(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}


def small() -> MeteorForConditionalGeneration:
    """Two towers of two blocks and two LLM layers: what there is to compile, once."""
    data = config(PRUNED).to_dict()
    clip, convnext = (next(e for e in data["encoders"] if e["family"] == family) for family in ("clip", "convnext"))
    data["encoders"] = [{**clip, "tower": {**clip["tower"], "num_hidden_layers": 2}}, convnext]
    data["text_config"] = {**data["text_config"], "num_hidden_layers": 2}
    data["pruning"] = PruningConfig(EncodePruning(totals=(48, 40)), FusePruning(keep=24), DecodePruning(enabled=False))
    torch.manual_seed(0)
    return MeteorForConditionalGeneration(MeteorConfig(**data))


@pytest.mark.parametrize(
    ("backend", "whole", "images"),
    [
        ("aot_eager", False, (1, 0, 2)),
        ("eager", False, (0, 0)),
        pytest.param("inductor", True, (1, 0, 2), marks=pytest.mark.slow),  # minutes of compilation
    ],
)
def test_one_graph_serves_every_batch_of_a_shape(backend: str, whole: bool, images: tuple[int, ...]) -> None:
    built = (model(PRUNED) if whole else small()).train()
    compiled = torch.compile(built, fullgraph=True, backend=backend)
    inputs = batch(PRUNED, images)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (inputs, other_values(inputs)):
            loss, gradients = loss_and_gradients(built, step, compiled)
            expected_loss, expected = loss_and_gradients(built, step)
            torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        for sample, column, token in ((0, 3, 50), (1, 2, 3)):  # a placeholder less, a placeholder more
            ids = inputs["input_ids"].clone()
            if (ids[sample, column] == 3) == (token == 3):
                continue  # a batch without images has none to lose
            ids[sample, column] = token
            with pytest.raises(RuntimeError, match="image placeholders and visual tokens differ"):
                compiled(**{**inputs, "input_ids": ids})
            with pytest.raises(ValueError, match=rf"sample {sample} of the batch has \d+ image placeholders"):
                built(**{**inputs, "input_ids": ids})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "the towers"])
@pytest.mark.parametrize("images", [(1, 0, 2), (0,)])
def test_recomputation_changes_neither_loss_nor_gradients(
    images: tuple[int, ...], frozen: str, reentrant: bool
) -> None:
    built = model(PRUNED).train()
    if frozen == "the towers":
        built.encoders.requires_grad_(False)
    inputs = batch(PRUNED, images)
    expected_loss, expected = loss_and_gradients(built, inputs)
    runs = dict.fromkeys(("llm", *built.encoders), 0)

    def count(part: str) -> Any:
        def hook(*_: Any) -> None:
            runs[part] += 1

        return hook

    for part, blocks in (("llm", built.language_model.layers), *((n, t.blocks) for n, t in built.encoders.items())):
        linear = [module for module in blocks[-1].modules() if isinstance(module, torch.nn.Linear)][-1]
        linear.register_forward_pre_hook(count(part))  # recomputation may stop inside of it
    built.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        built.enable_input_require_grads()
    loss, gradients = loss_and_gradients(built, inputs)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    trained = [part for part in runs if part == "llm" or frozen == "nothing"]
    assert {part: runs[part] for part in trained} == dict.fromkeys(trained, 2), "each block runs once and once again"
    built.gradient_checkpointing_disable()
    again, _ = loss_and_gradients(built, inputs)
    assert torch.equal(again, expected_loss)


def test_training_keeps_no_cache() -> None:
    built = model(PRUNED)
    inputs = batch(PRUNED)
    assert built.train()(**inputs).past_key_values is None
    assert built.eval()(**inputs).past_key_values is not None


TOWERS_ONLY = replace(PRUNED, fuse=FusePruning(enabled=False))


@pytest.mark.parametrize(
    ("pruning", "weight"),
    [
        (TOWERS_ONLY, "encoders.clip.tower.embeddings.class_embedding"),
        (TOWERS_ONLY, "encoders.convnext.tower.encoder.stages.0.layers.0.dwconv.weight"),
        (PRUNED, "encoders.pix2struct.tower.layernorm.weight"),  # after the tower's last boundary: stage 2 sees it
        (PRUNED, "projectors.pix2struct.input.weight"),
    ],
)
def test_nan_in_scores_is_an_error_not_a_selection(pruning: PruningConfig, weight: str) -> None:
    built = model(pruning)
    with torch.no_grad():
        built.get_parameter(weight).fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        built(**batch(pruning))


def test_loss_scale_and_shapes_do_not_depend_on_content() -> None:
    """Static shapes: two batches of the same lengths give tensors of the same shapes everywhere."""
    built = MeteorForConditionalGeneration(config(PRUNED)).train()
    shapes = []
    for inputs in (batch(PRUNED), other_values(batch(PRUNED))):
        output = built(**inputs)
        kept = [positions.shape for group in output.pruning_stats.encode.values() for positions in group]
        shapes.append((output.logits.shape, output.image_hidden_states.shape, output.pruning_stats.fuse.shape, kept))
    assert shapes[0] == shapes[1]
