"""A model that starts at once: the forward interface of METEOR over a few thousand weights.

Legend: B samples, T tokens, C width, M images of all samples in order.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from benchmarks.chaos.data import IMAGE, VOCABULARY


class ChaosConfig(PretrainedConfig):
    """Width and depth."""

    model_type = "chaos"

    def __init__(self, width: int = 16, layers: int = 2, **kwargs: Any) -> None:
        self.width = width
        self.layers = layers
        super().__init__(**kwargs)


@dataclass
class ChaosStats:
    """What the training loop asks of a model's pruning statistics."""

    images: int

    def as_metrics(self) -> dict[str, float]:
        """One token an image, none dropped."""
        return {"visual_tokens/in": float(self.images), "visual_tokens/fuse/kept": float(self.images)}


@dataclass
class ChaosOutput(ModelOutput):
    """Output of `ChaosModel`."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    pruning_stats: Any = None


class ChaosLayer(nn.Module):
    """One residual layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        residual: Tensor = torch.tanh(self.linear(hidden_BTC))
        return hidden_BTC + residual


class ChaosModel(PreTrainedModel):
    """Each image's projected features take the place of its token; every token sees the mean of those before it."""

    config_class = ChaosConfig
    base_model_prefix = ""

    def __init__(self, config: ChaosConfig) -> None:
        super().__init__(config)
        width = config.width
        self.encoders = nn.ModuleList([nn.Conv2d(3, width, kernel_size=4, stride=4)])
        self.projectors = nn.ModuleList([nn.Linear(width, width)])
        self.language_model = nn.ModuleDict(
            {
                "embed": nn.Embedding(VOCABULARY, width),
                "layers": nn.Sequential(*(ChaosLayer(width) for _ in range(config.layers))),
                "norm": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        loss_chunk: int | None = None,
    ) -> ChaosOutput:
        """input_ids (B, T), pixel_values uint8 (M, 3, S, S) -> loss, logits (B, T, vocabulary)."""
        assert pixel_values is not None
        hidden_BTC = self.language_model["embed"](input_ids)
        images = len(pixel_values)
        pixels = pixel_values if images else pixel_values.new_zeros(1, 3, *pixel_values.shape[2:])
        features_MC = self.projectors[0](self.encoders[0](pixels.to(self.dtype) / 255).mean((2, 3)))
        if images:
            hidden_BTC = hidden_BTC.masked_scatter((input_ids == IMAGE).unsqueeze(-1), features_MC)
        else:  # every worker runs every module
            hidden_BTC = hidden_BTC + 0.0 * features_MC.sum()
        counts_T = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device).unsqueeze(-1)
        hidden_BTC = hidden_BTC + hidden_BTC.cumsum(1) / counts_T
        hidden_BTC = self.language_model["layers"](hidden_BTC)
        logits = self.lm_head(self.language_model["norm"](hidden_BTC))
        loss = None
        if labels is not None:
            targets = labels[:, 1:].reshape(-1)
            summed = nn.functional.cross_entropy(
                logits[:, :-1].reshape(-1, VOCABULARY).float(), targets, reduction="sum"
            )
            loss = summed / (max(1, int((targets != -100).sum())) if num_items_in_batch is None else num_items_in_batch)
        return ChaosOutput(loss=loss, logits=logits, pruning_stats=ChaosStats(images))
