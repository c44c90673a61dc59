"""METEOR: several vision encoders, one language model, visual tokens pruned in three stages.

    from meteor_model import MeteorForConditionalGeneration, MeteorProcessor

The first of these names that is used loads the model's libraries and enters the model at transformers' auto classes
(`AutoConfig`, `AutoModelForImageTextToText`, `AutoProcessor`, ...). Who uses the auto classes alone says
`import meteor_model.auto`.
The package itself loads nothing: processes that only move data import constants from it, not torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meteor_model.auto import (
        MeteorConfig,
        MeteorForConditionalGeneration,
        MeteorImageProcessor,
        MeteorProcessor,
    )

__all__ = ["MeteorConfig", "MeteorForConditionalGeneration", "MeteorImageProcessor", "MeteorProcessor"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("meteor_model.auto"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
