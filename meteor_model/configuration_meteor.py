"""MeteorConfig: encoders, decoder and the three pruning stages. Every invariant is checked here, when it is built."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar

from transformers import AutoConfig, PreTrainedConfig

from meteor_model.decoder.families import plan_decoder
from meteor_model.encoders import EncoderConfig, encoder_class
from meteor_model.pruning import RANK_ESTIMATORS, allocate_budgets

T = TypeVar("T")

FUSIONS = ("post_projection", "channel_concat")


@dataclass(frozen=True)
class EncodePruning:
    """Stage 1: how many tokens survive each boundary between segments, and how encoders share them."""

    enabled: bool = True
    """Prune inside the encoders."""
    totals: tuple[int, ...] = ()
    """Tokens that survive each boundary, summed over the encoders that are pruned there; one number a segment."""
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
        object.__setattr__(self, "totals", tuple(int(total) for total in self.totals))
        if self.enabled and not self.totals:
            raise ValueError("pruning.encode.totals is empty: give the tokens to keep after each segment, or disable")
        if any(later > earlier for earlier, later in zip(self.totals, self.totals[1:], strict=False)):
            raise ValueError(f"pruning.encode.totals must not grow from boundary to boundary, got {self.totals}")
        if self.first_deep_segment < 1:
            raise ValueError(f"pruning.encode.first_deep_segment counts from 1, got {self.first_deep_segment}")
        if self.score_queries is not None and self.score_queries < 1:
            raise ValueError(f"pruning.encode.score_queries must be at least 1 or None, got {self.score_queries}")
        if not math.isfinite(self.rank_exponent):
            raise ValueError(f"pruning.encode.rank_exponent must be finite, got {self.rank_exponent}")
        if self.rank_estimator not in RANK_ESTIMATORS:
            known = ", ".join(sorted(RANK_ESTIMATORS))
            raise ValueError(f"pruning.encode.rank_estimator {self.rank_estimator!r} is unknown; known: {known}")


@dataclass(frozen=True)
class FusePruning:
    """Stage 2: how many of the projected tokens of all encoders go on into the LLM."""

    enabled: bool = True
    """Prune the pooled tokens by mutual redundancy."""
    keep: int = 576
    """Visual tokens per image that enter the LLM."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"pruning.fuse.keep must be positive, got {self.keep}")


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
        if self.layer < 1:
            raise ValueError(f"pruning.decode.layer must be at least 1, got {self.layer}")
        if self.query not in ("last", "all_text"):
            raise ValueError(f"pruning.decode.query must be 'last' or 'all_text', got {self.query!r}")
        if self.k_min < 1:
            raise ValueError(f"pruning.decode.k_min must be at least 1, got {self.k_min}")
        if self.lam is not None and not (math.isfinite(self.lam) and self.lam > 0):
            raise ValueError(f"pruning.decode.lam must be positive and finite, got {self.lam}")
        if self.target_mean is not None and not math.isfinite(self.target_mean):
            raise ValueError(f"pruning.decode.target_mean must be finite, got {self.target_mean}")
        if self.target_mean is not None and self.target_mean < self.k_min:
            raise ValueError(f"pruning.decode.target_mean {self.target_mean} is below k_min {self.k_min}")


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
        _refuse_unknown("pruning", data, stages)
        return cls(**{name: _from_dict(stages[name], f"pruning.{name}", value) for name, value in data.items()})


def _refuse_unknown(where: str, data: Mapping[str, Any], known: Any) -> None:
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{where} has unknown keys {unknown}; known: {sorted(known)}")


def _from_dict(cls: type[T], where: str, data: Any) -> T:
    if isinstance(data, cls):
        return data
    _refuse_unknown(where, data, [item.name for item in fields(cls)])  # type: ignore[arg-type]
    return cls(**data)


class MeteorConfig(PreTrainedConfig):
    """Configuration of `MeteorForConditionalGeneration`.

    Args:
        encoders: the towers, in fusion order.
        text_config: configuration of the LLM (a transformers decoder config or its dictionary).
        pruning: the three stages.
        image_size: side of the square uint8 image that travels; every encoder resizes it to its own resolution.
        image_token_id: id of the placeholder, one per visual token that survives fusion.
        ranks: expected rank of each encoder's feature map at each of its boundaries, from calibration; None before it
            (then encoders share by token count alone, as if all ranks were equal).
        fusion: "post_projection" (METEOR: one projector per encoder, tokens pooled) or "channel_concat" (EAGLE: every
            map is brought to one grid, joined on the channels, and goes through one projector; nothing is pruned before
            the LLM).
        concat_grid: rows and columns of that one grid; used by "channel_concat" alone.

    Raises:
        ValueError: naming the field that contradicts another.
    """

    model_type = "meteor"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "image_hidden_states", "pruning_stats"]

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
        self.encoders = tuple(
            item if isinstance(item, EncoderConfig) else _from_dict(EncoderConfig, "encoders[]", item)
            for item in encoders
        )
        text: Any = text_config if text_config is not None else {}
        self.text_config: Any = (
            AutoConfig.for_model(**{"model_type": "llama", **text}) if isinstance(text, Mapping) else text
        )
        if pruning is None:
            pruning = PruningConfig(EncodePruning(enabled=False), FusePruning(enabled=False), DecodePruning(False))
        self.pruning = pruning if isinstance(pruning, PruningConfig) else PruningConfig.from_dict(pruning)
        self.image_size = image_size
        self.image_token_id = image_token_id
        self.fusion = fusion
        self.concat_grid = concat_grid
        self.ranks = None if ranks is None else {name: [float(r) for r in values] for name, values in ranks.items()}
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        super().__init__(**kwargs)
        if self.encoders:  # transformers builds an empty config to compare with when it prints a diff
            self._check()
            _ = self.encoder_grids, self.tokens_per_image  # worked out now: a compiled forward cannot

    def _check(self) -> None:
        names = [item.name for item in self.encoders]
        if len(set(names)) != len(names):
            raise ValueError(f"encoder names must differ, got {names}")
        encode, fuse, decode = self.pruning.encode, self.pruning.fuse, self.pruning.decode
        self._check_fusion()
        if self.ranks is not None and set(self.ranks) != set(names):
            raise ValueError(f"ranks are for encoders {sorted(self.ranks)}, the model has {sorted(names)}")
        for item in self.encoders:
            blocks = encoder_class(item.family).num_blocks(item)
            if encode.enabled and encoder_class(item.family).prunes_between_blocks and len(encode.totals) > blocks:
                raise ValueError(
                    f"pruning.encode.totals has {len(encode.totals)} segments, encoder {item.name!r} {blocks} blocks"
                )
        pool = sum(self.encode_budgets[name][-1] for name in names)  # raises where totals exceed the tokens there are
        if fuse.enabled and fuse.keep > pool:
            raise ValueError(f"pruning.fuse.keep {fuse.keep} exceeds the {pool} tokens that leave the encoders")
        layers, heads = self.text_config.num_hidden_layers, self.text_config.num_attention_heads
        if decode.enabled:
            plan_decoder(self.text_config)  # raises where stage 3 cannot run this LLM
        if decode.enabled and decode.layer >= layers:
            raise ValueError(f"pruning.decode.layer {decode.layer} must be below the LLM's {layers} layers")
        if decode.num_heads is not None and not 1 <= decode.num_heads <= heads:
            raise ValueError(f"pruning.decode.num_heads {decode.num_heads} is not in 1..{heads}, the LLM's heads")
        if decode.target_mean is not None and decode.target_mean > self.tokens_per_image:
            raise ValueError(
                f"pruning.decode.target_mean {decode.target_mean} exceeds an image's {self.tokens_per_image} tokens"
            )
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id {self.image_token_id} is outside the vocabulary {self.text_config.vocab_size}"
            )

    def _check_fusion(self) -> None:
        if self.fusion not in FUSIONS:
            near = difflib.get_close_matches(str(self.fusion), FUSIONS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"fusion {self.fusion!r} is unknown; known: {', '.join(FUSIONS)}{hint}")
        folded = [item.name for item in self.encoders if item.fold != 1]
        if self.fusion == "post_projection":
            if folded:
                raise ValueError(f"encoders {folded} set fold, which only fusion='channel_concat' uses")
            return
        if self.concat_grid < 1:
            raise ValueError(f"concat_grid must be positive, got {self.concat_grid}")
        for stage, on in (("encode", self.pruning.encode.enabled), ("fuse", self.pruning.fuse.enabled)):
            if on:
                raise ValueError(
                    f"pruning.{stage}.enabled is true with fusion='channel_concat', which needs every token of every "
                    "grid: set it to false, or fusion to 'post_projection'"
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
        encode = self.pruning.encode
        if not encode.enabled:
            return {name: (tokens,) for name, tokens in present.items()}
        budgets: dict[str, list[int]] = {name: [] for name in present}
        last = len(encode.totals) - 1
        for boundary, total in enumerate(encode.totals):
            names = [e.name for e in self.encoders if boundary == last or encoder_class(e.family).prunes_between_blocks]
            ranks = [self._rank(name, boundary) for name in names]
            capacities = [present[name] for name in names]
            try:
                shares = allocate_budgets(ranks, total, capacities, encode.rank_exponent)
            except ValueError as error:
                raise ValueError(f"pruning.encode.totals[{boundary}]: {error} (encoders {names})") from None
            for name, share in zip(names, shares, strict=True):
                present[name] = share
                budgets[name].append(share)
        return {name: tuple(values) for name, values in budgets.items()}

    def _rank(self, name: str, boundary: int) -> float:
        if self.ranks is None:
            return 1.0
        values = self.ranks[name]
        expected = len(self.pruning.encode.totals)
        if len(values) not in (1, expected):
            raise ValueError(f"ranks[{name!r}] has {len(values)} values, the encoder has {expected} boundaries")
        return values[0] if len(values) == 1 else values[boundary]

    @cached_property
    def tokens_per_image(self) -> int:
        """Visual tokens per image that enter the LLM: placeholders per `<image>`."""
        if self.fusion == "channel_concat":
            return self.concat_grid**2
        if self.pruning.fuse.enabled:
            return self.pruning.fuse.keep
        return sum(budget[-1] for budget in self.encode_budgets.values())

    @property
    def decode_heads(self) -> int:
        """Heads that stage 3 listens to."""
        chosen = self.pruning.decode.num_heads
        return chosen if chosen is not None else max(1, self.text_config.num_attention_heads // 4)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The LLM's configuration, as `generate` asks for it."""
        return self.text_config

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary for config.json."""
        output = super().to_dict()
        for derived in ("encoder_grids", "encoder_tokens", "encode_budgets", "tokens_per_image"):
            output.pop(derived, None)
        output["encoders"] = [item.to_dict() for item in self.encoders]
        output["text_config"] = self.text_config.to_dict()
        output["pruning"] = asdict(self.pruning)
        output["pruning"]["encode"]["totals"] = list(self.pruning.encode.totals)
        output["ranks"] = self.ranks
        return output
