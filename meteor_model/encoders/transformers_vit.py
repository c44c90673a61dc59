"""What the vision transformers of transformers share: pre-norm layers with query and key projections of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import override

from meteor_model.encoders.base import EncoderConfig, ScoreProjections, VisionEncoder, library_config, square_grid


class TransformersVit(VisionEncoder):
    """A vision transformer of transformers, block by block. A family names its classes and what differs.

    `embed`, `blocks` and `score_projections` are those of CLIP and SigLIP.
    """

    any_size = True

    #: The library's configuration class.
    config_class: ClassVar[type[PreTrainedConfig]]
    #: Builds the library's model from its configuration.
    model: ClassVar[Callable[[Any], PreTrainedModel]]
    #: Arguments of the configuration that differ from the library's defaults, unless the tower sets them.
    defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.tower = type(self).model(self.library_config(config))

    @classmethod
    def library_config(cls, config: EncoderConfig) -> Any:
        """The library's configuration of this tower."""
        return library_config(config, cls.config_class, **cls.defaults)

    @classmethod
    @override
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        return square_grid(config, cls.library_config(config).patch_size)

    @classmethod
    @override
    def num_blocks(cls, config: EncoderConfig) -> int:
        count: int = cls.library_config(config).num_hidden_layers
        return count

    @property
    @override
    def embed_dim(self) -> int:
        width: int = self.tower.config.hidden_size
        return width

    @property
    @override
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.encoder.layers

    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        """Patches and their positions, which the library interpolates where `image_size` is not the tower's own."""
        native = self.tower.config.image_size
        return self.tower.embeddings(pixels_MCRR, interpolate_pos_encoding=self.config.image_size != native)

    @override
    def run_block(self, index: int, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.blocks[index](hidden_MTD, attention_mask=None)
        return output

    @override
    def score_projections(self, index: int) -> ScoreProjections:
        block = self.tower.encoder.layers[index]
        attention = block.self_attn
        return ScoreProjections(
            block.layer_norm1, attention.q_proj, attention.k_proj, attention.num_heads, attention.scale
        )
