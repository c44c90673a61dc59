"""What users put around a tower acts on pruned tokens too: adapters, offloading, int8, DDP, recomputation.

A tower is run block by block past its own forward, so a parameter that is read instead of called would be read past
the wrapper (meteor_model/encoders/at_hand.py). Every tower of the table meets every kind of wrapper.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from meteor_model.encode import encode_pruned
from meteor_model.encoders import VisionEncoder
from meteor_model.encoders.at_hand import runs_at
from tests.meteor_model.builders import pixels
from tests.meteor_model.test_encoders import BUDGETS, EVERY, Holder, budgets_of
from tests.meteor_model.towers import tower


def run(encoder: VisionEncoder, pruned: bool = True) -> tuple[Tensor, Tensor]:
    """Tokens (2, K, D), and the kept positions (2, K)."""
    images = encoder.normalize(pixels(2), torch.float32)
    count = 1 if not encoder.prunes_between_blocks else 3
    tokens, kept = encode_pruned(encoder, images, budgets_of(encoder) if pruned else [64] * count, 2, 7)
    return tokens.hidden, kept[-1]


def lively(name: str) -> VisionEncoder:
    """A tower none of whose parameters is zero or one: biases, positions and scales count."""
    encoder, generator = tower(name), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return encoder


def layers_of(encoder: VisionEncoder) -> list[str]:
    """Linear layers of the blocks; the convolutions of a net that has none."""
    modules = dict(encoder.tower.named_modules())
    linear = [name for name, module in modules.items() if type(module) is nn.Linear]
    return linear or [name for name, module in modules.items() if type(module) is nn.Conv2d and module.groups == 1]


def add_lora(encoder: VisionEncoder) -> Any:
    torch.manual_seed(3)
    settings = LoraConfig(r=2, target_modules=layers_of(encoder), init_lora_weights=False)
    return get_peft_model(encoder.tower, settings)


class Opaque(nn.Module):
    """A layer of which nothing can be read: what every wrapper has in common."""

    weight = bias = None  # asked for by Pix2Struct's own layers

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.call: Callable[[Tensor], Tensor] = layer.forward

    def forward(self, hidden: Tensor) -> Tensor:
        return self.call(hidden)


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_adapters_act_on_pruned_and_unpruned_tokens(name: str) -> None:
    encoder = lively(name)
    plain = run(encoder, False)[0]
    adapted = add_lora(encoder)
    found = [run(encoder, pruned) for pruned in (False, True)]
    assert not torch.allclose(found[0][0], plain, atol=1e-3)
    encoder.tower = adapted.merge_and_unload()
    for pruned, (hidden, kept) in zip((False, True), found, strict=True):
        expected, expected_kept = run(encoder, pruned)
        assert torch.equal(kept, expected_kept)
        torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_offloaded_towers_give_the_same_tokens(name: str, where: str, tmp_path: Path) -> None:
    encoder = lively(name)
    expected = [run(encoder, pruned) for pruned in (False, True)]
    if where == "cpu":
        accelerate.cpu_offload(encoder, torch.device("cpu"))
    else:
        accelerate.disk_offload(encoder, tmp_path, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert runs_at(encoder) == (torch.device("cpu"), torch.float32)
    for pruned, (hidden, kept) in zip((False, True), expected, strict=True):
        found, found_kept = run(encoder, pruned)
        assert torch.equal(found_kept, kept)
        torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-5)  # biases may be added apart
    assert all(parameter.is_meta for parameter in encoder.parameters()), "nothing stays behind"


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_nothing_of_a_wrapped_layer_is_read(name: str) -> None:
    encoder = lively(name)
    expected = [run(encoder, pruned) for pruned in (False, True)]
    for path, module in list(encoder.tower.named_modules()):
        if type(module) is nn.Linear:
            parent, _, leaf = path.rpartition(".")
            setattr(encoder.tower.get_submodule(parent), leaf, Opaque(module))
    for pruned, (hidden, kept) in zip((False, True), expected, strict=True):
        found, found_kept = run(encoder, pruned)
        assert torch.equal(found_kept, kept)
        torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_dynamic_int8_runs_and_stays_close(name: str) -> None:
    encoder = lively(name)
    expected = run(encoder, False)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao names its successor
        torch.ao.quantization.quantize_dynamic(encoder, {nn.Linear}, dtype=torch.qint8, inplace=True)
    assert (run(encoder, False)[0] - expected).norm() < 0.05 * expected.norm()
    hidden, kept = run(encoder)
    assert kept.shape == (2, BUDGETS[-1])
    assert bool(hidden.isfinite().all())


class Loss(nn.Module):
    """A tower as DistributedDataParallel sees it."""

    def __init__(self, encoder: VisionEncoder, pruned: bool) -> None:
        super().__init__()
        self.encoder, self.pruned = encoder, pruned

    def forward(self) -> Tensor:
        return run(self.encoder, self.pruned)[0].pow(3).sum()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", EVERY)
def test_ddp_waits_for_no_gradient_that_never_comes(name: str) -> None:
    """The second forward is where it says that a parameter of the first had none."""
    for pruned in (False, True):
        parallel = DistributedDataParallel(Loss(tower(name).train(), pruned))
        for _ in range(2):
            parallel().backward()
        encoder = parallel.module.encoder
        frozen = [key for key, value in encoder.tower.named_parameters() if not value.requires_grad]
        assert all(key.startswith(encoder.idle) for key in frozen)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", EVERY)
def test_adapters_learn_the_same_with_both_kinds_of_recomputation(name: str) -> None:
    encoder = tower(name).train()
    add_lora(encoder)
    adapters = {key: value for key, value in encoder.named_parameters() if value.requires_grad}
    assert adapters
    assert all("lora_" in key for key in adapters)

    def gradients() -> dict[str, Tensor | None]:
        encoder.zero_grad()
        run(encoder)[0].pow(3).sum().backward()
        return {key: None if value.grad is None else value.grad.clone() for key, value in adapters.items()}

    expected = gradients()
    for reentrant in (False, True):
        Holder(encoder).gradient_checkpointing_enable({"use_reentrant": reentrant})
        for key, gradient in gradients().items():
            wanted = expected[key]
            if wanted is not None:  # an adapter of what no token depends on never learns
                assert gradient is not None, f"{key} does not learn (reentrant: {reentrant})"
                tolerance = 1e-4 * float(wanted.abs().max())
                torch.testing.assert_close(gradient, wanted, rtol=0.0, atol=tolerance, msg=key)
