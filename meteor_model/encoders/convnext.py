"""ConvNeXt (transformers): a convolutional tower. It runs dense and is pruned at its output only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextModel

from meteor_model.encoders.base import IMAGENET_MEAN, IMAGENET_STD, EncoderConfig, VisionEncoder, square_grid


class ConvNextEncoder(VisionEncoder):
    """`transformers.ConvNextModel`; its four (or fewer) stages are the blocks, its last feature map the tokens."""

    prunes_between_blocks = False
    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.tower = ConvNextModel(ConvNextConfig(**config.tower))

    @classmethod
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        tower = ConvNextConfig(**config.tower)
        return square_grid(config, tower.patch_size * 2 ** (tower.num_stages - 1))

    @classmethod
    def num_blocks(cls, config: EncoderConfig) -> int:
        return ConvNextConfig(**config.tower).num_stages

    @property
    def embed_dim(self) -> int:
        return self.tower.config.hidden_sizes[-1]

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.encoder.stages

    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        """(M, 3, R, R) -> (M, D0, R/4, R/4): a feature map, not yet a row of tokens."""
        return self.tower.embeddings(pixels_MCRR)

    def run_block(self, index: int, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.blocks[index](hidden_MTD)
        return output

    def finish(self, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        """(M, D, rows, columns) -> (M, N, D) in raster order."""
        return hidden_MTD.flatten(2).transpose(1, 2)
