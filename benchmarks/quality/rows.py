"""Which pruners are compared, at how many tokens, and at which equal cost: the rows of the table.

Trivial rows come first; what does not beat them does not prune well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from meteor_model.configuration_meteor import DecodePruning, MeteorConfig, PruningConfig
from meteor_model.pruners.cost import MEASURES, solve_pruner
from meteor_model.pruners.counts import solve_lambda
from meteor_model.pruners.named import numbers_of, unpruned, with_pruner

Masses = Callable[[MeteorConfig], tuple[torch.Tensor, torch.Tensor]]
"""Attention mass on visual tokens (B,) and their number (B,) of validation prompts under a configuration."""
STAGE_3 = "meteor_stage_3"
TRAINED = "trained "
"""Before the name of the pruner that a model was trained with."""
TRIVIAL = ("random", "stride", "average_pooling", "smaller_image", "random_in_llm")
INSIDE = ("fastv", "pyramiddrop", "sparsevlm", "feather", "dart", "ivc_prune")
BEFORE = ("divprune", "cdpruner", "visionzip", "scope", "otprune", "svd_prune", "vispruner")
EQUAL_COST = ("random", "average_pooling", "pyramiddrop", "sparsevlm", "divprune", "cdpruner")
"""Compared at equal TFLOPs, too; every solution takes some counts of a whole model."""
LAYER = 2
"""Published rules name layer 2 of 32, which scales to layer 1 of 8; they are also given their number as it is."""


@dataclass(frozen=True)
class Row:
    """A pruner with its number.

    Attributes:
        pruner: its name, or STAGE_3; after TRAINED where the model was trained with it.
        keep: visual tokens an image at the end; a mean for stage 3.
        config: the model's under it.
        settings: the pruner's own.
        equal: "tokens" or "tflops", what it is equal in to the others of its budget.
        budget: the number that it belongs to.
    """

    pruner: str
    keep: int
    config: MeteorConfig
    settings: dict[str, Any] = field(default_factory=dict)
    equal: str = "tokens"
    budget: int = 0

    @property
    def name(self) -> str:
        """As `fastv(layer=2)@34`."""
        shown = ",".join(f"{key}={value}" for key, value in self.settings.items())
        mark = "=" if self.equal == "tflops" else "@"
        return f"{self.pruner}{f'({shown})' if shown else ''}{mark}{self.keep}"

    def costs(self) -> dict[str, float]:
        """Tokens and TFLOPs by every measure of `meteor_model.pruners.cost`."""
        return {name: round(measure(self.config), 6) for name, measure in MEASURES.items()}


def rows_of(config: MeteorConfig, tokens: Sequence[int], masses: Masses, only: Sequence[str] = ()) -> Iterator[Row]:
    """All rows of a dense model at equal tokens, the worthiest first: the dense one, then budget by budget.

    Args:
        config: of the model.
        tokens: budgets, beside all tokens.
        masses: for lambda of stage 3.
        only: names of pruners; all by default. The dense row always comes.
    """
    dense = unpruned(config)
    whole = dense.tokens_per_image
    yield Row("none", whole, dense, budget=whole)
    for keep in tokens:
        for name in (*TRIVIAL, *INSIDE, *BEFORE):
            if only and name not in only:
                continue
            yield _smaller(dense, keep) if name == "smaller_image" else _named(dense, name, keep)
            if name in ("fastv", "random_in_llm"):
                yield _named(dense, name, keep, layer=LAYER)
        if not only or STAGE_3 in only:
            yield stage_3(dense, keep, masses)


def equal_cost_rows(config: MeteorConfig, keep: int, only: Sequence[str] = ()) -> Iterator[Row]:
    """Rows that cost as many TFLOPs as FastV after layer LAYER with `keep` tokens; those that cannot are left out."""
    dense = unpruned(config)
    target = MEASURES["tflops"](with_pruner(dense, "fastv", keep, layer=LAYER))
    for name in EQUAL_COST:
        if only and name not in only:
            continue
        try:
            solved = solve_pruner(dense, name, "tflops", target)
        except ValueError:  # out of its reach
            continue
        yield Row(name, solved.keep, solved.config, {}, "tflops", keep)


def trained_rows(config: MeteorConfig, pruner: str, tokens: Sequence[int], masses: Masses) -> Iterator[Row]:
    """Rows of a model that was trained with pruning on: as it is, and METEOR with its stage 3 behind the other two.

    Args:
        config: of the model.
        pruner: that it was trained with; "meteor" is stages 1 and 2.
        tokens: budgets of the other rows; it belongs to the nearest, and stage 3 goes down to the smaller ones.
        masses: for lambda of stage 3.
    """
    keep = config.tokens_per_image
    yield Row(TRAINED + pruner, keep, config, budget=min(tokens, key=lambda budget: abs(budget - keep)))
    if pruner == "meteor":
        for budget in sorted(tokens, reverse=True):
            if budget < keep:
                yield replace(stage_3(config, budget, masses), pruner=f"{TRAINED}{pruner}, stage 3")


def stage_3(dense: MeteorConfig, keep: int, masses: Masses, layer: int = LAYER) -> Row:
    """METEOR's stage 3 alone, with the lambda that keeps `keep` tokens on average of the validation prompts."""

    def with_lambda(lam: float) -> MeteorConfig:
        decode = DecodePruning(layer=layer, target_mean=float(keep), lam=lam)
        return dense.with_pruning(PruningConfig(dense.pruning.encode, dense.pruning.fuse, decode))

    mass_B, number_B = masses(with_lambda(1.0))
    lam = solve_lambda(mass_B, number_B, float(keep), 1)
    return Row(STAGE_3, keep, with_lambda(lam), {"layer": layer}, budget=keep)


def _named(dense: MeteorConfig, name: str, keep: int, **settings: Any) -> Row:
    return Row(name, keep, with_pruner(dense, name, keep, **settings), settings, budget=keep)


def _smaller(dense: MeteorConfig, keep: int) -> Row:
    """The smaller image with the fewest tokens that are not below `keep`: it is never given less than the others."""
    number = min(number for number in numbers_of(dense, "smaller_image") if number >= keep)
    return Row("smaller_image", number, with_pruner(dense, "smaller_image", number), budget=keep)
