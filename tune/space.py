"""What a sweep chooses from: a map from free choices to valid configurations of one model.

A choice is a share of what is there, not a number of tokens, so that every choice gives a configuration that
`MeteorConfig` accepts, whatever the towers:

1. encode  each boundary keeps a share of what the boundary before it kept; ranks by one of the measured estimators, to
           some power
2. fuse    a share of the tokens that leave the encoders
3. decode  on or off; where on, its layer, heads and query, and a share of what enters the LLM as target mean (or a
           lambda)

And, where it is asked for, of the towers: whether each stays, and the side of the image that it sees.

Tokens are counted per image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.decoder.families import plan_decoder
from meteor_model.encoders import EncoderConfig, encoder_class
from meteor_model.pruners.builtin import DECODE_CRITERIA, ENCODE_CRITERIA, FUSE_CRITERIA
from meteor_model.pruners.registry import Registry
from meteor_model.towers import towers_of, with_towers

T = TypeVar("T")
StageT = TypeVar("StageT", EncodePruning, FusePruning, DecodePruning)
CRITERIA: Mapping[str, Registry[Any]] = {"encode": ENCODE_CRITERIA, "fuse": FUSE_CRITERIA, "decode": DECODE_CRITERIA}
#: estimator -> encoder -> expected rank at each boundary.
Ranks = Mapping[str, Mapping[str, Sequence[float]]]
DecodeBy = Literal["target", "lambda"]
TowerKnob = Literal["keep", "side"]

LEAST_SHARE = 0.25
"""Of the tokens at a boundary, or of the pool that fusion sees, at least this share stays."""
LEAST_SIDE = 0.5
"""Least side of a tower's image, as a share of its own."""
LEAST_TARGET = 1 / 16
"""Least target mean of stage 3, as a share of the tokens that enter the LLM."""
EXPONENTS = (-1.0, 2.0)
SEGMENTS = 3
"""Boundaries of a model that has neither totals nor ranks."""


class SpaceError(ValueError):
    """A model and its ranks leave nothing to choose; the message says why."""


class Chooser(Protocol):
    """Where choices come from: an Optuna trial, or a test."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number of [low, high]."""

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number of [low, high]."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of `choices`."""


def ranks_of_report(report: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """The expected ranks in a run's `ranks.json`. Raises SpaceError where it is something else."""
    try:
        return {
            estimator: {name: [float(item["mean"]) for item in items] for name, items in encoders.items()}
            for estimator, encoders in report["ranks"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError):
        raise SpaceError(
            "ranks.json holds no ranks -> estimator -> encoder -> means: calibrate the model anew"
        ) from None


def ranks_of_config(config: MeteorConfig) -> dict[str, dict[str, list[float]]]:
    """The ranks that a model itself holds: those of the one estimator that its budgets were made with, or none."""
    if config.ranks is None:
        return {}
    return {config.pruning.encode.rank_estimator: {name: list(values) for name, values in config.ranks.items()}}


@dataclass(frozen=True)
class Space:
    """The configurations that a sweep may try.

    Attributes:
        config: of the model; what the choices do not name stays as it is there.
        ranks: by estimator; with none, encoders share by token count and exponents are not searched.
        decode_by: whether stage 3 is chosen by a target mean per image, for which lambda is solved later, or by lambda
            itself.
        criteria: for a stage ("encode", "fuse", "decode") the criteria that it may follow (`meteor_model.pruners`);
            without, that of the model. Budgets stay those of the model.
        knobs: what is chosen of the towers. Ranks stay those of whole images.

    Raises:
        SpaceError: naming what does not fit.
    """

    config: MeteorConfig
    ranks: Ranks
    decode_by: DecodeBy = "target"
    criteria: Mapping[str, Sequence[str]] = field(default_factory=dict)
    knobs: Sequence[TowerKnob] = ()

    def __post_init__(self) -> None:
        self._check_criteria()
        if self.knobs and not self.prunes_encoders:
            raise SpaceError("the towers are joined on the channels, by one projector of all: there is no tower knob")
        names = sorted(item.name for item in self.config.encoders)
        for estimator, by_encoder in self.ranks.items():
            if sorted(by_encoder) != names:
                raise SpaceError(f"{estimator} ranks are of encoders {sorted(by_encoder)}, the model has {names}")
            for name, values in by_encoder.items():
                if min(values) <= 0:
                    raise SpaceError(
                        f"{estimator} ranks of {name!r} are {list(values)}: a map of rank 0 earns no token; calibrate "
                        "on images that are not blank"
                    )
                if len(values) not in (1, self.segments):
                    raise SpaceError(
                        f"{estimator} ranks of {name!r} are for {len(values)} boundaries, the model's stage 1 has "
                        f"{self.segments}: calibrate it with as many segments"
                    )
        if self._always_enter is not None and not self.can_decode:
            raise SpaceError(
                f"{self._always_enter} visual tokens enter the LLM whatever is chosen and stage 3 cannot run it: there "
                "is nothing to search"
            )

    # ------------------------------------------------------------------------------------------------ the model's facts

    @property
    def prunes_encoders(self) -> bool:
        """Stages 1 and 2 need one projector an encoder."""
        return self.config.fusion == "post_projection"

    @property
    def segments(self) -> int:
        """Boundaries of stage 1: as many as the model's totals, or its ranks, have."""
        totals = self.config.pruning.encode.totals
        if totals:
            return len(totals)
        measured = [len(values) for by_encoder in self.ranks.values() for values in by_encoder.values()]
        if measured:
            return max(measured)
        blocks = [encoder_class(e.family).num_blocks(e) for e in self.config.encoders if _between(e.family)]
        return min(SEGMENTS, *blocks) if blocks else 1

    @property
    def present(self) -> int:
        """Tokens of an image before the first boundary, all towers kept."""
        return _present(self.config, self.segments)

    @property
    def all_towers(self) -> dict[str, Any]:
        """The choices that keep every tower as it is."""
        keep = {f"towers.{item.name}.keep": True for item in self._may_go}
        return keep | {f"towers.{name}.cells": cells for name, cells in self._may_shrink.items()}

    @property
    def _may_go(self) -> Sequence[EncoderConfig]:
        return self.config.encoders if "keep" in self.knobs and len(self.config.encoders) > 1 else ()

    @property
    def _may_shrink(self) -> dict[str, int]:
        """Towers whose weights run at any size -> the cells of a side."""
        grids = self.config.encoder_grids
        sizes = [item for item in self.config.encoders if "side" in self.knobs and encoder_class(item.family).any_size]
        return {item.name: grids[item.name][0] for item in sizes if grids[item.name][0] > 1}

    def towers_of(self, config: MeteorConfig) -> dict[str, int] | None:
        """The image sides of a configuration's towers; None where they are the model's."""
        towers = towers_of(config)
        return None if towers == towers_of(self.config) else towers

    @property
    def can_decode(self) -> bool:
        """Whether stage 3 can run this LLM."""
        text = self.config.text_config
        try:
            plan_decoder(text)
        except ValueError:
            return False
        return bool(text.num_hidden_layers > 1)

    @property
    def _always_enter(self) -> int | None:
        """Tokens that enter the LLM whatever is chosen; None where fusion decides."""
        return None if self.prunes_encoders else self.config.concat_grid**2

    def _check_criteria(self) -> None:
        for stage, names in self.criteria.items():
            for name in names:
                try:
                    facts = CRITERIA[stage][name].facts
                except ValueError as error:
                    raise SpaceError(str(error)) from None
                if self.prunes_encoders and (facts.get("looks") or facts.get("grid")):
                    raise SpaceError(
                        f"pruning.{stage}.criterion {name!r} needs all tokens of the towers, which the search prunes: "
                        "leave it out"
                    )
                if not self.prunes_encoders and not facts.get("joint", True):
                    raise SpaceError(f"pruning.{stage}.criterion {name!r} compares encoders, which are joined here")

    # -------------------------------------------------------------------------------------------------------- choosing

    def sample(self, chooser: Chooser) -> MeteorConfig:
        """One configuration; every choice is asked for by the name of its setting."""
        ranks, layout = None, self._layout(chooser)
        if self.prunes_encoders:
            encode, ranks = self._encode(chooser, layout)
        else:
            encode = EncodePruning(enabled=False)
        stage3 = self._choose_stage3(chooser)
        fuse, entering = self._fuse(chooser, encode)
        decode = self._decode(chooser, entering) if stage3 else DecodePruning(enabled=False)
        encode = self._criterion(chooser, "encode", encode)
        fuse, decode = self._criterion(chooser, "fuse", fuse), self._criterion(chooser, "decode", decode)
        return layout.with_pruning(PruningConfig(encode, fuse, decode), ranks)

    def _layout(self, chooser: Chooser) -> MeteorConfig:
        """The model, or what is kept of its towers."""
        kept: dict[str, int] = {}
        may_go, may_shrink = [item.name for item in self._may_go], self._may_shrink
        for place, item in enumerate(self.config.encoders):
            # The last one stays where no other does.
            asked = item.name in may_go and (bool(kept) or place + 1 < len(may_go))
            if asked and not chooser.suggest_categorical(f"towers.{item.name}.keep", (True, False)):
                continue
            kept[item.name] = item.image_size
            if item.name in may_shrink:
                cells = may_shrink[item.name]
                chosen = chooser.suggest_int(f"towers.{item.name}.cells", max(1, round(LEAST_SIDE * cells)), cells)
                kept[item.name] = item.image_size // cells * chosen
        return self.config if kept == towers_of(self.config) else with_towers(self.config, kept)

    def _criterion(self, chooser: Chooser, stage: str, settings: StageT) -> StageT:
        names = self.criteria.get(stage, ())
        if not names or not settings.enabled:
            return settings
        name = names[0] if len(names) == 1 else chooser.suggest_categorical(f"{stage}.criterion", tuple(names))
        return replace(settings, criterion=name, options={})

    def _encode(self, chooser: Chooser, config: MeteorConfig) -> tuple[EncodePruning, dict[str, list[float]] | None]:
        base = self.config.pruning.encode
        segments = self.segments if any(_between(item.family) for item in config.encoders) else 1
        present = _present(config, segments)
        totals: list[int] = []
        for boundary in range(segments):
            share = chooser.suggest_float(f"encode.share.{boundary}", LEAST_SHARE, 1.0)
            present = min(present, max(len(config.encoders), round(share * present)))  # one token for each encoder
            totals.append(present)
        estimator, exponent, ranks = base.rank_estimator, base.rank_exponent, None
        if self.ranks:
            known = sorted(self.ranks)
            estimator = known[0] if len(known) == 1 else chooser.suggest_categorical("encode.rank_estimator", known)
            ranks = {item.name: list(self.ranks[estimator][item.name])[-segments:] for item in config.encoders}
            exponent = chooser.suggest_float("encode.rank_exponent", *EXPONENTS)
        settings = replace(
            base,
            enabled=True,
            totals=tuple(totals),
            first_deep_segment=min(base.first_deep_segment, segments + 1),
            rank_estimator=estimator,
            rank_exponent=exponent,
        )
        return settings, ranks

    def _choose_stage3(self, chooser: Chooser) -> bool:
        if not self.can_decode:
            return False
        return bool(chooser.suggest_categorical("decode.enabled", (True, False)))

    def _fuse(self, chooser: Chooser, encode: EncodePruning) -> tuple[FusePruning, int]:
        """Stage 2, and the visual tokens of an image that enter the LLM."""
        if self._always_enter is not None:
            return replace(self.config.pruning.fuse, enabled=False), self._always_enter
        keep = max(1, round(chooser.suggest_float("fuse.share", LEAST_SHARE, 1.0) * encode.totals[-1]))
        return replace(self.config.pruning.fuse, enabled=True, keep=keep), keep

    def _decode(self, chooser: Chooser, entering: int) -> DecodePruning:
        text, base = self.config.text_config, self.config.pruning.decode
        settings = replace(
            base,
            enabled=True,
            layer=chooser.suggest_int("decode.layer", 1, max(1, text.num_hidden_layers // 2)),
            num_heads=chooser.suggest_int("decode.num_heads", 1, text.num_attention_heads),
            query=chooser.suggest_categorical("decode.query", ("last", "all_text")),
            k_min=min(base.k_min, entering),
            target_mean=None,
            lam=None,
            budget="attention_mass",
            later_layers=(),
            later_keep=(),
        )
        if self.decode_by == "lambda":
            tokens = float(sum(self.config.encoder_tokens.values()))
            return replace(settings, lam=chooser.suggest_float("decode.lam", tokens / 100, tokens * 10, log=True))
        share = chooser.suggest_float("decode.target_share", LEAST_TARGET, 1.0, log=True)
        return replace(settings, target_mean=max(share * entering, float(settings.k_min)))


def _present(config: MeteorConfig, segments: int) -> int:
    tokens = config.encoder_tokens
    return sum(tokens[item.name] for item in config.encoders if segments == 1 or _between(item.family))


def _between(family: str) -> bool:
    return bool(encoder_class(family).prunes_between_blocks)
