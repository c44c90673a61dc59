"""What waits below the first cut of stage 3, so that the upper layers can be run anew on other tokens.

Shape legend: B samples, Q new tokens of one call, L all tokens so far, C language model width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

#: What a pass over new tokens does to the choice: nothing; everything stays until the answer asks; it is chosen anew.
Due = Literal["", "keep", "choose"]


@dataclass(frozen=True)
class Waiting:
    """Every token so far, as the layers below the first cut have left it; dropped ones wait here, too.

    Attributes:
        embeds_BLC: what the first layer was given.
        asked_BLC: what the layer that is asked was given.
        hidden_BLC: what it gave.
        position_ids_BL: original positions.
    """

    embeds_BLC: Tensor
    asked_BLC: Tensor
    hidden_BLC: Tensor
    position_ids_BL: Tensor

    def grown(self, new: Waiting) -> Waiting:
        """With the tokens of one more call behind."""
        mine, others = self._parts(), new._parts()
        return Waiting(*(torch.cat(pair, dim=1) for pair in zip(mine, others, strict=True)))

    def rows(self, rows: Tensor) -> Waiting:
        """These rows of the batch, in this order."""
        return Waiting(*(part[rows.to(part.device)] for part in self._parts()))

    def without_last(self, tokens: int) -> Waiting:
        """Without the last so many tokens."""
        return Waiting(*(part[:, : part.shape[1] - tokens] for part in self._parts()))

    def _parts(self) -> list[Tensor]:
        return [getattr(self, item.name) for item in fields(self)]
