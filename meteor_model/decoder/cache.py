"""What stage 3 decided, and the key/value cache that carries it.

The decision lives in the cache, never on a module: several requests at once, beam search and batch selection need
nothing else.

Shape legend: B samples, T tokens of the whole prompt, W kept tokens of the longest sample, k heads listened to.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from meteor_model.configuration_meteor import DecodePruning
from meteor_model.decoder.families import check_decode_settings, plan_decoder
from meteor_model.pruning import gather_tokens


@dataclass(frozen=True)
class Decision:
    """What stage 3 decided at prefill.

    Attributes:
        attended_BT: bool, the prompt's attention mask.
        visual_BT: bool, which tokens of the prompt are visual.
        mask_BW: bool, which columns of the upper layers hold a kept token (they are left-padded).
        kept_index_BW: int64, the prompt column of each kept token, -1 in the padding.
        kept_counts_B: int64, visual tokens kept of each sample.
        mass_B: fp32, attention mass on visual tokens over the chosen heads.
        heads_Bk: int64, the heads that were listened to.
        lower_padded: whether any column below the layer is padding.
        upper_padded: whether any column from the layer on is padding.
    """

    attended_BT: Tensor
    visual_BT: Tensor
    mask_BW: Tensor
    kept_index_BW: Tensor
    kept_counts_B: Tensor
    mass_B: Tensor
    heads_Bk: Tensor
    lower_padded: bool
    upper_padded: bool

    @property
    def prompt_length(self) -> int:
        """T, columns of the whole prompt."""
        return self.attended_BT.shape[1]

    def select(self, rows: Tensor) -> Decision:
        """The decision for these rows of the batch, in this order."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self) if "padded" not in item.name}
        return replace(self, **{name: value[rows.to(value.device)] for name, value in tensors.items()})

    def kept_visual(self) -> list[Tensor]:
        """For each sample, int64 ascending: which of its visual tokens stay, counted from 0 over all its images.

        With n visual tokens an image, token i belongs to image i // n.
        """
        rank_BT = self.visual_BT.cumsum(dim=1) - 1
        index_BW = self.kept_index_BW.clamp(min=0)
        kept_BW = self.mask_BW & gather_tokens(self.visual_BT, index_BW)
        rank_BW = gather_tokens(rank_BT, index_BW)
        return [ranks_W[kept_W] for ranks_W, kept_W in zip(rank_BW, kept_BW, strict=True)]


class MeteorCache(DynamicCache):
    """A key/value cache that carries stage 3: its settings, and from prefill on its decision.

    Full below `settings.layer`, short from there on; `get_seq_length()` is the full length. Give a fresh one to
    `decode_pruned` (or to `generate`, where it makes the model prune). All layers grow, sliding ones too: which tokens
    a window hides is a matter of their original places, which the columns of a pruned layer do not tell.

    Args:
        config: the decoder's configuration.
        settings: stage 3's settings; `lam` must be known.
        num_heads: heads that are listened to.
        k_max: most visual tokens that a sample keeps, whatever lambda gives it; None sets no such bound.

    Raises:
        ValueError: when lambda is unknown, `k_max` is below `k_min`, the layer or the heads do not exist, or the
            decoder is not one that stage 3 can run.
    """

    layers: list[DynamicLayer]

    def __init__(
        self, config: PreTrainedConfig, settings: DecodePruning, num_heads: int, k_max: int | None = None
    ) -> None:
        super().__init__()
        if settings.lam is None:
            raise ValueError("pruning.decode.lam is not set: solve it for a target_mean on a calibration batch")
        if k_max is not None and k_max < settings.k_min:
            raise ValueError(f"k_max is {k_max}, below pruning.decode.k_min {settings.k_min}")
        check_decode_settings(config, settings.layer, num_heads)
        self.plan = plan_decoder(config)
        self.layers = [DynamicLayer() for _ in self.plan.slides]
        self.settings = settings
        self.num_heads = num_heads
        self.lam = settings.lam
        self.k_max = k_max
        self.decision: Decision | None = None
        self.padded_since = False  # whether a later turn brought padding of its own

    def reset(self) -> None:
        """Empty, with the decision forgotten."""
        # Fresh layers: some releases' own reset only zeroes a growing layer and leaves its length.
        self.layers = [DynamicLayer() for _ in self.layers]
        self.decision = None
        self.padded_since = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows follow their beams."""
        super().reorder_cache(beam_idx)
        if self.decision is not None:
            self.decision = self.decision.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        if self.decision is not None:
            self.decision = self.decision.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times in a row."""
        super().batch_repeat_interleave(repeats)
        if self.decision is not None:
            rows = torch.arange(len(self.decision.kept_counts_B), device=self.decision.kept_counts_B.device)
            self.decision = self.decision.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of every layer; 0 drops none.

        Raises ValueError for a positive number and where the prompt itself would be cut: above the layer its tokens are
        not the ones that a shorter prompt would have kept.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        prompt_length = self.decision.prompt_length if self.decision is not None else 0
        if tokens_to_remove < 0 and self.get_seq_length() + tokens_to_remove < prompt_length:
            raise ValueError(
                f"cannot remove {-tokens_to_remove} of {self.get_seq_length()} tokens: the prompt's {prompt_length} "
                "were pruned together and cannot be cut; start a new cache"
            )
        super().crop(tokens_to_remove)
