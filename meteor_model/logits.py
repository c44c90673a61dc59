"""From the LLM's hidden states to logits and loss: which columns are meant, also where stage 3 has dropped some.

Legend: B samples, T columns of this call, W kept columns of the longest sample, n columns that are asked for or
supervised tokens, C LLM width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from meteor_model.chat import IGNORE_INDEX
from meteor_model.decoder.cache import Decision

LogitsToKeep = int | torch.Tensor


def check_logits_to_keep(logits_to_keep: LogitsToKeep, length: int) -> None:
    """ValueError unless it is a count of the last columns (0: all) or columns, (n,) whole numbers in -T..T-1."""
    if isinstance(logits_to_keep, int) and not isinstance(logits_to_keep, bool) and logits_to_keep >= 0:
        return
    columns = logits_to_keep
    if not isinstance(columns, torch.Tensor) or columns.ndim != 1 or columns.is_floating_point():
        shown = f"{columns.dtype} {tuple(columns.shape)}" if isinstance(columns, torch.Tensor) else repr(columns)
        raise ValueError(
            f"logits_to_keep must be how many of the last columns (0: all), or a tensor (n,) of columns, got {shown}"
        )
    if columns.dtype == torch.bool:
        if len(columns) != length:
            raise ValueError(f"logits_to_keep is a mask of {len(columns)} columns, the call has {length}")
    elif columns.device.type == "cpu" and len(columns):  # (elsewhere the device says so itself)
        lowest, highest = int(columns.min()), int(columns.max())
        if lowest < -length or highest >= length:
            raise ValueError(f"logits_to_keep has columns {lowest}..{highest}, the call has 0..{length - 1}")


def logits_of(
    hidden_BTC: torch.Tensor, logits_to_keep: LogitsToKeep, head: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Logits (B, n, V) of a decoder that has dropped nothing."""
    rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep.to(hidden_BTC.device)
    return head(hidden_BTC[:, rows])


def logits_of_kept(
    hidden_BWC: torch.Tensor,
    decision: Decision,
    logits_to_keep: LogitsToKeep,
    head: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Logits (B, n, V) of the prompt's own columns after a prefill that has dropped some.

    Of all columns (0), those that were dropped are NaN; columns of padding are 0. The last column alone, what
    `generate` asks for, is never dropped, and nothing is read back for it.

    Raises:
        ValueError: naming the sample and its columns, where one that is asked for was dropped.
    """
    row_BT, attended_BT = decision.row_of_column(), decision.attended_BT
    if isinstance(logits_to_keep, int) and logits_to_keep == 0:
        logits_BWV = head(hidden_BWC)
        row_BT, attended_BT = row_BT.to(logits_BWV.device), attended_BT.to(logits_BWV.device)
        logits_BTV = logits_BWV.gather(1, row_BT.clamp(min=0)[..., None].expand(-1, -1, logits_BWV.shape[2]))
        filling_BT = torch.where(attended_BT, torch.nan, 0.0).to(logits_BTV.dtype)
        return torch.where((row_BT < 0)[..., None], filling_BT[..., None], logits_BTV)
    columns_T = torch.arange(row_BT.shape[1], device=row_BT.device)
    if isinstance(logits_to_keep, int):
        columns_n = columns_T[-logits_to_keep:]
    else:
        columns_n = columns_T[logits_to_keep.to(row_BT.device)]
    row_Bn = row_BT[:, columns_n]
    if len(columns_n) != 1 or not isinstance(logits_to_keep, int):
        _refuse_dropped((row_Bn < 0) & attended_BT[:, columns_n], columns_n)
    row_Bn = row_Bn.to(hidden_BWC.device)
    logits_BnV = head(hidden_BWC.gather(1, row_Bn.clamp(min=0)[..., None].expand(-1, -1, hidden_BWC.shape[2])))
    return logits_BnV.masked_fill((row_Bn < 0)[..., None].to(logits_BnV.device), 0.0)


def _refuse_dropped(dropped_Bn: torch.Tensor, columns_n: torch.Tensor) -> None:
    if dropped_Bn.is_meta or not bool(dropped_Bn.any()):
        return
    sample = int(dropped_Bn.any(dim=1).nonzero()[0])
    columns = columns_n[dropped_Bn[sample]].tolist()
    raise ValueError(
        f"logits_to_keep asks for columns {columns[:8]}{' ...' if len(columns) > 8 else ''} of sample {sample}, which "
        "stage 3 has dropped: they have no logits. Ask for other columns (decision.kept_index_BW of the cache lists "
        "those that are left), for all of them (0: dropped ones are NaN), or use a cache that does not prune"
    )


def token_loss(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, num_items_in_batch: torch.Tensor | float | None = None
) -> torch.Tensor:
    """Next-token cross entropy, summed over supervised tokens in fp32 and divided by `num_items_in_batch`.

    With None the divisor is this batch's own count of supervised tokens (at least 1): the mean. A distributed run
    passes global tokens / (world * accumulation), so that averaging gradients gives the mean over the global batch.
    """
    shifted_BT = labels_BT[:, 1:].to(logits_BTV.device)
    total = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), shifted_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    if num_items_in_batch is None:
        num_items_in_batch = (shifted_BT != IGNORE_INDEX).sum().clamp_min(1)
    return total / num_items_in_batch


def supervised_rows(
    hidden_BWC: torch.Tensor, labels_BT: torch.Tensor, decision: Decision | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states (n, C) that name a supervised token, and these tokens (n,).

    After a prefill that has dropped columns (`decision`), those of dropped ones are NaN and those of padding 0, as the
    logits of `logits_of_kept` are. How many there are is read back from the device.
    """
    shifted_BT = labels_BT[:, 1:].to(hidden_BWC.device)
    learned_BT = shifted_BT != IGNORE_INDEX
    if decision is None:
        return hidden_BWC[:, :-1][learned_BT], shifted_BT[learned_BT]
    row_n = decision.row_of_column()[:, :-1].to(hidden_BWC.device)[learned_BT]
    attended_n = decision.attended_BT[:, :-1].to(hidden_BWC.device)[learned_BT]
    filling_n = torch.where(attended_n, torch.nan, 0.0).to(hidden_BWC.dtype)
    hidden_nC = hidden_BWC[learned_BT.nonzero()[:, 0], row_n.clamp(min=0)]
    return torch.where((row_n < 0)[:, None], filling_n[:, None], hidden_nC), shifted_BT[learned_BT]
