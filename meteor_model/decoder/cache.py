"""What stage 3 decided, and the key/value cache that carries it.

The decision lives in the cache, never on a module: several requests at once, beam search and batch selection need
nothing else.

Shape legend: B samples, T tokens of the whole prompt, W kept tokens of the longest sample, k heads listened to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.decoder.families import check_decode_settings, plan_decoder
from meteor_model.decoder.waiting import Due, Waiting
from meteor_model.pruners.select import gather_tokens

if TYPE_CHECKING:
    from meteor_model.outputs import PruningStats


@dataclass(frozen=True)
class Cut:
    """What one pruning left of the prompt's columns.

    Attributes:
        layer: layers [layer, ...) see these columns, up to the next cut.
        mask_BW: bool, which columns hold a kept token (they are left-padded).
        kept_index_BW: int64, the prompt column of each kept token, -1 in the padding.
        counts_B: int64, visual tokens kept of each sample.
        padded: whether any column is padding.
        shift_B: int64, by how much positions above it lie before the original ones; None where they are those.
    """

    layer: int
    mask_BW: Tensor
    kept_index_BW: Tensor
    counts_B: Tensor
    padded: bool
    shift_B: Tensor | None = None


@dataclass(frozen=True)
class Decision:
    """What stage 3 decided at prefill, or anew: then all tokens so far are what is called the prompt here.

    Attributes:
        attended_BT: bool, the prompt's attention mask.
        visual_BT: bool, which tokens of the prompt are visual.
        cuts: its prunings, from the lowest layer on.
        mass_B: fp32, the first cut's scores summed over visual tokens: METEOR's attention mass of the chosen heads.
        heads_Bk: int64, the heads that were listened to there; (B, 0) for a criterion that does not choose heads.
        lower_padded: whether any column below the first cut is padding.
        everywhere: whether the layers below the (only) cut hold its columns, too.
    """

    attended_BT: Tensor
    visual_BT: Tensor
    cuts: tuple[Cut, ...]
    mass_B: Tensor
    heads_Bk: Tensor
    lower_padded: bool
    everywhere: bool = False

    @property
    def prompt_length(self) -> int:
        """T, columns of the whole prompt."""
        return self.attended_BT.shape[1]

    @property
    def mask_BW(self) -> Tensor:
        """Which columns of the last layer hold a kept token."""
        return self.cuts[-1].mask_BW

    @property
    def kept_index_BW(self) -> Tensor:
        """The prompt column of each token that the last layer keeps, -1 in the padding."""
        return self.cuts[-1].kept_index_BW

    @property
    def kept_counts_B(self) -> Tensor:
        """Visual tokens of each sample that the last layer keeps."""
        return self.cuts[-1].counts_B

    @property
    def upper_padded(self) -> bool:
        """Whether any column of the last layer is padding."""
        return self.cuts[-1].padded

    def row_of_column(self) -> Tensor:
        """For each column its row among those that the last layer keeps, (B, T) int64; -1: dropped, or padding."""
        kept_BW, length = self.kept_index_BW, self.prompt_length
        rows_BW = torch.arange(kept_BW.shape[1], device=kept_BW.device).expand_as(kept_BW)
        row_BT = torch.full((len(kept_BW), length + 1), -1, device=kept_BW.device)
        return row_BT.scatter(1, kept_BW.where(kept_BW >= 0, length), rows_BW)[:, :length]  # the last place: padding

    def kept_columns(self) -> tuple[Tensor, ...]:
        """For each cut, which visual columns it keeps, (B, T) bool."""
        found, samples = [], len(self.visual_BT)
        for cut in self.cuts:
            place_BW = cut.kept_index_BW.where(cut.mask_BW, self.prompt_length)  # the last place: padding
            kept_BT = self.visual_BT.new_zeros(samples, self.prompt_length + 1).scatter(1, place_BW, True)
            found.append(kept_BT[:, :-1] & self.visual_BT)
        return tuple(found)

    def runs(self, num_layers: int) -> list[tuple[range, Cut | None]]:
        """Layers that hold the same columns, and the cut that made them; None where they hold the whole prompt."""
        starts = [0, *(cut.layer for cut in self.cuts), num_layers]
        made = [self.cuts[0] if self.everywhere else None, *self.cuts]
        return [(range(first, end), cut) for first, end, cut in zip(starts[:-1], starts[1:], made, strict=True)]

    def select(self, rows: Tensor) -> Decision:
        """The decision for these rows of the batch, in this order."""
        cuts = tuple(_rows_of(cut, rows) for cut in self.cuts)
        return replace(_rows_of(self, rows), cuts=cuts)

    def kept_visual(self, cut: int = -1) -> list[Tensor]:
        """For each sample, int64 ascending: which of its visual tokens stay, counted from 0 over all its images.

        With n visual tokens an image, token i belongs to image i // n. `cut` says after which pruning; the last one.
        """
        chosen = self.cuts[cut]
        rank_BT = self.visual_BT.cumsum(dim=1) - 1
        index_BW = chosen.kept_index_BW.clamp(min=0)
        kept_BW = chosen.mask_BW & gather_tokens(self.visual_BT, index_BW)
        rank_BW = gather_tokens(rank_BT, index_BW)
        return [ranks_W[kept_W] for ranks_W, kept_W in zip(rank_BW, kept_BW, strict=True)]


RowsT = TypeVar("RowsT", Cut, Decision)


def _rows_of(value: RowsT, rows: Tensor) -> RowsT:
    """The same with these rows of every tensor."""
    parts = {item.name: getattr(value, item.name) for item in fields(value)}
    chosen: dict[str, Any] = {
        name: part[rows.to(part.device)] for name, part in parts.items() if isinstance(part, Tensor)
    }
    return replace(value, **chosen)


class RecordingCache(DynamicCache):
    """A plain key/value cache that also holds what stages 1 and 2 kept of each image, for `generate` without stage 3.

    Attributes:
        pruning_stats: by image, in the order in which the images came; None before a prompt with images.
    """

    pruning_stats: PruningStats | None = None
    #: Positions (B,) that the prompt's images have passed over, with `pruning.fuse.positions = "original"`.
    skipped_B: Tensor | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        super().reorder_cache(beam_idx)
        self.skipped_B = _picked(self.skipped_B, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self.skipped_B = _picked(self.skipped_B, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        super().batch_repeat_interleave(repeats)
        self.skipped_B = None if self.skipped_B is None else self.skipped_B.repeat_interleave(repeats)


def _picked(values_B: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values_B is None else values_B[rows.to(values_B.device)]


class MeteorCache(DynamicCache):
    """A key/value cache that carries stage 3: its settings, and from prefill on its decision.

    Full below `settings.layer`, short from there on (everywhere with `settings.equal_layers`); `get_seq_length()` is
    the full length. Give a fresh one to
    `decode_pruned` (or to `generate`, where it makes the model prune). All layers grow, sliding ones too: which tokens
    a window hides is a matter of their original places, which the columns of a pruned layer do not tell.

    Beside the decision of stage 3 (`decision`, by row of the batch) lies what stages 1 and 2 kept (`pruning_stats`, by
    image, in the order in which the images came), where the model ran them for this cache.

    Args:
        config: the decoder's configuration.
        settings: stage 3's settings; `lam` must be known.
        num_heads: heads that are listened to.
        k_max: most visual tokens that a sample keeps, whatever its budget gives it; None sets no such bound.
        per_image: visual tokens of an image before any is dropped, by which a budget tells how many images a prompt
            has; None takes a prompt's visual tokens for one image.
        cells_n2: row and column of each of them, for a criterion that looks at the grid.

    Raises:
        ValueError: when lambda is needed and unknown, `k_max` is below `k_min`, a layer or the heads do not exist, or
            the decoder is not one that stage 3 can run.
    """

    layers: list[DynamicLayer]

    def __init__(
        self,
        config: PreTrainedConfig,
        settings: DecodePruning,
        num_heads: int,
        k_max: int | None = None,
        per_image: int | None = None,
        cells_n2: Tensor | None = None,
    ) -> None:
        super().__init__()
        if settings.needs_lambda and settings.lam is None:
            raise ValueError("pruning.decode.lam is not set: solve it for a target_mean on a calibration batch")
        if k_max is not None and k_max < settings.k_min:
            raise ValueError(f"k_max is {k_max}, below pruning.decode.k_min {settings.k_min}")
        for layer in (settings.layer, *settings.later_layers):
            check_decode_settings(config, layer, num_heads)
        self.plan = plan_decoder(config)
        self.layers = [DynamicLayer() for _ in self.plan.slides]
        self.settings = settings
        self.num_heads = num_heads
        self.k_max = k_max
        self.per_image = per_image
        self.cells_n2 = cells_n2
        self._forget()

    def _forget(self) -> None:
        self.decision: Decision | None = None
        self.pruning_stats: PruningStats | None = None
        #: As in `RecordingCache`.
        self.skipped_B: Tensor | None = None
        #: Which cached columns hold a token, (B, L) bool; None before prefill.
        self.attended_BL: Tensor | None = None
        #: Whether a mask that came after prefill hides any column of its own.
        self.masked_since = False
        self._appends = False
        #: All tokens below the first cut, where the settings may choose anew from them.
        self.waiting: Waiting | None = None
        #: Tokens that came since what is kept was decided.
        self.grown = 0
        self._chosen = False
        self._held: tuple[Tensor, ...] = ()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far; of a layer other than the first, its columns."""
        if layer_idx == 0 and self.decision is not None and self.decision.everywhere and self.attended_BL is not None:
            return self.attended_BL.shape[1]
        length: int = super().get_seq_length(layer_idx)
        return length

    def begin(self, waiting: Waiting) -> None:
        """After prefill: its tokens wait where they may be chosen anew."""
        self.waiting = waiting if self.settings.selects_later else None
        self.selected(chosen=self.settings.query != "answer")

    def due(self, new: int) -> Due:
        """What a pass over `new` more tokens does to the choice."""
        settings, asked_by_answer = self.settings, self.settings.query == "answer"
        if self.waiting is None:
            return ""
        if new > 1 and settings.later_turn != "kept":
            return "keep" if asked_by_answer else "choose"
        every = settings.answer_tokens if asked_by_answer and not self._chosen else settings.reselect_every
        return "choose" if every and self.grown + new >= every else ""

    def selected(self, *, chosen: bool) -> None:
        """What is kept was decided on all tokens so far: `chosen`, or everything until the answer asks."""
        self.grown, self._chosen = 0, chosen
        if chosen and self.settings.later_turn == "union" and self.decision is not None:
            self._held = self.decision.kept_columns()
        if chosen and not (self.settings.reselect_every or self.settings.later_turn != "kept"):
            self.waiting = None  # nothing is chosen after this

    def held_of(self, length: int) -> tuple[Tensor, ...]:
        """For each cut, the visual columns (B, length) that stay since an earlier turn chose them; none without."""
        return tuple(F.pad(held_BT, (0, length - held_BT.shape[1])) for held_BT in self._held)

    def empty_from(self, layer: int) -> None:
        """Forget what this layer and those above it have cached."""
        self.layers[layer:] = [DynamicLayer() for _ in self.layers[layer:]]

    def keep_columns(self, cut: Cut) -> None:
        """Drop from the layers below a cut the columns that it drops."""
        index_BW = cut.kept_index_BW.clamp(min=0)
        for layer in self.layers[: cut.layer]:
            for name in ("keys", "values"):
                states_BGTd = getattr(layer, name)
                index_BGW = index_BW.to(states_BGTd.device)[:, None].expand(-1, states_BGTd.shape[1], -1)
                index_BGWd = index_BGW[..., None].expand(-1, -1, -1, states_BGTd.shape[3])
                setattr(layer, name, states_BGTd.gather(2, index_BGWd))

    def reset(self) -> None:
        """Empty, with the decision forgotten."""
        # Fresh layers: some releases' own reset only zeroes a growing layer and leaves its length.
        self.layers = [DynamicLayer() for _ in self.layers]
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        super().batch_repeat_interleave(repeats)
        if self.decision is not None:
            rows = torch.arange(len(self.decision.kept_counts_B), device=self.decision.kept_counts_B.device)
            self._select(rows.repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        if self.decision is not None and self.attended_BL is not None:
            self.decision = self.decision.select(rows)
            self.attended_BL = self.attended_BL[rows.to(self.attended_BL.device)]
            self.waiting = None if self.waiting is None else self.waiting.rows(rows)
            self.skipped_B = _picked(self.skipped_B, rows)
            self._held = tuple(held_BT[rows.to(held_BT.device)] for held_BT in self._held)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of every layer; 0 drops none.

        Raises ValueError for a positive number and where the prompt itself would be cut, or tokens that were there when
        it was chosen anew: above the layer its tokens are not the ones that a shorter prompt would have kept.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        prompt_length = self.decision.prompt_length if self.decision is not None else 0
        if tokens_to_remove < 0 and self.get_seq_length() + tokens_to_remove < prompt_length:
            raise ValueError(
                f"cannot remove {-tokens_to_remove} of {self.get_seq_length()} tokens: the first {prompt_length} "
                "were pruned together and cannot be cut; start a new cache"
            )
        super().crop(tokens_to_remove)
        if tokens_to_remove < 0 and self.attended_BL is not None:
            self.attended_BL = self.attended_BL[:, :tokens_to_remove]
            self.grown += tokens_to_remove
            self.waiting = None if self.waiting is None else self.waiting.without_last(-tokens_to_remove)

    @contextmanager
    def appending(self) -> Iterator[None]:
        """Inside the block a step's mask is the one before and a one: what `generate` does, and need not be read."""
        self._appends = True
        try:
            yield
        finally:
            self._appends = False

    def follow_mask(self, attention_mask_BL: Tensor | None, new: int) -> None:
        """Take in the mask of a pass over `new` more tokens; None where all of them are attended.

        A mask says of every column whether it may be seen from now on, of cached ones too: what it hides stays cached
        and is hidden. Its values are read back, once; not for a step of `generate`.

        Raises:
            ValueError: naming a sample, where a column that was padding is to be seen: it holds no token.
        """
        known_BL = self.attended_BL
        assert known_BL is not None, "prefill sets it"
        if attention_mask_BL is None:
            self.attended_BL = F.pad(known_BL, (0, new), value=True)
            return
        mask_BL = attention_mask_BL.to(device=known_BL.device, dtype=torch.bool)
        past = known_BL.shape[1]
        if not (self._appends and new == 1):
            shown_B = (mask_BL[:, :past] & ~known_BL).any(dim=1)
            hides = (~mask_BL[:, :past] & known_BL).any() | ~mask_BL[:, past:].all()
            hidden, *shown = torch.cat([hides[None], shown_B]).tolist()
            if any(shown):
                raise ValueError(
                    f"the attention mask shows columns of sample {shown.index(True)} that were padding when they were "
                    "cached, and hold no token: give the mask of the prompt, extended, or start a new cache"
                )
            self.masked_since = self.masked_since or bool(hidden)
        self.attended_BL = torch.cat([known_BL, mask_BL[:, past:]], dim=1)
