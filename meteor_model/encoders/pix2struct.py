"""Pix2Struct's vision encoder (transformers): no CLS token, row and column embeddings, unscaled T5-style attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import Pix2StructVisionConfig, Pix2StructVisionModel
from typing_extensions import override

from meteor_model.encoders.base import (
    EncoderConfig,
    ScoreProjections,
    VisionEncoder,
    flatten_patches,
    library_config,
    square_grid,
)
from meteor_model.encoders.pixels import check_images, eagle_pix2struct_pixels, standardised


class Pix2StructEncoder(VisionEncoder):
    """`transformers.Pix2StructVisionModel` on a fixed square grid, block by block.

    The patch size is not a field of the library's configuration: it follows from `patch_embed_hidden_size` = 3 p^2.
    """

    any_size = True

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.tower = Pix2StructVisionModel(library_config(config, Pix2StructVisionConfig))

    @classmethod
    def _patch_size(cls, config: EncoderConfig) -> int:
        width = library_config(config, Pix2StructVisionConfig).patch_embed_hidden_size
        side = round((width / 3) ** 0.5)
        if 3 * side * side != width:
            raise ValueError(
                f"encoder {config.name!r}: patch_embed_hidden_size {width} is not 3 * p * p for any whole patch size p"
            )
        return side

    @classmethod
    @override
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        rows, columns = square_grid(config, cls._patch_size(config))
        table = library_config(config, Pix2StructVisionConfig).seq_len
        if rows >= table:
            raise ValueError(
                f"encoder {config.name!r}: image_size {config.image_size} has {rows} rows of patches, the tower "
                f"{table} row embeddings (seq_len), the first of them for padding"
            )
        return rows, columns

    @classmethod
    @override
    def num_blocks(cls, config: EncoderConfig) -> int:
        return library_config(config, Pix2StructVisionConfig).num_hidden_layers

    @property
    @override
    def embed_dim(self) -> int:
        return self.tower.config.hidden_size

    @property
    @override
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.encoder.layer

    def normalize(self, pixels_MCSS: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Per-image standardisation, as the library's image processor does it."""
        if self.config.pixels == "eagle":
            check_images(pixels_MCSS)
            return eagle_pix2struct_pixels(pixels_MCSS, self.config.image_size).to(dtype)
        return standardised(super().normalize(pixels_MCSS, torch.float32)).to(dtype)

    def flatten_patches(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        """(M, 3, R, R) -> (M, N, 2 + 3 p^2): the library's patches, led by their row and column, counted from 1."""
        rows, columns = self.grid
        patches_MNE = flatten_patches(pixels_MCRR, rows, columns)
        cells_N = torch.arange(rows * columns, device=pixels_MCRR.device)
        index_N2 = torch.stack([cells_N // columns + 1, cells_N % columns + 1], dim=-1).to(torch.float32)
        return torch.cat([index_N2.expand(len(patches_MNE), -1, -1), patches_MNE.float()], dim=-1)

    @override
    def embed(self, pixels_MCRR: torch.Tensor) -> torch.Tensor:
        embeddings = self.tower.embeddings
        flattened = self.flatten_patches(pixels_MCRR)
        if pixels_MCRR.dtype == torch.float32:
            return embeddings(flattened)
        # The library reads row and column out of the float input: in half precision indices above 256 would round.
        row_MN, column_MN = flattened[..., 0].long(), flattened[..., 1].long()
        hidden = embeddings.patch_projection(flattened[..., 2:].to(pixels_MCRR.dtype))
        return embeddings.dropout(hidden + embeddings.row_embedder(row_MN) + embeddings.column_embedder(column_MN))

    @override
    def run_block(self, index: int, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.blocks[index](hidden_MTD, None)[0]
        return output

    @override
    def finish(self, hidden_MTD: torch.Tensor, positions_MN: torch.Tensor) -> torch.Tensor:
        return self.tower.layernorm(hidden_MTD)

    @override
    def score_projections(self, index: int) -> ScoreProjections:
        block = self.tower.encoder.layer[index]
        attention = block.attention
        return ScoreProjections(
            block.pre_attention_layer_norm, attention.query, attention.key, attention.n_heads, scaling=1.0
        )
