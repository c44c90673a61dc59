"""A prompt as stage 3 reads it: its masks checked, who asks in it, and where its tokens stand.

Shape legend: B samples, T tokens of the whole prompt, Q new tokens of one call, L all tokens so far, R rows that ask,
C language model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from meteor_model.pruners.select import gather_tokens

#: Who asks: see `DecodePruning.query`.
Query = Literal["last", "all_text", "answer"]


@dataclass(frozen=True)
class Prompt:
    """A prompt and who asks in it: rows `asking_BR`, where `asks_BR` says that they are not mere filling.

    Its columns are those of the prompt, or those that the prunings so far have left (`shortened`): then `index_BT` says
    which columns of the `whole` prompt they are, and `places_BT` where they stood among its tokens, for sliding windows
    (None: where they stand). `reply_BT` are the columns from the first reply on, where these come along in training.
    """

    embeds_BTC: Tensor
    position_ids_BT: Tensor
    attended_BT: Tensor
    visual_BT: Tensor
    asking_BR: Tensor
    asks_BR: Tensor
    padded: bool
    places_BT: Tensor | None = None
    whole: Prompt | None = None
    index_BT: Tensor | None = None
    reply_BT: Tensor | None = None

    @property
    def seen_BT(self) -> Tensor | None:
        """Which columns hold a token, for masks; None where none is padding."""
        return self.attended_BT if self.padded else None

    def shortened(self, hidden_BWC: Tensor, order_BW: Tensor, mask_BW: Tensor, padded: bool) -> Prompt:
        """What is left of it: columns `order_BW`, of which `mask_BW` hold a token. All that ask are among them."""
        asks_BT = torch.zeros_like(self.attended_BT).scatter(1, self.asking_BR, self.asks_BR)
        asks_BW = gather_tokens(asks_BT, order_BW) & mask_BW
        asking_BR = torch.sort(asks_BW.to(torch.uint8), dim=1, stable=True).indices[:, -self.asking_BR.shape[1] :]
        places_BT, index_BT = self.places_BT, self.index_BT
        return Prompt(
            hidden_BWC,
            gather_tokens(self.position_ids_BT, order_BW),
            mask_BW,
            gather_tokens(self.visual_BT, order_BW) & mask_BW,
            asking_BR,
            gather_tokens(asks_BW, asking_BR),
            padded,
            None if places_BT is None else gather_tokens(places_BT.expand(len(order_BW), -1), order_BW),
            self.whole or self,
            order_BW if index_BT is None else gather_tokens(index_BT, order_BW),
            None if self.reply_BT is None else gather_tokens(self.reply_BT, order_BW),
        )

    @property
    def last_B1(self) -> Tensor:
        """The column of the last token that belongs to the question, int64 (B, 1)."""
        return _last_column(self.attended_BT, self.reply_BT)


def read_prompt(
    embeds_BTC: Tensor,
    attention_mask_BT: Tensor | None,
    position_ids_BT: Tensor | None,
    visual_mask_BT: Tensor | None,
    query: Query,
    answer_tokens: int = 0,
    reply_BT: Tensor | None = None,
) -> Prompt:
    """A prompt's masks, checked. Values are read back once, and not at all where nothing needs them.

    With `answer_tokens` its last so many columns are an answer's, and ask; without them a query of the answer is the
    prompt's last token. What is `reply_BT`, bool, and all behind it neither asks nor is visual.
    """
    shape, device = embeds_BTC.shape[:2], embeds_BTC.device
    check_not_empty(embeds_BTC)
    visual_BT = torch.zeros(shape, dtype=torch.bool, device=device)
    if visual_mask_BT is not None:
        if visual_mask_BT.shape != shape:
            raise ValueError(f"the visual mask is {tuple(visual_mask_BT.shape)}, the tokens are {tuple(shape)}")
        visual_BT = visual_mask_BT.to(device=device, dtype=torch.bool)
    attended_BT = torch.ones(shape, dtype=torch.bool, device=device)
    if attention_mask_BT is not None:
        check_mask(embeds_BTC, attention_mask_BT, 0)
        attended_BT = attention_mask_BT.to(device=device, dtype=torch.bool)
        visual_BT = visual_BT & attended_BT
    columns_T = torch.arange(shape[1], device=device)
    if reply_BT is not None:
        reply_BT = reply_BT.to(device)
        visual_BT = visual_BT & ~reply_BT
    asks_BT = columns_T == _last_column(attended_BT, reply_BT)
    if query == "all_text":
        # Text before the image sees no visual token: it would only dilute the mean. Without text after it, the last
        # token asks: nobody asking would read as nobody looking.
        after_BT = attended_BT & ~visual_BT & (visual_BT.cumsum(dim=1) > 0)
        if reply_BT is not None:
            after_BT = after_BT & ~reply_BT
        asks_BT = after_BT | (asks_BT & ~after_BT.any(dim=1, keepdim=True))
    if answer_tokens:
        answer_BT = attended_BT & (columns_T >= shape[1] - answer_tokens)
        asks_BT = answer_BT | (asks_BT & ~answer_BT.any(dim=1, keepdim=True))

    num_empty = num_padded = 0
    rows = 1
    if attention_mask_BT is not None or query == "all_text" or answer_tokens:
        found = torch.stack([(~attended_BT.any(dim=1)).sum(), (~attended_BT).sum(), asks_BT.sum(dim=1).max()])
        # On the meta device there are shapes only: the most rows that can ask.
        num_empty, num_padded, rows = (0, 0, shape[1]) if found.is_meta else found.tolist()
    if num_empty:
        empty = (~attended_BT.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"samples {empty} of the batch are all padding: a prompt needs at least one token")
    asking_BR = torch.sort(asks_BT.to(torch.uint8), dim=1, stable=True).indices[:, -max(rows, 1) :]
    return Prompt(
        embeds_BTC,
        positions(embeds_BTC, position_ids_BT, 0),
        attended_BT,
        visual_BT,
        asking_BR,
        gather_tokens(asks_BT, asking_BR),
        num_padded > 0,
        reply_BT=reply_BT,
    )


def _last_column(attended_BT: Tensor, reply_BT: Tensor | None) -> Tensor:
    """The last attended column, int64 (B, 1), before a reply where there is something before it."""
    columns_T = torch.arange(attended_BT.shape[1], device=attended_BT.device)
    asked_BT = attended_BT
    if reply_BT is not None:
        before_BT = attended_BT & ~reply_BT
        asked_BT = torch.where(before_BT.any(dim=1, keepdim=True), before_BT, attended_BT)
    return torch.where(asked_BT, columns_T, 0).amax(dim=1, keepdim=True)


def places(seen_BL: Tensor | None, length: int, like: Tensor) -> Tensor:
    """Place of each column among its sample's tokens, int64 (B or 1, L): what a window's width is counted in."""
    if seen_BL is None:
        return torch.arange(length, device=like.device)[None]
    return seen_BL.cumsum(dim=1) - 1


def check_not_empty(embeds_BTC: Tensor) -> None:
    """There is a sample, and it has a token. Raises ValueError."""
    if 0 in embeds_BTC.shape[:2]:
        samples, tokens = embeds_BTC.shape[:2]
        raise ValueError(f"{samples} samples of {tokens} tokens: a prompt needs at least one token")


def check_mask(embeds_BQC: Tensor, attention_mask_BL: Tensor, past_length: int) -> None:
    """A mask covers the cached tokens and the new ones. Raises ValueError, naming both shapes."""
    shape = (embeds_BQC.shape[0], past_length + embeds_BQC.shape[1])
    if tuple(attention_mask_BL.shape) != shape:
        raise ValueError(
            f"the attention mask is {tuple(attention_mask_BL.shape)}, but the cache's {past_length} tokens and the "
            f"{embeds_BQC.shape[1]} new ones of {shape[0]} samples need {shape}"
        )


def positions(embeds_BQC: Tensor, position_ids_BQ: Tensor | None, past_length: int) -> Tensor:
    """Positions (B, Q); by default counted up from the length of the cache, as the decoders do themselves."""
    if position_ids_BQ is None:
        position_ids_BQ = torch.arange(embeds_BQC.shape[1], device=embeds_BQC.device)[None] + past_length
    return position_ids_BQ.expand(embeds_BQC.shape[0], -1)
