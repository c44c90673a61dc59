"""The three pruning stages as settings. Each checks itself; what they must have in common is MeteorConfig's.

Which rule a stage follows is a name in its registry (`meteor_model.pruners`); the defaults are METEOR's. What a stored
configuration does not name is at its default, which is what the version that wrote it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from meteor_model.checks import finite_number, from_mapping, refuse_unknown, switch, whole_number
from meteor_model.pruners.builtin import (
    DECODE_BUDGETS,
    DECODE_CRITERIA,
    ENCODE_BUDGETS,
    ENCODE_CRITERIA,
    FUSE_CRITERIA,
)
from meteor_model.pruners.decode_criteria import DecodeBudget
from meteor_model.pruners.spectra import RANK_ESTIMATORS


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
    criterion: str = "meteor"
    """Which tokens stay at a boundary: a name of meteor_model.pruners.encode_criteria."""
    budget: str = "rank"
    """How encoders share the totals: rank (to the power rank_exponent), tokens (likewise), or rank_usefulness (rank to
    that power times usefulness)."""
    options: dict[str, float] = field(default_factory=dict)
    """Numbers of the criterion, by name."""
    usefulness: dict[str, float] = field(default_factory=dict)
    """Usefulness of encoders by name, for budget rank_usefulness: (accuracy of all - accuracy without it) / accuracy of
    all, as `calibrate --masking` measures it. An encoder of 0 or less is not run; one that is not named has 1."""
    masked: tuple[str, ...] = ()
    """Encoders that are not run, whatever the budgets; the others keep theirs. What masking is measured by."""

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
            names = ", ".join(sorted(RANK_ESTIMATORS))
            raise ValueError(f"{where}.rank_estimator {self.rank_estimator!r} is unknown; known: {names}")
        self._check_sharing(where)
        options = ENCODE_CRITERIA[self.criterion].checked(f"{where}.options", self.options)
        object.__setattr__(self, "options", options)

    def _check_sharing(self, where: str) -> None:
        useful = ENCODE_BUDGETS[self.budget].facts["usefulness"]
        if not isinstance(self.usefulness, Mapping):
            raise ValueError(f"{where}.usefulness must map encoders' names to numbers, got {self.usefulness!r}")
        known = {name: finite_number(f"{where}.usefulness.{name}", value) for name, value in self.usefulness.items()}
        object.__setattr__(self, "usefulness", known)
        if self.enabled and known and not useful:
            raise ValueError(
                f"{where}.usefulness is given and {where}.budget {self.budget!r} does not look at it: set the budget "
                "to 'rank_usefulness'"
            )
        if isinstance(self.masked, str) or not isinstance(self.masked, Iterable):
            raise ValueError(f"{where}.masked must be a list of encoders' names, got {self.masked!r}")
        object.__setattr__(self, "masked", tuple(self.masked))


MERGES, POSITIONS = ("none", "nearest"), ("original", "renumbered")


@dataclass(frozen=True)
class FusePruning:
    """Stage 2: how many of the projected tokens of all encoders go on into the LLM."""

    enabled: bool = True
    """Prune the pooled tokens."""
    keep: int = 576
    """Visual tokens per image that enter the LLM."""
    criterion: str = "mutual_redundancy"
    """Which of the projected tokens stay: a name of meteor_model.pruners.fuse_criteria."""
    options: dict[str, float] = field(default_factory=dict)
    """Numbers of the criterion, by name."""
    floor: float = 0.0
    """Share of keep, 0 to 1, that is set aside for every encoder in proportion to its tokens, at least one each, so
    that none is run and then dropped whole. 0 sets nothing aside."""
    merge: Literal["none", "nearest"] = "none"
    """What becomes of dropped tokens: nothing, or each is averaged into the kept token most similar to it."""
    positions: Literal["original", "renumbered"] = "renumbered"
    """Positions of an image's tokens in the LLM: one after another, or those that they would have if stages 1 and 2 had
    dropped none, with the text behind the image as far on."""

    def __post_init__(self) -> None:
        switch("pruning.fuse.enabled", self.enabled)
        whole_number("pruning.fuse.keep", self.keep, least=1)
        options = FUSE_CRITERIA[self.criterion].checked("pruning.fuse.options", self.options)
        object.__setattr__(self, "options", options)
        if not 0 <= finite_number("pruning.fuse.floor", self.floor) <= 1:
            raise ValueError(f"pruning.fuse.floor must be between 0 and 1, got {self.floor}")
        for name, known in (("merge", MERGES), ("positions", POSITIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"pruning.fuse.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if FUSE_CRITERIA[self.criterion].facts["merge"] is not None and (self.floor or self.merge != "none"):
            raise ValueError(
                f"pruning.fuse.criterion {self.criterion!r} merges by a rule of its own: set pruning.fuse.merge to "
                "'none' and pruning.fuse.floor to 0, or choose another criterion"
            )

    @property
    def looks(self) -> tuple[float, ...]:
        """The blocks of the towers whose attention is wanted; none where nothing is pruned here."""
        looks: tuple[float, ...] = FUSE_CRITERIA[self.criterion].facts["looks"] if self.enabled else ()
        return looks

    @property
    def wants_text(self) -> bool:
        """Whether the criterion looks at the text of the prompt."""
        wants: bool = FUSE_CRITERIA[self.criterion].facts["text"]
        return wants


class PlannedCut(NamedTuple):
    """One pruning of stage 3.

    Attributes:
        layer: layers that run before it.
        keep: visual tokens an image that the settings ask for; None where they ask for none.
        budget: gives each sample its number.
    """

    layer: int
    keep: float | None
    budget: DecodeBudget


QUERIES, LATER_TURNS = ("last", "all_text", "answer"), ("kept", "anew", "union")


@dataclass(frozen=True)
class DecodePruning:
    """Stage 3 (generation only): how many visual tokens stay after one early LLM layer, sample by sample."""

    enabled: bool = True
    """Prune in `generate`."""
    layer: int = 2
    """LLM layers that see every visual token; the scores are the attention of the last of them."""
    num_heads: int | None = None
    """Heads that count, those with the most attention on visual tokens; None is a quarter of the heads."""
    query: Literal["last", "all_text", "answer"] = "last"
    """Which text token asks: the last one, the mean of all text tokens after the images, or the mean of the first
    answer_tokens of the answer. Until those are there every visual token stays."""
    target_mean: float | None = None
    """Mean number of visual tokens to keep; lambda is solved for it on calibration samples. With a budget that needs no
    lambda: what every image keeps."""
    lam: float | None = None
    """Lambda: tokens kept per unit of visual attention. Solved from target_mean where that is given."""
    k_min: int = 1
    """Fewest visual tokens that a sample with images keeps."""
    criterion: str = "top_heads"
    """Which visual tokens stay: a name of meteor_model.pruners.decode_criteria."""
    budget: str = "attention_mass"
    """How many of each sample: attention_mass (lambda), fixed (target_mean an image) or another name of
    meteor_model.pruners.decode_criteria."""
    options: dict[str, float] = field(default_factory=dict)
    """Numbers of the criterion and of the budget, by name."""
    later_layers: tuple[int, ...] = ()
    """Further layers after which the criterion prunes again."""
    later_keep: tuple[int, ...] = ()
    """Visual tokens an image kept after each of later_layers."""
    equal_layers: bool = False
    """Drop from the cache of the layers below, too, so that all layers hold equally many tokens."""
    answer_tokens: int = 4
    """Tokens of the answer that ask where query is answer."""
    reselect_every: int = 0
    """Choose anew from all visual tokens each time the answer has grown by so many tokens: dropped ones wait below the
    layer, and the layers above run again on what is kept. 0 chooses once."""
    train: bool = False
    """Prune in training and held-out losses too: each sample as its first question would, so that the layers above
    learn from what they will see."""
    positions: Literal["original", "renumbered"] = "original"
    """Positions above the layer: those that the tokens had, or counted anew over what is kept."""
    later_turn: Literal["kept", "anew", "union"] = "kept"
    """What a later turn of a conversation sees: what the first one kept, what it chooses anew from all visual tokens,
    or the union of that and of what earlier turns chose."""

    def __post_init__(self) -> None:
        where = "pruning.decode"
        switch(f"{where}.enabled", self.enabled)
        whole_number(f"{where}.layer", self.layer, least=1)
        whole_number(f"{where}.k_min", self.k_min, least=1)
        if self.num_heads is not None:
            whole_number(f"{where}.num_heads", self.num_heads, least=1)
        for name, known in (("query", QUERIES), ("later_turn", LATER_TURNS), ("positions", POSITIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{where}.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        whole_number(f"{where}.answer_tokens", self.answer_tokens, least=1)
        whole_number(f"{where}.reselect_every", self.reselect_every, least=0)
        if self.lam is not None and finite_number(f"{where}.lam", self.lam) <= 0:
            raise ValueError(f"{where}.lam must be positive, got {self.lam}")
        if self.target_mean is not None and finite_number(f"{where}.target_mean", self.target_mean) < self.k_min:
            raise ValueError(f"{where}.target_mean {self.target_mean} is below k_min {self.k_min}")
        criterion, budget = DECODE_CRITERIA[self.criterion], DECODE_BUDGETS[self.budget]
        of_budget = {name: value for name, value in dict(self.options).items() if name in budget.defaults}
        of_criterion = {name: value for name, value in dict(self.options).items() if name not in of_budget}
        options = criterion.checked(f"{where}.options", of_criterion)
        object.__setattr__(self, "options", options | budget.checked(f"{where}.options", of_budget))
        if self.enabled and budget.facts["keep"] and self.target_mean is None:
            raise ValueError(
                f"{where}.budget {self.budget!r} needs {where}.target_mean, the tokens that an image keeps"
            )
        self._check_later(where)
        self._check_anew(where)

    def _check_anew(self, where: str) -> None:
        switch(f"{where}.train", self.train)
        if self.train and self.selects_later:
            raise ValueError(
                f"{where}.train chooses once a sample, by its first question: it goes with query 'last' or 'all_text', "
                "reselect_every 0 and later_turn 'kept'"
            )
        if self.equal_layers and self.selects_later:
            raise ValueError(
                f"{where}.equal_layers drops tokens everywhere, so none waits to be chosen later: it goes with query "
                "'last' or 'all_text', reselect_every 0 and later_turn 'kept'"
            )
        if self.enabled and self.query == "answer" and self.needs_lambda:
            raise ValueError(
                f"{where}.query 'answer' does not go with budget {self.budget!r}, whose lambda is solved on prompts, "
                f"which have no answer yet: set {where}.budget to 'fixed' and {where}.target_mean"
            )
        if self.reselect_every and self.later_turn == "union":
            raise ValueError(
                f"{where}.reselect_every chooses anew within an answer, and later_turn 'union' would keep all of it: "
                "set later_turn to 'kept' or 'anew', or reselect_every to 0"
            )

    def _check_later(self, where: str) -> None:
        switch(f"{where}.equal_layers", self.equal_layers)
        for name in ("later_layers", "later_keep"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Iterable):
                raise ValueError(f"{where}.{name} must be a list of whole numbers, got {values!r}")
            whole = tuple(whole_number(f"{where}.{name}[{i}]", value, least=1) for i, value in enumerate(values))
            object.__setattr__(self, name, whole)
        if len(self.later_layers) != len(self.later_keep):
            raise ValueError(
                f"{where}.later_layers has {len(self.later_layers)} entries and {where}.later_keep "
                f"{len(self.later_keep)}: give one number of tokens a layer"
            )
        layers = (self.layer, *self.later_layers)
        if any(later <= earlier for earlier, later in pairwise(layers)):
            raise ValueError(f"{where}.later_layers must grow from {where}.layer on, got {layers}")
        if any(later > earlier for earlier, later in pairwise(self.later_keep)):
            raise ValueError(f"{where}.later_keep must not grow, got {self.later_keep}")
        if self.equal_layers and self.later_layers:
            raise ValueError(f"{where}.equal_layers goes with one pruning: set {where}.later_layers to none")

    @property
    def selects_later(self) -> bool:
        """Whether visual tokens may be chosen after prefill, so that all of them have to wait."""
        return self.query == "answer" or self.reselect_every > 0 or self.later_turn != "kept"

    @property
    def needs_lambda(self) -> bool:
        """Whether the budget needs lambda, which is solved for the target mean."""
        needs: bool = DECODE_BUDGETS[self.budget].facts["lam"]
        return needs

    @property
    def acts(self) -> bool:
        """Whether `generate` prunes: it is enabled, and lambda is known where it is needed."""
        return self.enabled and (self.lam is not None or not self.needs_lambda)

    def scorer(self) -> Callable[..., Any]:
        """The criterion with its options: given a layer's view, the scores."""
        return partial(DECODE_CRITERIA[self.criterion].run, **self._options_of_criterion())

    def selector(self) -> Callable[..., Any] | None:
        """The criterion's own way of taking tokens by their scores; None takes the best."""
        select = DECODE_CRITERIA[self.criterion].facts["select"]
        return None if select is None else partial(select, **self._options_of_criterion())

    @property
    def wants_grid(self) -> bool:
        """Whether the criterion looks at the rows and columns of visual tokens."""
        wants: bool = DECODE_CRITERIA[self.criterion].facts["grid"]
        return wants

    def _options_of_criterion(self) -> dict[str, float]:
        known = DECODE_CRITERIA[self.criterion].defaults
        return {name: value for name, value in self.options.items() if name in known}

    def cuts(self) -> list[PlannedCut]:
        """Its prunings, from the lowest layer on; later ones keep a fixed number, unless the budget is for all."""
        budget = DECODE_BUDGETS[self.budget]
        options: dict[str, Any] = {name: value for name, value in self.options.items() if name in budget.defaults}
        if budget.facts["through"]:
            plan: list[tuple[int, float | None]] = [
                (self.layer, self.target_mean),
                *zip(self.later_layers, self.later_keep, strict=True),
            ]
            run = partial(budget.run, plan=plan, memo={}, **options)  # one memo a prefill: cuts() is asked for each
            return [PlannedCut(layer, None if keep is None else float(keep), run) for layer, keep in plan]
        first = PlannedCut(self.layer, self.target_mean, partial(budget.run, **options))
        later = zip(self.later_layers, self.later_keep, strict=True)
        return [first, *(PlannedCut(layer, float(keep), DECODE_BUDGETS["fixed"].run) for layer, keep in later)]


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

    def as_stored(self) -> dict[str, dict[str, Any]]:
        """As nested plain values, without what is at a default that came after configurations were stored."""
        stages = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: _as_stored(stage) for name, stage in stages.items()}


#: Settings that came after configurations, runs and sweeps were stored: at their defaults they are left out of what
#: identifies one, so that what is stored is found again.
LATER_SETTINGS = (
    *("criterion", "budget", "options", "later_layers", "later_keep", "equal_layers"),
    *("usefulness", "masked", "train"),
    *("answer_tokens", "reselect_every", "later_turn", "floor", "merge", "positions"),
)


def _as_stored(stage: Any) -> dict[str, Any]:
    plain = asdict(stage)
    defaults = asdict(type(stage)(enabled=False))
    return {name: value for name, value in plain.items() if name not in LATER_SETTINGS or value != defaults[name]}
