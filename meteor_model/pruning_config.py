"""The three pruning stages as settings. Each checks itself; what they must have in common is MeteorConfig's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from meteor_model.checks import finite_number, from_mapping, refuse_unknown, switch, whole_number
from meteor_model.pruning import RANK_ESTIMATORS


@dataclass(frozen=True)
class EncodePruning:
    """Stage 1: how many tokens survive each boundary between segments, and how encoders share them."""

    enabled: bool = True
    """Prune inside the encoders."""
    totals: tuple[int, ...] = ()
    """Tokens that survive each boundary, summed over the encoders that are pruned there; one number a segment. The last
    may be larger than the one before by the tokens of convolutional encoders, which join there."""
    first_deep_segment: int = 2
    """First segment (counted from 1) whose boundary scores by attention; earlier ones by similarity to the mean."""
    rank_estimator: str = "effective"
    """How the rank of a feature map is measured: effective, energy or numerical."""
    rank_exponent: float = 1.0
    """Budgets go with rank ** exponent: 1 is the paper, 0 uniform, -1 inverse."""
    score_queries: int | None = 256
    """Evenly spaced query tokens from which an encoder without CLS counts the attention that a token receives, so that
    scoring is linear in the tokens; None takes every token."""

    def __post_init__(self) -> None:
        where = "pruning.encode"
        switch(f"{where}.enabled", self.enabled)
        if isinstance(self.totals, str) or not isinstance(self.totals, Iterable):
            raise ValueError(f"{where}.totals must be a list of whole numbers, one a segment, got {self.totals!r}")
        totals = tuple(whole_number(f"{where}.totals[{i}]", total) for i, total in enumerate(self.totals))
        object.__setattr__(self, "totals", totals)
        if self.enabled and not totals:
            raise ValueError(f"{where}.totals is empty: give the tokens to keep after each segment, or disable")
        if any(later > earlier for earlier, later in pairwise(totals[:-1])):  # the last one: MeteorConfig
            raise ValueError(
                f"{where}.totals must not grow from boundary to boundary, got {totals}; the last one may, by the "
                "tokens of convolutional encoders, which join there"
            )
        first, past = whole_number(f"{where}.first_deep_segment", self.first_deep_segment), len(totals) + 1
        if first < 1:
            raise ValueError(f"{where}.first_deep_segment counts from 1, got {first}")
        if totals and first > past:
            raise ValueError(
                f"{where}.first_deep_segment {first} is past the {len(totals)} segments of totals {totals}: "
                f"use 1..{past} ({past}: no boundary scores by attention)"
            )
        if self.score_queries is not None:
            whole_number(f"{where}.score_queries (or None)", self.score_queries, least=1)
        finite_number(f"{where}.rank_exponent", self.rank_exponent)
        if self.rank_estimator not in RANK_ESTIMATORS:
            known = ", ".join(sorted(RANK_ESTIMATORS))
            raise ValueError(f"{where}.rank_estimator {self.rank_estimator!r} is unknown; known: {known}")


@dataclass(frozen=True)
class FusePruning:
    """Stage 2: how many of the projected tokens of all encoders go on into the LLM."""

    enabled: bool = True
    """Prune the pooled tokens by mutual redundancy."""
    keep: int = 576
    """Visual tokens per image that enter the LLM."""

    def __post_init__(self) -> None:
        switch("pruning.fuse.enabled", self.enabled)
        whole_number("pruning.fuse.keep", self.keep, least=1)


@dataclass(frozen=True)
class DecodePruning:
    """Stage 3 (generation only): how many visual tokens stay after one early LLM layer, sample by sample."""

    enabled: bool = True
    """Prune in `generate`."""
    layer: int = 2
    """LLM layers that see every visual token; the scores are the attention of the last of them."""
    num_heads: int | None = None
    """Heads that count, those with the most attention on visual tokens; None is a quarter of the heads."""
    query: Literal["last", "all_text"] = "last"
    """Which text token asks: the last of the prompt, or the mean of all text tokens after the images."""
    target_mean: float | None = None
    """Mean number of visual tokens to keep; lambda is solved for it on calibration samples."""
    lam: float | None = None
    """Lambda: tokens kept per unit of visual attention. Solved from target_mean where that is given."""
    k_min: int = 1
    """Fewest visual tokens that a sample with images keeps."""

    def __post_init__(self) -> None:
        where = "pruning.decode"
        switch(f"{where}.enabled", self.enabled)
        whole_number(f"{where}.layer", self.layer, least=1)
        whole_number(f"{where}.k_min", self.k_min, least=1)
        if self.num_heads is not None:
            whole_number(f"{where}.num_heads", self.num_heads, least=1)
        if self.query not in ("last", "all_text"):
            raise ValueError(f"{where}.query must be 'last' or 'all_text', got {self.query!r}")
        if self.lam is not None and finite_number(f"{where}.lam", self.lam) <= 0:
            raise ValueError(f"{where}.lam must be positive, got {self.lam}")
        if self.target_mean is not None and finite_number(f"{where}.target_mean", self.target_mean) < self.k_min:
            raise ValueError(f"{where}.target_mean {self.target_mean} is below k_min {self.k_min}")


@dataclass(frozen=True)
class PruningConfig:
    """The three stages."""

    encode: EncodePruning = field(default_factory=EncodePruning)
    """Stage 1, inside the encoders."""
    fuse: FusePruning = field(default_factory=FusePruning)
    """Stage 2, between encoders and LLM."""
    decode: DecodePruning = field(default_factory=DecodePruning)
    """Stage 3, inside the LLM."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PruningConfig:
        """From config.json; unknown keys are errors that name themselves."""
        stages = {"encode": EncodePruning, "fuse": FusePruning, "decode": DecodePruning}
        refuse_unknown("pruning", data, stages)
        return cls(**{name: from_mapping(stages[name], f"pruning.{name}", value) for name, value in data.items()})
