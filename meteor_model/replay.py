"""A pass whose choices of tokens are given: what another computation of the same weights is compared by.

Which token stays depends on scores that may lie close together. Another kernel, another order of summation or another
device rounds them differently, so in bf16 other tokens win, and from there on two passes of the same weights compute
different things. Given the tokens that the first pass kept, the second one computes what the first did up to rounding;
what it would have kept itself is counted beside it.

Legend: M images, N tokens at a boundary, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from meteor_model.outputs import PruningStats
from meteor_model.pruners.select import top_indices


class Choose(Protocol):
    """Decides at a boundary: scores (M, N) and positions (M, N) of its tokens -> indices (M, K) of those that stay."""

    def __call__(self, boundary: int, scores_MN: Tensor, positions_MN: Tensor, budget: int) -> Tensor:
        """`boundary` counts from 0; `positions_MN` are ascending."""


def best_scored(boundary: int, scores_MN: Tensor, positions_MN: Tensor, budget: int) -> Tensor:
    """The `budget` largest scores."""
    return top_indices(scores_MN, budget)


@dataclass
class _Given:
    """A `Choose` that takes given positions, and counts how many of them the scores would have taken."""

    positions: tuple[Tensor, ...]
    replay: GivenTokens
    where: str

    def __call__(self, boundary: int, scores_MN: Tensor, positions_MN: Tensor, budget: int) -> Tensor:
        given_MK = self._checked(boundary, len(scores_MN), budget).to(positions_MN.device)
        index_MK = torch.searchsorted(positions_MN.contiguous(), given_MK.contiguous())
        index_MK = index_MK.clamp(max=positions_MN.shape[1] - 1)
        if not torch.equal(positions_MN.gather(1, index_MK), given_MK):
            raise ValueError(f"{self.where}, boundary {boundary + 1}: a token is given that was dropped before it")
        given_MN = torch.zeros_like(positions_MN, dtype=torch.bool).scatter_(1, index_MK, True)
        own_MK = top_indices(scores_MN, budget)
        self.replay.taken += int(given_MN.gather(1, own_MK).sum())
        self.replay.tokens += own_MK.numel()
        return index_MK

    def _checked(self, boundary: int, images: int, budget: int) -> Tensor:
        if boundary >= len(self.positions):
            raise ValueError(f"{self.where}: tokens of {len(self.positions)} boundaries are given, it has more")
        given_MK = self.positions[boundary]
        if given_MK.shape != (images, budget):
            raise ValueError(
                f"{self.where}, boundary {boundary + 1}: {tuple(given_MK.shape)} (images, tokens) are given, the model "
                f"keeps {(images, budget)}"
            )
        return given_MK


@dataclass
class GivenTokens:
    """The tokens that stages 1 and 2 of a pass are to keep.

    Attributes:
        encode: for each encoder, positions (M, K_b) in its full grid at every boundary (`PruningStats.encode`).
        fuse: indices (M, K) into the pool of all encoders' tokens (`PruningStats.fuse`).
        tokens: chosen at boundaries so far, in a pass that was given these.
        taken: of those, how many the pass's own scores would have kept.
    """

    encode: Mapping[str, tuple[Tensor, ...]]
    fuse: Tensor
    tokens: int = 0
    taken: int = 0

    @classmethod
    def of(cls, stats: PruningStats) -> GivenTokens:
        """Those that another pass kept."""
        return cls(stats.encode, stats.fuse)

    @property
    def agreement(self) -> float:
        """Share of the given tokens that the scores would have kept, too; 1 where nothing was to choose."""
        return self.taken / self.tokens if self.tokens else 1.0

    def of_encoder(self, name: str) -> Choose:
        """What decides at the boundaries of an encoder. Raises ValueError for one that none is given of."""
        if name not in self.encode:
            raise ValueError(f"no tokens of encoder {name!r} are given, only of {', '.join(sorted(self.encode))}")
        return _Given(self.encode[name], self, f"encoder {name!r}")

    def of_fusion(self) -> Choose:
        """What decides at fusion."""
        return _Given((self.fuse,), self, "fusion")
