"""LoRA on the language model: adapters beside its linear layers, made by peft, merged where whole weights are read.

peft names the layer that it puts in the place of `X` by `X.base_layer`, `X.lora_A.default` and `X.lora_B.default`; the
adapted layer computes W x + scale B (A x), which is (W + scale B A) x. A checkpoint holds A and B, since W is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pipelines.config.settings import LoraSettings, SettingsError

LLM = "language_model"
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def add_adapters(model: nn.Module, settings: LoraSettings, seed: int) -> None:
    """Put adapters around the target layers of the language model; B is zero, so the model computes what it did.

    Raises:
        SettingsError: if a target names no linear layer of the language model.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and name.startswith(f"{LLM}.")]
    known = sorted({name.rpartition(".")[2] for name in layers})
    for target in settings.targets:
        if target not in known:
            raise SettingsError(
                f"training.lora.targets has {target!r}, but the linear layers of this language model are "
                f"{', '.join(known)}; choose from them"
            )
    adapted = rf"{LLM}\.(?:.*\.)?(?:{'|'.join(settings.targets)})"
    assert settings.rank is not None
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=adapted)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of an adapter."""
    return DOWN in name or UP in name


def is_adapted(name: str) -> bool:
    """Whether a parameter is a weight that an adapter will be merged into."""
    return name.endswith(f"{BASE}weight")


def plain_name(name: str) -> str:
    """The name of a parameter in the model without adapters."""
    return name.replace(BASE, ".")


class MergedWeights(Mapping[str, Tensor]):
    """The weights of a model with adapters as those of the model without, the adapters merged in fp32."""

    def __init__(self, weights: Mapping[str, Tensor], scale: float) -> None:
        """See the class; `scale` is alpha / rank."""
        self._weights = weights
        self._scale = scale
        self._names = {plain_name(name): name for name in weights if not is_adapter(name)}

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        stored = self._names[name]
        base = self._weights[stored]
        up = stored.replace(BASE, UP)
        if BASE not in stored or up not in self._weights:
            return base
        down = self._weights[stored.replace(BASE, DOWN)]
        return base.float() + self._scale * (self._weights[up].float() @ down.float())
