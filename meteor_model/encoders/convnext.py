"""ConvNeXt (transformers): a convolutional tower. It runs dense and is pruned at its output only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextModel
from typing_extensions import override

from meteor_model.encoders.base import EncoderConfig, VisionEncoder, library_config, square_grid
from meteor_model.encoders.pixels import IMAGENET_MEAN, IMAGENET_STD


class ConvNextEncoder(VisionEncoder):
    """`transformers.ConvNextModel`; the layers of its stages are the blocks, its last feature map the tokens."""

    any_size = True
    prunes_between_blocks = False
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    idle = ("layernorm",)  # of the pooled output

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.tower = ConvNextModel(library_config(config, ConvNextConfig))

    @classmethod
    @override
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        tower = library_config(config, ConvNextConfig)
        if tower.num_stages != len(tower.depths):  # a power of it follows, of any size
            raise ValueError(f"encoder {config.name!r}: num_stages is not the number of depths, {len(tower.depths)}")
        return square_grid(config, tower.patch_size * 2 ** (tower.num_stages - 1))

    @classmethod
    @override
    def num_blocks(cls, config: EncoderConfig) -> int:
        tower = library_config(config, ConvNextConfig)
        return sum(tower.depths) + 2 * (tower.num_stages - 1)  # a stage but the first starts with a norm and a conv

    @property
    @override
    def embed_dim(self) -> int:
        width: int = self.tower.config.hidden_sizes[-1]
        return width

    @property
    @override
    def blocks(self) -> Sequence[nn.Module]:
        stages = self.tower.encoder.stages
        return [layer for stage in stages for layer in (*stage.downsampling_layer, *stage.layers)]

    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        """(M, 3, R, R) -> (M, D0, R/4, R/4): a feature map, not yet a row of tokens."""
        return self.tower.embeddings(pixels_MCRR)

    def finish(self, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        """(M, D, rows, columns) -> (M, N, D) in raster order."""
        return hidden_MTD.flatten(2).transpose(1, 2)
