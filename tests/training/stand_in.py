"""A tiny model with the forward interface of the real one, and a synthetic stream, for tests of the loop alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

IMAGE_SIZE = 4
VOCABULARY = 32
PAD = 0


class StandInConfig(PretrainedConfig):
    model_type = "stand_in"

    def __init__(self, width: int = 16, layers: int = 2, **kwargs: Any) -> None:
        self.width = width
        self.layers = layers
        super().__init__(**{"tie_word_embeddings": True, **kwargs})


@dataclass
class StandInStats:
    tokens_in: int

    def as_metrics(self) -> dict[str, float]:
        return {"visual_tokens/in": float(self.tokens_in), "visual_tokens/kept": 1.0}


@dataclass
class StandInOutput(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    pruning_stats: Any = None


class StandInModel(PreTrainedModel):
    """Adds the projected mean of a sample's images to its token embeddings; tied head; one buffer of each kind."""

    config_class = StandInConfig
    base_model_prefix = "stand_in"
    _tied_weights_keys = {"lm_head.weight": "language_model.embed.weight"}

    def __init__(self, config: StandInConfig) -> None:
        super().__init__(config)
        width = config.width
        self.encoders = nn.ModuleList([nn.Conv2d(3, width, kernel_size=2, stride=2)])
        self.projectors = nn.ModuleList([nn.Linear(width, width)])
        self.language_model = nn.ModuleDict(
            {
                "embed": nn.Embedding(VOCABULARY, width),
                "layers": nn.ModuleList([nn.Linear(width, width) for _ in range(config.layers)]),
                "norm": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.register_buffer("positions", torch.arange(64) / 64.0, persistent=False)
        self.register_buffer("scale", torch.tensor([0.5]))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model["embed"]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_images: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> StandInOutput:
        hidden_BTC = self.language_model["embed"](input_ids) + self.positions[: input_ids.shape[1], None]
        no_images = pixel_values is None or pixel_values.shape[0] == 0
        pixels = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE) if no_images else pixel_values.float() / 255
        features_MC = self.projectors[0](self.encoders[0](pixels.to(hidden_BTC.dtype)).mean((2, 3)))
        if no_images:
            hidden_BTC = hidden_BTC + 0.0 * features_MC.sum()
        else:
            owner_M = torch.repeat_interleave(torch.arange(input_ids.shape[0]), num_images)
            pooled_BC = torch.zeros_like(hidden_BTC[:, 0]).index_add(0, owner_M, features_MC)
            hidden_BTC = hidden_BTC + self.scale * pooled_BC[:, None]
        for layer in self.language_model["layers"]:
            hidden_BTC = hidden_BTC + torch.tanh(layer(hidden_BTC))
        logits = self.lm_head(self.language_model["norm"](hidden_BTC))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, VOCABULARY).float(), labels[:, 1:].reshape(-1), reduction="sum"
            )
            items = (labels[:, 1:] != -100).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = loss / items
        return StandInOutput(loss=loss, logits=logits, pruning_stats=StandInStats(4 * pixels.shape[0]))
