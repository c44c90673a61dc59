"""Window attention on the tokens that are left: group by window, attend, ungroup. Pure functions.

The projections stay on the flat row of kept tokens; only the attention core sees padded windows, so an empty slot never
costs a projection. Windows with about as many tokens are padded alike and attend together (a bucket); windows without
tokens are left out. A slot is a place in that layout, a sink a key that stands in every window (see `Sink`).

Legend: M images, N tokens present of one image, W windows of the full grid, F slots of all buckets, g windows of one
bucket, n slots of each of them, H heads, d head width, S side of a window in cells, R rows or columns of the map that
attention runs on, L keys of a window (n, or n + 1 with a sink), Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")
#: A window is padded by less than this share of its cells (in eager mode).
BUCKETS = 8


class WindowLayout(NamedTuple):
    """Where the tokens of all images stand, window by window, bucket by bucket.

    Attributes:
        token_F: int64, the token (image * N + index) in each slot; token 0 in a slot that is empty.
        seen_F: bool, slots that take part as keys: those that hold a token, and the first of each window.
        slot_MN: int64, the slot of each token.
        buckets: windows g, slots of each n, and whether some slot is empty.
    """

    token_F: Tensor
    seen_F: Tensor
    slot_MN: Tensor
    buckets: tuple[tuple[int, int, bool], ...]


class Relative(NamedTuple):
    """Decomposed relative positions: what a query adds to a key's logit is a term of its row plus one of its column.

    Attributes:
        row_term_MNHR, column_term_MNHR: each query's term for a key in row (column) 0..R-1.
        rows_MN, columns_MN: int64, where each token stands in the map that attention runs on.
    """

    row_term_MNHR: Tensor
    column_term_MNHR: Tensor
    rows_MN: Tensor
    columns_MN: Tensor


class Sink(NamedTuple):
    """One key that every window holds beside its tokens: what the zero cells beyond the grid's edge amount to.

    Such cells share one key and one value, so any number of them is a single key whose logit is raised by the
    log-sum-exp of their additive terms.

    Attributes:
        key_Hd, value_Hd: the projections of a zero cell (the biases).
        logit_MNH: added to the logit of each query (H may be 1); `blocked` of its dtype where the window has none.
    """

    key_Hd: Tensor
    value_Hd: Tensor
    logit_MNH: Tensor


class Memo(Generic[T]):
    """The last result of a function of the kept cells, for the blocks of a segment all ask for the same one.

    The key is the tensor itself: nothing is decided here, and a recomputed block that asks again gets the same. A copy
    of the encoder starts with an empty memo.
    """

    def __init__(self) -> None:
        self._last: tuple[Tensor, T] | None = None

    def __call__(self, positions_MN: Tensor, compute: Callable[[Tensor], T]) -> T:
        """The result for these kept cells, computed where they are not the last ones."""
        if torch.compiler.is_compiling():
            return compute(positions_MN)
        last = self._last
        if last is None or last[0] is not positions_MN:
            last = self._last = (positions_MN, compute(positions_MN))
        return last[1]

    def __reduce__(self) -> tuple[type[Memo[T]], tuple[()]]:
        return type(self), ()


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

    The numbers of slots follow the counts: they are read from the data, hence known only when the call runs. While
    compiling every window has the static bound min(S * S, N); on the meta device, where there is no data and only costs
    are counted, an even spread: ceil(N / W).
    """
    images, present = positions_MN.shape
    device = positions_MN.device
    rows, columns = num_windows(grid, window)
    window_MN = positions_MN // grid[1] // window * columns + positions_MN % grid[1] // window
    counts_MW = torch.zeros(images, rows * columns, dtype=torch.int64, device=device)
    counts_MW = counts_MW.scatter_add(1, window_MN, torch.ones_like(window_MN))
    if torch.compiler.is_compiling() or counts_MW.is_meta:
        slots = -(-present // (rows * columns)) if counts_MW.is_meta else min(window * window, present)
        buckets: tuple[tuple[int, int, bool], ...] = ((counts_MW.numel(), slots, True),)
        start_MW = torch.arange(counts_MW.numel(), device=device).view_as(counts_MW) * slots
    else:
        start_MW, buckets = _buckets(counts_MW, window)
    total = sum(windows * slots for windows, slots, _ in buckets)

    # Rank of a token within its window, from a stable sort by window.
    sorted_MN, order_MN = torch.sort(window_MN, dim=1, stable=True)
    before_MW = counts_MW.cumsum(dim=1) - counts_MW
    index_MN = torch.arange(present, device=device).expand(images, -1)
    rank_MN = torch.zeros_like(window_MN).scatter(1, order_MN, index_MN - before_MW.gather(1, sorted_MN))
    slot_MN = start_MW.gather(1, window_MN) + rank_MN

    token_F = torch.zeros(total, dtype=torch.int64, device=device)
    token_F = token_F.scatter(0, slot_MN.flatten(), torch.arange(images * present, device=device))
    # The first slot of a window counts as seen even if the window is empty: a row that sees nothing has NaN gradients.
    seen_F = torch.zeros(total, dtype=torch.bool, device=device)
    seen_F = seen_F.index_fill(0, slot_MN.flatten(), True).index_fill(0, start_MW.flatten(), True)
    return WindowLayout(token_F, seen_F, slot_MN, buckets)


def _buckets(counts_MW: Tensor, window: int) -> tuple[Tensor, tuple[tuple[int, int, bool], ...]]:
    """First slot of each window (0 for a window without tokens), and the buckets. Reads the counts: one wait."""
    counts_G = counts_MW.flatten().cpu()
    class_G = -(-counts_G * BUCKETS // (window * window))
    start_G, used, buckets = torch.zeros_like(counts_G), 0, []
    for size in torch.unique(class_G).tolist():
        if size == 0:
            continue
        members = (class_G == size).nonzero()[:, 0]
        slots, fewest = int(counts_G[members].max()), int(counts_G[members].min())
        start_G[members] = used + torch.arange(len(members)) * slots
        buckets.append((len(members), slots, fewest < slots))
        used += len(members) * slots
    return start_G.to(counts_MW.device).view_as(counts_MW), tuple(buckets)


def to_slots(tokens_MNx: Tensor, layout: WindowLayout) -> list[Tensor]:
    """(M, N, ...) -> for each bucket (g, n, ...). An empty slot repeats token 0: `seen_F` tells it apart."""
    slots_Fx = tokens_MNx.flatten(0, 1).index_select(0, layout.token_F)
    parts = slots_Fx.split([windows * slots for windows, slots, _ in layout.buckets])
    return [part.unflatten(0, bucket[:2]) for part, bucket in zip(parts, layout.buckets, strict=True)]


def from_slots(buckets_gnx: list[Tensor], layout: WindowLayout) -> Tensor:
    """The inverse: for each bucket (g, n, ...) -> (M, N, ...)."""
    slots_Fx = torch.cat([bucket_gnx.flatten(0, 1) for bucket_gnx in buckets_gnx])
    return slots_Fx.index_select(0, layout.slot_MN.flatten()).unflatten(0, layout.slot_MN.shape)


def pair_bias(row_term_BHQR: Tensor, column_term_BHQR: Tensor, rows_BK: Tensor, columns_BK: Tensor) -> Tensor:
    """What relative positions add for the pairs that are there: the term of the key's row plus that of its column.

    Returns (B, H, Q, K).
    """
    heads, queries = row_term_BHQR.shape[1:3]
    row_BHQK = rows_BK[:, None, None].expand(-1, heads, queries, -1)
    column_BHQK = columns_BK[:, None, None].expand(-1, heads, queries, -1)
    return row_term_BHQR.gather(3, row_BHQK) + column_term_BHQR.gather(3, column_BHQK)


def attend_in_windows(
    query_MNHd: Tensor,
    key_MNHd: Tensor,
    value_MNHd: Tensor,
    layout: WindowLayout,
    relative: Relative | None = None,
    sink: Sink | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention of each token to the tokens of its own window. (M, N, H * d). Scale: d ** -0.5."""
    query, key, value = (to_slots(x, layout) for x in (query_MNHd, key_MNHd, value_MNHd))
    seen = layout.seen_F.split([windows * slots for windows, slots, _ in layout.buckets])
    terms = None if relative is None else [to_slots(x, layout) for x in relative]
    logits = None if sink is None else to_slots(sink.logit_MNH, layout)
    attended = []
    for index, (windows, slots, has_empty) in enumerate(layout.buckets):
        query_gHnd, key_gHnd, value_gHnd = (x[index].transpose(1, 2) for x in (query, key, value))
        bias, mask = None, None
        if terms is not None:
            row_gnHR, column_gnHR, rows_gn, columns_gn = (x[index] for x in terms)
            bias = pair_bias(row_gnHR.transpose(1, 2), column_gnHR.transpose(1, 2), rows_gn, columns_gn)
        seen_g11n = seen[index].view(windows, 1, 1, slots) if has_empty else None
        if sink is not None and logits is not None:
            key_gHnd = _append(key_gHnd, sink.key_Hd)
            value_gHnd = _append(value_gHnd, sink.value_Hd)
            mask = _mask_with_sink(seen_g11n, bias, logits[index].transpose(1, 2)[..., None])
        else:
            mask = _mask(seen_g11n, bias)
        attended_gHnd = F.scaled_dot_product_attention(
            query_gHnd, key_gHnd, value_gHnd, attn_mask=mask, dropout_p=dropout
        )
        attended.append(attended_gHnd.transpose(1, 2))
    return from_slots(attended, layout).flatten(2)


def _append(keys_gHnd: Tensor, sink_Hd: Tensor) -> Tensor:
    return torch.cat([keys_gHnd, sink_Hd[:, None].expand(len(keys_gHnd), -1, -1, -1)], dim=2)


def _mask(seen_g11n: Tensor | None, bias_gHnn: Tensor | None) -> Tensor | None:
    if seen_g11n is None or bias_gHnn is None:
        return seen_g11n if bias_gHnn is None else bias_gHnn
    return bias_gHnn.masked_fill(~seen_g11n, blocked(bias_gHnn.dtype))


def _mask_with_sink(seen_g11n: Tensor | None, bias_gHnn: Tensor | None, logit_gHn1: Tensor) -> Tensor:
    """Additive mask over the window's tokens and the sink, the sink last: (g, H or 1, n, n + 1)."""
    slots = logit_gHn1.shape[2]
    if bias_gHnn is None:
        bias_gHnn = logit_gHn1.new_zeros(()).expand(*logit_gHn1.shape[:3], slots)
    if seen_g11n is not None:
        bias_gHnn = bias_gHnn.masked_fill(~seen_g11n, blocked(bias_gHnn.dtype))
    return torch.cat([bias_gHnn, logit_gHn1.expand(-1, bias_gHnn.shape[1], -1, -1)], dim=3)


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
