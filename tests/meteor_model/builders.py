"""Small models with random weights for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from meteor_model.architectures import build_config
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.decoder.cache import Decision, MeteorCache
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.tokenizer import train_tokenizer
from meteor_model.turn_encoder import Encoded

TEXTS = ("What colour is the background? red", "Where is the drawing? left", "Name it. a grinning face")
PRUNED = PruningConfig(
    EncodePruning(totals=(96, 64, 60)), FusePruning(keep=24), DecodePruning(layer=2, target_mean=12.0, lam=30.0)
)
UNSOLVED = replace(PRUNED, decode=replace(PRUNED.decode, lam=None))
DENSE = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))


def processor(pruning: PruningConfig = PRUNED, template: str = "short") -> MeteorProcessor:
    """A processor with a tokenizer trained on `TEXTS`."""
    tokenizer = train_tokenizer(TEXTS, 300)
    return MeteorProcessor(MeteorImageProcessor(64), tokenizer, config(pruning).tokens_per_image, template=template)


def config(pruning: PruningConfig = PRUNED, **changes: Any) -> MeteorConfig:
    """The tiny architecture with a vocabulary of 300."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    built = build_config("tiny", pruning, 300, ids, 3)
    if not changes:
        return built
    return MeteorConfig(**{**built.to_dict(), "calibrated": None, **changes})  # its numbers belong to what it gets


def model(pruning: PruningConfig = PRUNED, seed: int = 0) -> MeteorForConditionalGeneration:
    """The tiny architecture with random weights, in eval mode."""
    torch.manual_seed(seed)
    return MeteorForConditionalGeneration(config(pruning)).eval()


def decided(cache: MeteorCache | None) -> Decision:
    """What stage 3 decided at the prefill of this cache."""
    assert cache is not None, "stage 3 acts"
    assert cache.decision is not None, "prefill decides"
    return cache.decision


def pixels(count: int, seed: int = 0) -> torch.Tensor:
    """(count, 3, 64, 64) uint8 noise."""
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@contextmanager
def counted_encodes() -> Iterator[list[int]]:
    """Images of every conversation that `MeteorProcessor.encode` is given inside the block."""
    calls: list[int] = []
    real = MeteorProcessor.encode

    def encode(self: MeteorProcessor, turns: Any, num_images: int, *rest: Any, **options: Any) -> Encoded:
        calls.append(num_images)
        return real(self, turns, num_images, *rest, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MeteorProcessor, "encode", encode)
        yield calls
