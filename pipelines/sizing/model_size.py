"""How many parameters a recipe's model has, part by part: the modules on the meta device, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from meteor_model.architectures import build_config
from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.flops import meta_model
from pipelines.checkpoint.lora import LLM
from pipelines.checkpoint.zero3 import part_of
from pipelines.config.recipe import Recipe
from pipelines.config.settings import PARTS, LoraSettings, Part


@dataclass(frozen=True)
class ModelSize:
    """Parameters (numbers, not bytes) of a model.

    Attributes:
        parts: of `towers`, `projector` and `llm`, whose head counts with it.
        modules: the same by tower.
        largest: of the largest tensor.
        trained: the parts that get gradients.
        adapters: of the LLM's low-rank adapters, counted with `llm`; above 0 they alone learn of it.
    """

    parts: Mapping[Part, int]
    modules: Mapping[str, int]
    largest: int
    trained: frozenset[Part]
    adapters: int = 0

    @property
    def total(self) -> int:
        """P."""
        return sum(self.parts.values())

    @property
    def learning(self) -> int:
        """L: those that are trained."""
        return sum(self.adapters or self.parts[part] if part == "llm" else self.parts[part] for part in self.trained)

    @property
    def gathers(self) -> dict[Part, int]:
        """How often ZeRO-3 gathers each part in a micro-batch, without recomputation: forward, and backward if any.

        Gradients pass through all that stands behind the first trained part: towers, projectors, LLM.
        """
        order: tuple[Part, ...] = ("towers", "projector", "llm")
        reached = {part: any(first in self.trained for first in order[: place + 1]) for place, part in enumerate(order)}
        return {part: 2 if reached[part] else 1 for part in order}


def model_config(recipe: Recipe) -> MeteorConfig:
    """The configuration of a recipe's model, with the vocabulary that its pretrained LLM is published with."""
    model = recipe.model
    vocabulary = model.pretrained().text_config.get("vocab_size", model.vocab_size)
    return build_config(model.architecture, recipe.pruning, vocabulary, {}, image_token_id=0)


def model_size(recipe: Recipe, config: MeteorConfig | None = None) -> ModelSize:
    """Parameters of a recipe's model. Raises ValueError for a part that the architecture does not have."""
    model = meta_model(config or model_config(recipe))
    parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    modules: dict[str, int] = {}
    largest = 0
    for name, parameter in model.named_parameters():
        parts[part_of(name)] += parameter.numel()
        top, second = name.split(".")[:2]
        module = second if top == "encoders" else part_of(name)
        modules[module] = modules.get(module, 0) + parameter.numel()
        largest = max(largest, parameter.numel())
    adapters = _adapters(model, recipe.training.lora)
    parts["llm"] += adapters
    modules["llm"] += adapters
    rates = recipe.training.optimizer.learning_rates
    trained = frozenset(part for part in PARTS if rates.of(part) is not None)
    return ModelSize(parts, modules, largest, trained, adapters)


def _adapters(model: nn.Module, lora: LoraSettings) -> int:
    """Parameters of the low-rank adapters: rank rows of the inputs and rank columns of the outputs for each target."""
    if lora.rank is None:
        return 0
    layers = [(name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    adapted = [one for name, one in layers if name.startswith(f"{LLM}.") and name.rpartition(".")[2] in lora.targets]
    return sum(lora.rank * (one.in_features + one.out_features) for one in adapted)
