"""Window attention on the tokens that are left: group by window, attend, ungroup. Pure functions.

The projections stay on the flat row of kept tokens; only the attention core sees the padded layout, so an empty slot
never costs a projection. A slot is a place in that layout, a sink a key that stands in every window (see `Sink`).

Legend: M images, N tokens present of one image, W windows of the full grid, n slots of one window, G = M x W, H heads,
d head width, S side of a window in cells, L keys of one window (n, or n + 1 with a sink).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from meteor_model.pruning import gather_tokens


class WindowLayout(NamedTuple):
    """Where the tokens of each image stand in the padded row of windows.

    Attributes:
        token_MS: (M, W * n) int64, the token in each slot; token 0 in a slot that is empty.
        filled_MWn: (M, W, n) bool, which slots hold a token of their own.
        slot_MN: (M, N) int64, the slot of each token: window * n + rank within its window.
    """

    token_MS: Tensor
    filled_MWn: Tensor
    slot_MN: Tensor


class Sink(NamedTuple):
    """One key that every window holds beside its tokens: what the zero cells beyond the grid's edge amount to.

    Such cells share one key and one value, so any number of them is a single key whose logit is raised by the
    log-sum-exp of their additive terms.

    Attributes:
        key_Hd, value_Hd: (H, d), the projections of a zero cell (the biases).
        logit_MHN: (M, H or 1, N), added to the logit of each query; `blocked` of its dtype where the window has none.
    """

    key_Hd: Tensor
    value_Hd: Tensor
    logit_MHN: Tensor


def blocked(dtype: torch.dtype) -> float:
    """The additive mask of a key that may not be seen. Finite, so that no row of a softmax is NaN."""
    return torch.finfo(dtype).min


def local_cells(positions_MN: Tensor, columns: int, window: int) -> tuple[Tensor, Tensor]:
    """Row and column of each token within its own window, both (M, N) int64."""
    return positions_MN // columns % window, positions_MN % columns % window


def window_extent(positions_MN: Tensor, grid: tuple[int, int], window: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of each token's window that lie within the grid, both (M, N) int64, between 1 and S."""
    first_row_MN = positions_MN // grid[1] // window * window
    first_column_MN = positions_MN % grid[1] // window * window
    return (grid[0] - first_row_MN).clamp(max=window), (grid[1] - first_column_MN).clamp(max=window)


def num_windows(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """Rows and columns of windows that cover the grid; the last ones may stick out."""
    return -(-grid[0] // window), -(-grid[1] // window)


def window_layout(positions_MN: Tensor, grid: tuple[int, int], window: int) -> WindowLayout:
    """Group the tokens of each image by the window of their cell, in raster order within a window.

    The number of slots n is the largest count in the batch: read from the data, hence known only when the call runs.
    While compiling it is the static bound min(S * S, N); on the meta device, where there is no data and only costs are
    counted, an even spread: ceil(N / W).
    """
    images, present = positions_MN.shape
    total = num_windows(grid, window)[0] * num_windows(grid, window)[1]
    rows_MN, columns_MN = positions_MN // grid[1] // window, positions_MN % grid[1] // window
    window_MN = rows_MN * num_windows(grid, window)[1] + columns_MN
    counts_MW = torch.zeros(images, total, dtype=torch.int64, device=positions_MN.device)
    counts_MW = counts_MW.scatter_add(1, window_MN, torch.ones_like(window_MN))
    slots = _slots_per_window(counts_MW, present, window)

    sorted_MN, order_MN = torch.sort(window_MN, dim=1, stable=True)
    start_MW = counts_MW.cumsum(dim=1) - counts_MW
    index_MN = torch.arange(present, device=positions_MN.device).expand(images, -1)
    rank_MN = torch.zeros_like(window_MN).scatter(1, order_MN, index_MN - start_MW.gather(1, sorted_MN))
    slot_MN = window_MN * slots + rank_MN
    token_MS = torch.zeros(images, total * slots, dtype=torch.int64, device=positions_MN.device)
    token_MS = token_MS.scatter(1, slot_MN, index_MN)
    filled_MWn = torch.arange(slots, device=positions_MN.device) < counts_MW[..., None]
    return WindowLayout(token_MS, filled_MWn, slot_MN)


def _slots_per_window(counts_MW: Tensor, present: int, window: int) -> int:
    if torch.compiler.is_compiling():
        return min(window * window, present)
    if counts_MW.is_meta:
        return -(-present // counts_MW.shape[1])
    return int(counts_MW.max())


def to_windows(tokens_MHNd: Tensor, layout: WindowLayout) -> Tensor:
    """(M, H, N, d) -> (M * W, H, n, d). An empty slot repeats token 0: `filled_MWn` tells it apart."""
    images, heads, _, width = tokens_MHNd.shape
    index = layout.token_MS[:, None, :, None].expand(-1, heads, -1, width)
    slots_MHWnd = tokens_MHNd.gather(2, index).unflatten(2, layout.filled_MWn.shape[1:])
    return slots_MHWnd.transpose(1, 2).flatten(0, 1)


def from_windows(slots_GHnd: Tensor, layout: WindowLayout) -> Tensor:
    """(M * W, H, n, d) -> (M, N, H * d): each token's own slot, heads joined."""
    images, windows, _ = layout.filled_MWn.shape
    slots_MSD = slots_GHnd.transpose(1, 2).flatten(2).unflatten(0, (images, windows)).flatten(1, 2)
    return gather_tokens(slots_MSD, layout.slot_MN)


def pair_bias(row_term_BHQS: Tensor, column_term_BHQS: Tensor, rows_BK: Tensor, columns_BK: Tensor) -> Tensor:
    """Decomposed relative positions of the pairs that are there: term of the key's row plus term of its column.

    `row_term_BHQS[..., r]` is what a query adds for any key in row r. Returns (B, H, Q, K).
    """
    heads, queries = row_term_BHQS.shape[1:3]
    row_BHQK = rows_BK[:, None, None].expand(-1, heads, queries, -1)
    column_BHQK = columns_BK[:, None, None].expand(-1, heads, queries, -1)
    return row_term_BHQS.gather(3, row_BHQK) + column_term_BHQS.gather(3, column_BHQK)


def attend_in_windows(
    query_MHNd: Tensor,
    key_MHNd: Tensor,
    value_MHNd: Tensor,
    layout: WindowLayout,
    bias_GHnn: Tensor | None = None,
    sink: Sink | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention of each token to the tokens of its own window. (M, N, H * d).

    `bias_GHnn` is added to the logits of the padded layout. Scale: d ** -0.5.
    """
    query_GHnd, key_GHLd, value_GHLd = (to_windows(x, layout) for x in (query_MHNd, key_MHNd, value_MHNd))
    windows, heads, slots, _ = query_GHnd.shape
    # The first slot of an empty window counts as seen: a row that sees nothing would have NaN gradients.
    seen_Gn = (layout.filled_MWn | (torch.arange(slots, device=query_GHnd.device) == 0)).flatten(0, 1)
    mask: Tensor = seen_Gn[:, None, None]
    if bias_GHnn is not None or sink is not None:
        mask = query_GHnd.new_zeros(()).expand_as(mask) if bias_GHnn is None else bias_GHnn
        mask = mask.masked_fill(~seen_Gn[:, None, None], blocked(query_GHnd.dtype))
    if sink is not None:
        key_GHLd = torch.cat([key_GHLd, sink.key_Hd[None, :, None].expand(windows, -1, -1, -1)], dim=2)
        value_GHLd = torch.cat([value_GHLd, sink.value_Hd[None, :, None].expand(windows, -1, -1, -1)], dim=2)
        logit_GHn1 = to_windows(sink.logit_MHN[..., None], layout).expand(-1, mask.shape[1], -1, -1)
        mask = torch.cat([mask.expand(-1, -1, slots, -1), logit_GHn1], dim=3)
    attended_GHnd = F.scaled_dot_product_attention(query_GHnd, key_GHLd, value_GHLd, attn_mask=mask, dropout_p=dropout)
    return from_windows(attended_GHnd, layout)


def partition(hidden_MND: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """All cells present: (M, N, D) -> (M * W, S * S, D) by reshape; cells beyond the grid's edge are zero."""
    rows, columns = num_windows(grid, window)
    hidden = hidden_MND.unflatten(1, grid)
    hidden = F.pad(hidden, (0, 0, 0, columns * window - grid[1], 0, rows * window - grid[0]))
    hidden = hidden.unflatten(2, (columns, window)).unflatten(1, (rows, window))
    return hidden.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def unpartition(windows_GND: Tensor, grid: tuple[int, int], window: int) -> Tensor:
    """The inverse of `partition`: (M * W, S * S, D) -> (M, N, D)."""
    rows, columns = num_windows(grid, window)
    hidden = windows_GND.unflatten(1, (window, window)).unflatten(0, (-1, rows, columns))
    hidden = hidden.transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return hidden[:, : grid[0], : grid[1]].flatten(1, 2)


def evenly_spaced(total: int, count: int | None, device: torch.device) -> Tensor:
    """Indices (Q,) of `count` tokens spread evenly over `total`; all of them where `count` is None or more."""
    if count is None or count >= total:
        return torch.arange(total, device=device)
    return (torch.arange(count, device=device) * total + total // 2) // count
