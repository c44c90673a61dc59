"""MeteorConfig: encoders, decoder and the three pruning stages. Every invariant is checked here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar, Literal

from transformers import AutoConfig, PreTrainedConfig

from meteor_model.calibrated import Record, settled
from meteor_model.checks import from_mapping, nearest, whole_number
from meteor_model.compat import CACHE_NAMES
from meteor_model.decoder.families import plan_decoder
from meteor_model.encoders import EncoderConfig, encoder_class
from meteor_model.pruners.budgets import allocate_budgets
from meteor_model.pruners.encode_criteria import ENCODE_BUDGETS
from meteor_model.pruners.fuse_criteria import FUSE_CRITERIA, floors_of
from meteor_model.pruning_config import DecodePruning, EncodePruning, FusePruning, PruningConfig

__all__ = ["FUSIONS", "DecodePruning", "EncodePruning", "FusePruning", "MeteorConfig", "PruningConfig"]

FUSIONS = ("post_projection", "channel_concat")
#: What transformers says of a saved model where this package is not imported: it prints what stands before the dashes.
#: It is no repository's name, so nothing is ever fetched by it.
HINT = "the Python package meteor_model (install it, and `import meteor_model.auto` before loading)"
AUTO_MAP = {"AutoConfig": f"{HINT}--configuration_meteor.MeteorConfig"}
#: Properties that are worked out from the settings, once.
DERIVED = ("encoder_grids", "encoder_tokens", "encode_budgets", "tokens_per_image")


def _as_encoders(items: Any) -> tuple[EncoderConfig, ...]:
    return tuple(from_mapping(EncoderConfig, f"encoders[{index}]", item) for index, item in enumerate(items))


def _as_text_config(text: Any) -> Any:
    text = {} if text is None else text
    return AutoConfig.for_model(**{"model_type": "llama", **text}) if isinstance(text, Mapping) else text


def _as_pruning(pruning: Any) -> PruningConfig:
    if pruning is None:
        return PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(enabled=False))
    return pruning if isinstance(pruning, PruningConfig) else PruningConfig.from_dict(pruning)


def _as_ranks(ranks: Any) -> dict[str, list[float]] | None:
    try:
        return None if ranks is None else {name: [float(rank) for rank in values] for name, values in ranks.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"ranks must map each encoder's name to a list of numbers, got {ranks!r}") from None


#: What MeteorConfig is made of, and how each setting is brought to its type.
_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "encoders": _as_encoders,
    "text_config": _as_text_config,
    "pruning": _as_pruning,
    "image_size": lambda value: whole_number("image_size", value, least=1),
    "image_token_id": lambda value: whole_number("image_token_id", value),
    "ranks": _as_ranks,
    "fusion": lambda value: value,
    "concat_grid": lambda value: whole_number("concat_grid", value, least=1),
}


class MeteorConfig(PreTrainedConfig):
    """Configuration of `MeteorForConditionalGeneration`.

    A setting may be assigned later as well, as a whole: budgets and token counts are then worked out anew, and an
    assignment that contradicts the other settings is refused and changes nothing. A model that is already built follows
    its configuration in `pruning` and `ranks`; its modules stay what they are.

    Args:
        encoders: the towers, in fusion order.
        text_config: configuration of the LLM (a transformers decoder config or its dictionary).
        pruning: the three stages.
        image_size: side of the square uint8 image that travels; every encoder resizes it to its own resolution.
        image_token_id: id of the placeholder, one per visual token that survives fusion.
        ranks: expected rank of each encoder's feature map at each of its boundaries, from calibration; None before it
            (then encoders share by token count alone, as if all ranks were equal).
        fusion: "post_projection" (METEOR: one projector per encoder, tokens pooled) or "channel_concat" (EAGLE's
            layout: every map is brought to one grid, joined on the channels, and goes through one projector; nothing is
            pruned inside the towers; that towers see images as EAGLE's do are settings of the encoders).
        concat_grid: rows and columns of that one grid; used by "channel_concat" alone.
        calibrated: the settings that `pruning.decode.lam` and `ranks` belong to (`meteor_model.calibrated`), as a saved
            configuration holds it; without it they belong to the settings that they come with.

    Raises:
        ValueError: naming the field that contradicts another.
    """

    model_type = "meteor"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = [*CACHE_NAMES, "image_hidden_states", "pruning_stats"]

    def __init__(
        self,
        encoders: Sequence[EncoderConfig | Mapping[str, Any]] = (),
        text_config: PreTrainedConfig | Mapping[str, Any] | None = None,
        pruning: PruningConfig | Mapping[str, Any] | None = None,
        image_size: int = 336,
        image_token_id: int = 3,
        ranks: Mapping[str, Sequence[float]] | None = None,
        fusion: str = "post_projection",
        concat_grid: int = 32,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("auto_map", None)  # for programs without this package
        self.calibrated: Record = dict(kwargs.pop("calibrated", None) or {})
        self.encoders = _as_encoders(encoders)
        self.text_config = _as_text_config(text_config)
        self.pruning = _as_pruning(pruning)
        self.image_size = image_size
        self.image_token_id = image_token_id
        self.fusion = fusion
        self.concat_grid = concat_grid
        self.ranks = _as_ranks(ranks)
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)
        if self.encoders:  # transformers builds an empty config to compare with when it prints a diff
            self.check()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _SETTINGS:
            super().__setattr__(name, value)
            return
        before = dict(self.__dict__)
        super().__setattr__(name, _SETTINGS[name](value))
        if DERIVED[-1] not in before:  # it is being built
            return
        try:
            self.check()
        except ValueError:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def check(self) -> None:
        """Work out budgets and token counts, now: a compiled forward cannot. Raises ValueError on a contradiction."""
        for derived in DERIVED:
            self.__dict__.pop(derived, None)
        if not self.encoders:
            raise ValueError("encoders is empty: a model needs at least one EncoderConfig")
        names = [item.name for item in self.encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"encoder names must differ, got {names}")
        self._check_fusion()
        self._check_idle(names)
        self._check_looks()
        self._check_ranks(names)
        encode, fuse = self.pruning.encode, self.pruning.fuse
        for item in self.encoders:
            blocks = encoder_class(item.family).num_blocks(item)
            if encode.enabled and encoder_class(item.family).prunes_between_blocks and len(encode.totals) > blocks:
                raise ValueError(
                    f"pruning.encode.totals has {len(encode.totals)} segments, encoder {item.name!r} {blocks} blocks"
                )
        pool = sum(self.encode_budgets[name][-1] for name in names)  # raises where totals exceed the tokens there are
        if self.fusion == "channel_concat":
            pool = self.concat_grid**2
        if fuse.enabled and self.fusion == "post_projection":
            floors_of([self.encode_budgets[name][-1] for name in names], fuse.keep, fuse.floor)
        if fuse.enabled and fuse.keep > pool:
            raise ValueError(f"pruning.fuse.keep {fuse.keep} exceeds the {pool} tokens that are projected")
        self._check_decoder()
        self._check_positions()
        self.calibrated = settled(self)

    def _check_positions(self) -> None:
        most, span = getattr(self.text_config, "max_position_embeddings", None), self.whole_span
        if self.keeps_positions and most is not None and span >= most:
            raise ValueError(
                f"pruning.fuse.positions 'original' gives an image {span} positions, the LLM has "
                f"{most} (text_config.max_position_embeddings): set it to 'renumbered'"
            )

    def _check_idle(self, names: list[str]) -> None:
        encode = self.pruning.encode
        for setting, given in (("usefulness", encode.usefulness), ("masked", encode.masked)):
            unknown = sorted(set(given) - set(names))
            if unknown:
                raise ValueError(f"pruning.encode.{setting} names {unknown}; the model's encoders are {sorted(names)}")
        if not set(names) - self.useless_encoders - set(encode.masked):
            raise ValueError(
                f"no encoder of {sorted(names)} is run: pruning.encode.masked names {sorted(encode.masked)}, and those "
                f"of usefulness 0 or less are {sorted(self.useless_encoders)}"
            )

    def _check_looks(self) -> None:
        """A criterion of stage 2 that asks the towers needs one that attends, and all of its tokens."""
        fuse = self.pruning.fuse
        if not fuse.looks:
            return
        if self.pruning.encode.enabled:
            raise ValueError(
                f"pruning.fuse.criterion {fuse.criterion!r} ranks all tokens of the towers by their attention: set "
                "pruning.encode.enabled to false, or choose another criterion"
            )
        if not any(encoder_class(item.family).prunes_between_blocks for item in self.encoders if self.runs(item.name)):
            raise ValueError(
                f"pruning.fuse.criterion {fuse.criterion!r} needs the attention of a tower, and all that are run "
                "are convolutional: choose another criterion"
            )

    def _check_decoder(self) -> None:
        decode, text = self.pruning.decode, self.text_config
        heads = text.num_attention_heads
        if decode.enabled:
            plan_decoder(text)  # raises where stage 3 cannot run this LLM
            self._check_cuts()
        if decode.num_heads is not None and decode.num_heads > heads:
            raise ValueError(f"pruning.decode.num_heads {decode.num_heads} is not in 1..{heads}, the LLM's heads")
        for name, tokens in (("target_mean", decode.target_mean), ("k_min", decode.k_min)):
            if tokens is not None and tokens > self.tokens_per_image:
                raise ValueError(f"pruning.decode.{name} {tokens} exceeds an image's {self.tokens_per_image} tokens")
        if not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(f"image_token_id {self.image_token_id} is outside the vocabulary {text.vocab_size}")
        for where, settings in (("pad_token_id", self.__dict__), ("text_config.pad_token_id", text.__dict__)):
            if settings.get("pad_token_id") == self.image_token_id:
                raise ValueError(
                    f"image_token_id {self.image_token_id} is {where} too: padding would count as visual tokens; give "
                    "the placeholder an id of its own"
                )

    def _check_cuts(self) -> None:
        decode, layers = self.pruning.decode, self.text_config.num_hidden_layers
        for name, layer in (("layer", decode.layer), *(("later_layers", layer) for layer in decode.later_layers)):
            if layer >= layers:
                raise ValueError(f"pruning.decode.{name} {layer} must be below the LLM's {layers} layers")
        if decode.wants_grid and (self.pruning.encode.enabled or self.pruning.fuse.enabled):
            raise ValueError(
                f"pruning.decode.criterion {decode.criterion!r} looks at rows and columns of whole grids: set "
                "pruning.encode.enabled and pruning.fuse.enabled to false, or choose another criterion"
            )

    def _check_ranks(self, names: list[str]) -> None:
        if self.ranks is None:
            return
        if set(self.ranks) != set(names):
            raise ValueError(f"ranks are for encoders {sorted(self.ranks)}, the model has {sorted(names)}")
        encode = self.pruning.encode
        # Without totals (stage 1 off) the boundaries are those that were measured.
        expected = len(encode.totals) or max(1, *(len(values) for values in self.ranks.values()))
        for name, values in self.ranks.items():
            if len(values) not in (1, expected):
                raise ValueError(f"ranks[{name!r}] has {len(values)} values, the encoder has {expected} boundaries")
            for index, rank in enumerate(values):
                if not (math.isfinite(rank) and rank >= 0):
                    raise ValueError(f"ranks[{name!r}][{index}] is {rank}: a rank is finite and not negative")
                try:
                    _ = encode.enabled and rank**encode.rank_exponent
                except (OverflowError, ZeroDivisionError):
                    raise ValueError(
                        f"pruning.encode.rank_exponent {encode.rank_exponent}: ranks[{name!r}][{index}] = {rank} has "
                        "no such power; use an exponent nearer to 0"
                    ) from None

    def _check_fusion(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(
                f"fusion {self.fusion!r} is unknown; known: {', '.join(FUSIONS)}{nearest(str(self.fusion), FUSIONS)}"
            )
        folded = [item.name for item in self.encoders if item.fold != 1]
        if self.fusion == "post_projection":
            if folded:
                raise ValueError(f"encoders {folded} set fold, which only fusion='channel_concat' uses")
            return
        if self.pruning.encode.enabled:
            raise ValueError(
                "pruning.encode.enabled is true with fusion='channel_concat', which needs every token of every grid: "
                "set it to false, or fusion to 'post_projection'"
            )
        fuse = self.pruning.fuse
        if fuse.enabled and fuse.floor:
            raise ValueError(
                f"pruning.fuse.floor {fuse.floor:g} sets tokens of each encoder aside, which fusion='channel_concat' "
                "joins into one: set it to 0"
            )
        if fuse.enabled and not FUSE_CRITERIA[fuse.criterion].facts["joint"]:
            raise ValueError(
                f"pruning.fuse.criterion {fuse.criterion!r} compares the tokens of different encoders, which "
                "fusion='channel_concat' joins into one: set pruning.fuse.enabled to false, another criterion, or "
                "fusion to 'post_projection'"
            )
        for item in self.encoders:
            rows, columns = self.encoder_grids[item.name]
            if rows % item.fold or columns % item.fold:
                raise ValueError(f"encoder {item.name!r}: its {rows} x {columns} grid cannot be folded by {item.fold}")

    @cached_property
    def encoder_grids(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of each encoder's full grid."""
        return {item.name: encoder_class(item.family).grid_size(item) for item in self.encoders}

    @cached_property
    def encoder_tokens(self) -> dict[str, int]:
        """Patch tokens of each encoder's full grid."""
        return {name: rows * columns for name, (rows, columns) in self.encoder_grids.items()}

    @cached_property
    def encode_budgets(self) -> dict[str, tuple[int, ...]]:
        """Tokens that each encoder keeps at each boundary: the totals shared out in proportion to rank ** exponent.

        A convolutional encoder takes part at the last boundary only. Source of the rule: METEOR (arXiv 2507.20842),
        k_b^l = k_b * r_b^l / sum_l r_b^l; integer shares by largest remainder, capped at the tokens present.
        """
        present = dict(self.encoder_tokens)
        encode, idle = self.pruning.encode, self.useless_encoders
        if not encode.enabled:
            return {name: (0 if name in encode.masked else tokens,) for name, tokens in present.items()}
        budgets: dict[str, list[int]] = {name: [] for name in present}
        last = len(encode.totals) - 1
        for boundary, total in enumerate(encode.totals):
            here = [e.name for e in self.encoders if boundary == last or encoder_class(e.family).prunes_between_blocks]
            names = [name for name in here if name not in idle]
            if not names:  # convolutional encoders alone are run
                for name in here:
                    budgets[name].append(0)
                continue
            capacities = [present[name] for name in names]
            rule, factors = ENCODE_BUDGETS[encode.budget], None
            if rule.facts["usefulness"]:
                factors = [encode.usefulness.get(name, 1.0) for name in names]
            try:
                weights = rule.run([self._rank(name, boundary) for name in names], capacities)
                shares = allocate_budgets(weights, total, capacities, encode.rank_exponent, factors)
            except ValueError as error:
                raise ValueError(f"pruning.encode.totals[{boundary}]: {error} (encoders {names})") from None
            for name, share in zip(names, shares, strict=True):
                present[name] = share
                budgets[name].append(share)
            for name in idle.intersection(here):
                budgets[name].append(0)
        masked = set(encode.masked)
        return {name: (0,) * len(values) if name in masked else tuple(values) for name, values in budgets.items()}

    def _rank(self, name: str, boundary: int) -> float:
        if self.ranks is None:
            return 1.0
        values = self.ranks[name]
        return values[0] if len(values) == 1 else values[boundary]

    @property
    def useless_encoders(self) -> frozenset[str]:
        """Encoders that the budget rule gives nothing."""
        encode = self.pruning.encode
        if not encode.enabled or not ENCODE_BUDGETS[encode.budget].facts["usefulness"]:
            return frozenset()
        return frozenset(name for name, value in encode.usefulness.items() if value <= 0)

    def runs(self, name: str) -> bool:
        """Whether this encoder is run: it has a token to keep."""
        return self.encode_budgets[name][-1] > 0

    @cached_property
    def tokens_per_image(self) -> int:
        """Visual tokens per image that enter the LLM: placeholders per `<image>`."""
        if self.pruning.fuse.enabled:
            return self.pruning.fuse.keep
        if self.fusion == "channel_concat":
            return self.concat_grid**2
        return sum(budget[-1] for budget in self.encode_budgets.values())

    @property
    def whole_span(self) -> int:
        """Tokens of an image that enter the language model where stages 1 and 2 drop none."""
        side: int = self.concat_grid
        return side**2 if self.fusion == "channel_concat" else sum(self.encoder_tokens.values())

    @property
    def keeps_positions(self) -> bool:
        """Whether an image's tokens stand in the LLM where they would if stages 1 and 2 dropped none, and some are."""
        return self.pruning.fuse.positions == "original" and self.tokens_per_image < self.whole_span

    def visual_cells(self) -> list[tuple[int, int]]:
        """Row and column of each visual token of an image in its grid, where stages 1 and 2 prune nothing."""
        side = self.concat_grid
        grids = [(side, side)] if self.fusion == "channel_concat" else self.encoder_grids.values()
        return [(row, column) for rows, columns in grids for row in range(rows) for column in range(columns)]

    @property
    def decode_heads(self) -> int:
        """Heads that stage 3 listens to."""
        chosen = self.pruning.decode.num_heads
        return chosen if chosen is not None else max(1, self.text_config.num_attention_heads // 4)

    def with_pruning(
        self, pruning: PruningConfig, ranks: Mapping[str, Sequence[float]] | Literal["keep"] | None = "keep"
    ) -> MeteorConfig:
        """This model under another pruning, as a new configuration.

        Args:
            pruning: the three stages.
            ranks: expected ranks by encoder, one per boundary; "keep" takes those of this configuration, None shares
                budgets by token count alone.

        Raises:
            ValueError: naming the setting that contradicts the model, the ranks or another setting.
        """
        plain = {**self.to_dict(), "pruning": pruning}
        if ranks != "keep":  # measured for this pruning, also where they equal the former ones
            plain["ranks"] = ranks
            plain["calibrated"] = {name: record for name, record in self.calibrated.items() if name != "ranks"}
        return MeteorConfig(**plain)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The LLM's configuration, as `generate` asks for it."""
        return self.text_config

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for config.json."""
        output = super().to_dict()
        for derived in DERIVED:
            output.pop(derived, None)
        output["encoders"] = [item.to_dict() for item in self.encoders]
        output["text_config"] = self.text_config.to_dict()
        output["pruning"] = asdict(self.pruning)
        output["pruning"]["encode"]["totals"] = list(self.pruning.encode.totals)
        output["pruning"]["encode"]["masked"] = list(self.pruning.encode.masked)
        output["ranks"] = self.ranks
        output["auto_map"] = AUTO_MAP
        output["calibrated"] = self.calibrated
        return output
