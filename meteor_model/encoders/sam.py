"""SAM's vision encoder (transformers): window attention with padded windows, decomposed relative positions, a neck.

`tower` holds the arguments of `SamVisionConfig` and one more: `neck`, "full" (the default: the library's neck) or
"short" (its first convolution and norm, which work cell by cell; EAGLE-X5 runs SAM so).

Legend: M images, N tokens present, D width, O width after the neck, H heads, d head width, S side of a window, R rows
or columns of the map that attention runs on, Q query tokens, L relative offsets (2 R - 1), G = M x windows, n slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SamVisionConfig, SamVisionModel
from transformers.models.sam.modeling_sam import SamVisionAttention
from typing_extensions import override

from meteor_model.encoders.at_hand import of_a_zero_token, own_tensors, project_part
from meteor_model.encoders.base import EncoderConfig, VisionEncoder, library_config, square_grid
from meteor_model.encoders.pixels import IMAGENET_MEAN, IMAGENET_STD
from meteor_model.encoders.windows import (
    Memo,
    Relative,
    Sink,
    WindowLayout,
    attend_in_windows,
    blocked,
    local_cells,
    pair_bias,
    window_extent,
    window_layout,
)
from meteor_model.pruners.tower_scores import evenly_spaced, received_attention

NECKS = ("full", "short")
#: Relative-position biases of a global block that exist at once; more queries are taken in turns.
BIAS_ELEMENTS = 2**26


class SamEncoder(VisionEncoder):
    """`transformers.SamVisionModel`, block by block. With every token present the library's own layers run.

    Tokens that were dropped are left out of attention. The cells by which the library pads a window are always there:
    they are zero after the norm, so key and value are the biases. The full neck needs a map: dropped cells are zero in
    it (this project's decision). Tokens are scored by the attention they receive in the last global block of a segment.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.tower = SamVisionModel(self._library_config(config))
        self.neck = self._neck(config)
        if self.neck == "short":
            self.idle = ("vision_encoder.neck.conv2", "vision_encoder.neck.layer_norm2")
        self._layout = Memo[WindowLayout]()

    @staticmethod
    def _neck(config: EncoderConfig) -> Any:
        return config.tower.get("neck", "full")

    @classmethod
    def _library_config(cls, config: EncoderConfig) -> SamVisionConfig:
        """ValueError for a neck that there is not, or a setting that SAM does not have."""
        if cls._neck(config) not in NECKS:
            raise ValueError(
                f"encoder {config.name!r}: neck must be one of {', '.join(NECKS)}, got {cls._neck(config)!r}"
            )
        tower = {key: value for key, value in config.tower.items() if key != "neck"}
        return library_config(replace(config, tower=tower), SamVisionConfig)

    @classmethod
    @override
    def grid_size(cls, config: EncoderConfig) -> tuple[int, int]:
        return square_grid(config, cls._library_config(config).patch_size)

    @classmethod
    @override
    def num_blocks(cls, config: EncoderConfig) -> int:
        return cls._library_config(config).num_hidden_layers

    @property
    @override
    def embed_dim(self) -> int:
        return self.tower.config.output_channels

    @property
    @override
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.vision_encoder.layers

    def embed(self, pixels_MCRR: Tensor) -> Tensor:
        """Patches and their positions; at another than the tower's own size the positions are resized bicubically."""
        encoder = self.tower.vision_encoder
        with own_tensors(encoder):
            position_1RRD = encoder.pos_embed
        if self.config.image_size == self.tower.config.image_size:
            hidden = encoder.patch_embed(pixels_MCRR)
            return (hidden if position_1RRD is None else hidden + position_1RRD).flatten(1, 2)
        hidden = encoder.patch_embed.projection(pixels_MCRR).permute(0, 2, 3, 1)  # its forward refuses other sizes
        if position_1RRD is not None:
            position_1DRR = position_1RRD.permute(0, 3, 1, 2)
            position_1DRR = F.interpolate(position_1DRR, size=self.grid, mode="bicubic", align_corners=False)
            hidden = hidden + position_1DRR.permute(0, 2, 3, 1)
        return hidden.flatten(1, 2)

    def _all_present(self, positions_MN: Tensor) -> bool:
        return positions_MN.shape[1] == math.prod(self.grid)

    @override
    def run_block(self, index: int, hidden_MTD: Tensor, positions_MN: Tensor) -> Tensor:
        layer = self.tower.vision_encoder.layers[index]
        if self._all_present(positions_MN):
            output: Tensor = layer(hidden_MTD.unflatten(1, self.grid)).flatten(1, 2)
            return output
        normed_MND = layer.layer_norm1(hidden_MTD)
        if layer.window_size > 0:
            attended_MND = self._attend_windows(layer.attn, normed_MND, positions_MN, layer.window_size)
        else:
            attended_MND = self._attend_globally(layer.attn, normed_MND, positions_MN)
        hidden_MND = hidden_MTD + layer.attn.proj(attended_MND)
        return hidden_MND + layer.mlp(layer.layer_norm2(hidden_MND))

    def checkpoints_itself(self, index: int, positions_MN: Tensor) -> bool:
        """The library's layer does; with dropped tokens only its parts are called."""
        return self._all_present(positions_MN)

    def _attend_windows(
        self, attention: SamVisionAttention, normed_MND: Tensor, positions_MN: Tensor, window: int
    ) -> Tensor:
        query_MNHd, key_MNHd, value_MNHd = _project(attention, normed_MND)
        relative = _relative(attention, query_MNHd, positions_MN, self.grid, window)
        return attend_in_windows(
            query_MNHd,
            key_MNHd,
            value_MNHd,
            self._layout(positions_MN, lambda cells_MN: window_layout(cells_MN, self.grid, window)),
            relative,
            _padding_sink(attention, normed_MND, query_MNHd, relative, positions_MN, self.grid, window),
        )

    def _attend_globally(self, attention: SamVisionAttention, normed_MND: Tensor, positions_MN: Tensor) -> Tensor:
        parts = _project(attention, normed_MND)
        query_MHNd, key_MHNd, value_MHNd = (x.transpose(1, 2) for x in parts)
        relative = _relative(attention, parts[0], positions_MN, self.grid, max(self.grid))
        if relative is None:
            attended = F.scaled_dot_product_attention(query_MHNd, key_MHNd, value_MHNd)
            return attended.transpose(1, 2).flatten(2)
        images, heads, present, _ = query_MHNd.shape
        chunk = max(1, BIAS_ELEMENTS // (images * heads * present))
        attended_MHQd = []
        for start in range(0, present, chunk):
            rows = slice(start, start + chunk)
            bias_MHQN = pair_bias(
                relative.row_term_MNHR[:, rows].transpose(1, 2),
                relative.column_term_MNHR[:, rows].transpose(1, 2),
                relative.rows_MN,
                relative.columns_MN,
            )
            attended_MHQd.append(
                F.scaled_dot_product_attention(query_MHNd[:, :, rows], key_MHNd, value_MHNd, attn_mask=bias_MHQN)
            )
        return torch.cat(attended_MHQd, dim=2).transpose(1, 2).flatten(2)

    def finish(self, hidden_MTD: Tensor, positions_MN: Tensor) -> Tensor:
        """The neck: (M, N, D) -> (M, N, O)."""
        neck = self.tower.vision_encoder.neck
        if self.neck == "short":
            row_MON1 = neck.layer_norm1(neck.conv1(hidden_MTD.transpose(1, 2)[..., None]))
            return row_MON1[..., 0].transpose(1, 2)
        if self._all_present(positions_MN):
            return neck(hidden_MTD.unflatten(1, self.grid)).flatten(2).transpose(1, 2)
        index_MND = positions_MN[..., None].expand_as(hidden_MTD)
        map_MCD = hidden_MTD.new_zeros(len(hidden_MTD), math.prod(self.grid), hidden_MTD.shape[2])
        map_MCD = map_MCD.scatter(1, index_MND, hidden_MTD)
        finished_MCO = neck(map_MCD.unflatten(1, self.grid)).flatten(2).transpose(1, 2)
        return finished_MCO.gather(1, positions_MN[..., None].expand(-1, -1, finished_MCO.shape[2]))

    def score_block(self, end: int) -> int:
        """The last global block before `end`: only there does a token receive attention from the whole image."""
        chosen = [index for index in self.tower.config.global_attn_indexes if index < end]
        return max(chosen, default=-1)

    def importance(self, index: int, input_MTD: Tensor, positions_MN: Tensor, queries: int | None) -> Tensor:
        """Attention received in global block `index` from `queries` evenly spaced tokens (None: from all)."""
        layer = self.tower.vision_encoder.layers[index]
        if layer.window_size > 0:
            raise ValueError(
                f"encoder {self.config.name!r}: block {index} attends within windows and cannot score tokens; every "
                f"scored segment needs one of the global blocks {list(self.tower.config.global_attn_indexes)}"
            )
        normed_MND = layer.layer_norm1(input_MTD)
        pick_Q = evenly_spaced(positions_MN.shape[1], queries, positions_MN.device)
        query_MQHd, key_MNHd = _query_and_key(layer.attn, normed_MND, pick_Q)
        relative = _relative(layer.attn, query_MQHd, positions_MN, self.grid, max(self.grid), pick_Q)
        query_MQHx, key_MNHx = query_MQHd * layer.attn.scale, key_MNHd
        if relative is not None:
            # The terms of rows and columns are products, too: with the one-hot row and column of the key.
            cells = zip((relative.rows_MN, relative.columns_MN), self.grid, strict=True)
            one_hot = [
                F.one_hot(cells_MN, size)[:, :, None].expand(-1, -1, key_MNHd.shape[2], -1) for cells_MN, size in cells
            ]
            query_MQHx = torch.cat([query_MQHx, relative.row_term_MNHR, relative.column_term_MNHR], dim=3)
            key_MNHx = torch.cat([key_MNHd, *(x.to(key_MNHd.dtype) for x in one_hot)], dim=3)
        return received_attention(query_MQHx.transpose(1, 2), key_MNHx.transpose(1, 2), scaling=1.0)


def _project(attention: SamVisionAttention, normed_MND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the block's own projection, (M, N, H, d) each."""
    query, key, value = attention.qkv(normed_MND).unflatten(2, (3, attention.num_attention_heads, -1)).unbind(2)
    return query, key, value


def _query_and_key(attention: SamVisionAttention, normed_MND: Tensor, pick_Q: Tensor) -> tuple[Tensor, Tensor]:
    """Queries of a few tokens and keys of all, (M, Q, H, d) and (M, N, H, d): no more than a score needs."""
    query_MQD = project_part(attention.qkv, normed_MND[:, pick_Q], 0)
    key_MND = project_part(attention.qkv, normed_MND, 1)
    heads = attention.num_attention_heads
    return query_MQD.unflatten(2, (heads, -1)), key_MND.unflatten(2, (heads, -1))


def _relative(
    attention: SamVisionAttention,
    query_MQHd: Tensor,
    positions_MN: Tensor,
    grid: tuple[int, int],
    side: int,
    pick_Q: Tensor | None = None,
) -> Relative | None:
    """The block's relative positions for the kept tokens, on a map of `side` x `side` cells: a window, or the grid.

    The queries are those of all tokens, or of the tokens `pick_Q`.
    """
    if not attention.use_rel_pos:
        return None
    rows_MN, columns_MN = local_cells(positions_MN, grid[1], side)
    rows_MQ, columns_MQ = (rows_MN, columns_MN) if pick_Q is None else (rows_MN[:, pick_Q], columns_MN[:, pick_Q])
    with own_tensors(attention):
        row_offsets_Ld, column_offsets_Ld = attention.rel_pos_h, attention.rel_pos_w
    return Relative(
        _axis_term(attention, query_MQHd, row_offsets_Ld, rows_MQ, side),
        _axis_term(attention, query_MQHd, column_offsets_Ld, columns_MQ, side),
        rows_MN,
        columns_MN,
    )


def _axis_term(
    attention: SamVisionAttention, query_MNHd: Tensor, offsets_Ld: Tensor, cells_MN: Tensor, side: int
) -> Tensor:
    """What each query adds to the logit of a key in row (or column) 0..R-1: (M, N, H, R).

    The library's `get_rel_pos` is the embedding of every pair of rows, (R, R, d); it depends on their difference only,
    so that its first and last row hold all of it.
    """
    pairs_RRd = attention.get_rel_pos(side, side, offsets_Ld)
    offsets_Ld = torch.cat([pairs_RRd[0].flip(0), pairs_RRd[-1].flip(0)[1:]])
    product_MNHL = query_MNHd @ offsets_Ld.T
    index_MNR = cells_MN[..., None] - torch.arange(side, device=cells_MN.device) + side - 1
    return product_MNHL.gather(3, index_MNR[:, :, None].expand(-1, -1, query_MNHd.shape[2], -1))


def _padding_sink(
    attention: SamVisionAttention,
    normed_MND: Tensor,
    query_MNHd: Tensor,
    relative: Relative | None,
    positions_MN: Tensor,
    grid: tuple[int, int],
    window: int,
) -> Sink | None:
    """The zero cells of each window: those below the grid, and those right of it in the rows that are left.

    The sum of exp(row term + column term) over such a region is a product of two sums. None where windows fit the grid.
    """
    if grid[0] % window == 0 and grid[1] % window == 0:
        return None
    heads, width = query_MNHd.shape[2:]
    _, key_Hd, value_Hd = of_a_zero_token(attention.qkv, normed_MND).unflatten(0, (3, heads, width)).unbind(0)
    if relative is None:
        row_MNHS = column_MNHS = query_MNHd.new_zeros((*query_MNHd.shape[:3], window), dtype=torch.float32)
    else:
        row_MNHS, column_MNHS = relative.row_term_MNHR.float(), relative.column_term_MNHR.float()
    rows_MN, columns_MN = window_extent(positions_MN, grid, window)
    index_S = torch.arange(window, device=query_MNHd.device)
    inner_row, inner_column = (index_S < extent_MN[..., None, None] for extent_MN in (rows_MN, columns_MN))
    below_MNH = _log_sum(row_MNHS, ~inner_row) + column_MNHS.logsumexp(dim=3)
    beside_MNH = _log_sum(row_MNHS, inner_row) + _log_sum(column_MNHS, ~inner_column)
    logit_MNH = torch.logaddexp(below_MNH, beside_MNH).to(query_MNHd.dtype)
    complete_MN1 = ((rows_MN == window) & (columns_MN == window))[..., None]
    return Sink(key_Hd, value_Hd, logit_MNH.masked_fill(complete_MN1, blocked(query_MNHd.dtype)))


def _log_sum(terms_MNHS: Tensor, taken: Tensor) -> Tensor:
    """Log of the sum of exp over the cells taken; very low where none is, yet finite: infinity has NaN gradients."""
    return terms_MNHS.masked_fill(~taken, -1e9).logsumexp(dim=3)
