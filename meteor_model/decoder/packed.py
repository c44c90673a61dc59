"""Packed rows inside the model: who sees whom, at which position, and what of it is learned.

The rule, and how rows are packed, is in `meteor_model/packing.py`. SDPA and eager attention get it as a mask, made once
a batch; FlashAttention gets the lengths of the documents (varlen), which cannot say branches. Padding is a document of
its own, so that no row of a mask is empty.

Legend: B rows, T tokens of a row, C width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils.generic import is_flash_attention_requested

from meteor_model.chat import IGNORE_INDEX
from meteor_model.configuration_meteor import FusePruning, MeteorConfig
from meteor_model.decoder.families import DecoderPlan, plan_decoder
from meteor_model.decoder.masks import additive


@dataclass(frozen=True)
class Packed:
    """Rows of several documents.

    Attributes:
        documents_BT: int64, which document each token is of, counting up along a row; negative on padding.
        branches_BT: int64, which branch of it, counting up within a document; None where there are none.
    """

    documents_BT: Tensor
    branches_BT: Tensor | None

    @property
    def document_starts_BT(self) -> Tensor:
        """Which tokens are the first of their document, bool."""
        return _changes(self.documents_BT)

    @property
    def branch_starts_BT(self) -> Tensor:
        """Which tokens are the first of a branch other than 0, within a document, bool."""
        if self.branches_BT is None:
            return torch.zeros_like(self.documents_BT, dtype=torch.bool)
        return _changes(self.branches_BT) & ~self.document_starts_BT

    def positions_BT(self) -> Tensor:
        """Place of each token in the sample that it is of, int64: as in a row of its own."""
        columns_T = torch.arange(self.documents_BT.shape[1], device=self.documents_BT.device)
        first_BT = torch.where(self.document_starts_BT, columns_T, 0).cummax(dim=1).values
        if self.branches_BT is None:
            return columns_T - first_BT
        shared_BT = (self.branches_BT == 0).long()
        before_BT = shared_BT.cumsum(dim=1) - shared_BT
        prefix_BT = before_BT - before_BT.gather(1, first_BT)  # tokens of branch 0 before this one
        starts_BT = self.document_starts_BT | self.branch_starts_BT
        own_BT = columns_T - torch.where(starts_BT, columns_T, 0).cummax(dim=1).values
        return prefix_BT + own_BT * (1 - shared_BT)

    def visible_BTT(self) -> Tensor:
        """Which token (second axis) sees which (third), bool (B, T, T)."""
        length = self.documents_BT.shape[1]
        seen_BTT = self.documents_BT[:, :, None] == self.documents_BT[:, None, :]
        seen_BTT &= torch.ones(length, length, dtype=torch.bool, device=seen_BTT.device).tril()
        if self.branches_BT is not None:
            other_BTT = self.branches_BT[:, :, None] != self.branches_BT[:, None, :]
            seen_BTT &= ~(other_BTT & (self.branches_BT != 0)[:, None, :])
        return seen_BTT

    def learned_labels(self, labels_BT: Tensor) -> Tensor:
        """The labels without the first token of each document, which no token of it comes before."""
        return labels_BT.masked_fill(self.document_starts_BT.to(labels_BT.device), IGNORE_INDEX)

    def decoder_arguments(self, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
        """What the LLM's forward is given beside the embeddings.

        Args:
            config: the LLM's, for its family and attention kernel.
            dtype: of its hidden states.

        Raises:
            ValueError: for a decoder or an attention kernel that cannot tell documents, or branches, apart.
        """
        plan, kernel = plan_packed(config), config._attn_implementation
        positions_BT = self.positions_BT()
        shared = {"position_ids": positions_BT, "use_cache": False}
        if is_flash_attention_requested(config):
            if self.branches_BT is not None:
                raise ValueError(
                    f"attn_implementation {kernel!r} of the LLM cannot keep branches of packed rows apart: set it to "
                    "'sdpa' or 'eager', or give one question a row"
                )
            return {**shared, "attention_mask": None, **self.varlen_arguments()}
        if kernel not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation {kernel!r} of the LLM cannot keep packed documents apart: set it to 'sdpa', "
                "'eager' or 'flash_attention_2', or give one sample a row"
            )
        return {**shared, "attention_mask": self._masks(plan, positions_BT, dtype, kernel == "eager")}

    def varlen_arguments(self) -> dict[str, Any]:
        """FlashAttention's: where documents, padding too, begin in the rows end to end, and the longest length."""
        starts_n = self.document_starts_BT.flatten().nonzero().flatten()
        ends_n = torch.cat([starts_n, starts_n.new_tensor([self.documents_BT.numel()])]).to(torch.int32)
        longest = int(ends_n.diff().max())
        return {"cu_seq_lens_q": ends_n, "cu_seq_lens_k": ends_n, "max_length_q": longest, "max_length_k": longest}

    def _masks(self, plan: DecoderPlan, positions_BT: Tensor, dtype: torch.dtype, eager: bool) -> Any:
        """A mask (B, 1, T, T), or one by layer type, in the form that the kernel and the family take."""

        def formed(seen_BTT: Tensor) -> Tensor:
            return additive(seen_BTT[:, None], dtype) if eager else seen_BTT[:, None]

        full_BTT = self.visible_BTT()
        if plan.family.windows == "none" or (plan.window is None and plan.family.windows == "every layer"):
            return formed(full_BTT)
        masks = {"full_attention": formed(full_BTT)}
        if plan.window is not None:
            near_BTT = positions_BT[:, :, None] - positions_BT[:, None, :] < plan.window
            masks["sliding_attention"] = formed(full_BTT & near_BTT)
        return masks["sliding_attention"] if plan.family.windows == "every layer" else masks


def read_packed(
    document_ids: Tensor | None,
    branch_ids: Tensor | None,
    labels: Tensor | None,
    shape: Sequence[int],
    instead: Mapping[str, Any],
) -> Packed | None:
    """The packed rows of a call, checked; None where its rows are samples. Values are read back once.

    Args:
        document_ids: (B, T) int64.
        branch_ids: (B, T) int64.
        labels: (B, T) int64.
        shape: (B, T) of the tokens.
        instead: arguments of the call that packed rows do without, by name.

    Raises:
        ValueError: for branches without documents, another shape, an argument of `instead` that is given, ids that do
            not count up, and a branch that begins with a learned token, naming the row.
    """
    if document_ids is None:
        if branch_ids is not None:
            raise ValueError("branch_ids go with document_ids: give both, or neither")
        return None
    given = sorted(name for name, value in instead.items() if value is not None and value is not False)
    if given:
        raise ValueError(
            f"{given} cannot go with document_ids: packed rows say themselves what is padding and where tokens stand, "
            "and are one pass without a cache (so without stage 3, which decides question by question)"
        )
    tokens = tuple(shape)
    for name, ids in (("document_ids", document_ids), ("branch_ids", branch_ids)):
        if ids is not None and (tuple(ids.shape) != tokens or ids.is_floating_point()):
            raise ValueError(f"{name} is {ids.dtype} {tuple(ids.shape)}, the tokens are {tokens}: give whole numbers")
    packed = Packed(document_ids, branch_ids)
    _check_order(packed, labels)
    return packed


def check_packed_images(packed: Packed, is_image_BT: Tensor, config: MeteorConfig) -> None:
    """Every document holds whole images, and what is kept of them hangs on the images alone.

    Args:
        packed: the rows.
        is_image_BT: bool, where placeholders are.
        config: the whole model's.

    Raises:
        ValueError: naming row, document and count (a compiled graph checks whole rows only); for a criterion of stage 2
            that reads the text.
    """
    per_image = config.tokens_per_image
    check_fusion(config.pruning.fuse)
    if config.keeps_positions:
        raise ValueError(
            "pruning.fuse.positions 'original' does not go with packed rows, which count positions over what they "
            "hold: give one sample a row, or set it to 'renumbered'"
        )
    if torch.compiler.is_compiling():
        return
    rows_n, columns_n = is_image_BT.nonzero(as_tuple=True)
    keys_n2 = torch.stack([rows_n, packed.documents_BT[rows_n, columns_n]], dim=1)
    keys_k2, counts_k = keys_n2.unique_consecutive(dim=0, return_counts=True)
    for (row, document), count in zip(keys_k2.tolist(), counts_k.tolist(), strict=True):
        if count % per_image:
            raise ValueError(
                f"document {document} of packed row {row} has {count} image placeholders, not a multiple of the "
                f"{per_image} visual tokens of an image: was it encoded for another pruning configuration?"
            )


def check_fusion(fuse: FusePruning) -> None:
    """ValueError for a criterion of stage 2 that reads the text: what it keeps of an image would hang on the row."""
    if fuse.enabled and fuse.wants_text:
        raise ValueError(
            f"pruning.fuse.criterion {fuse.criterion!r} reads the text of an image's prompt, and packed rows hold "
            "several: give one sample a row, or choose a criterion that looks at images alone"
        )


def plan_packed(config: PreTrainedConfig) -> DecoderPlan:
    """How the decoder of this configuration runs packed rows. ValueError for one of an unknown family."""
    try:
        return plan_decoder(config)
    except ValueError as error:
        raise ValueError(f"packed rows need a decoder that stage 3 could run, too: {error}") from error


def _changes(ids_BT: Tensor) -> Tensor:
    """Where a number differs from the one before, and in the first column, bool."""
    first_B1 = torch.ones_like(ids_BT[:, :1], dtype=torch.bool)
    return torch.cat([first_B1, ids_BT[:, 1:] != ids_BT[:, :-1]], dim=1)


def _check_order(packed: Packed, labels: Tensor | None) -> None:
    documents_BT, branches_BT = packed.documents_BT, packed.branches_BT
    highest_BT = documents_BT.cummax(dim=1).values
    wrong = {"document_ids do not count up": (documents_BT >= 0) & (documents_BT < highest_BT)}
    if branches_BT is not None:
        falls_BT = torch.zeros_like(documents_BT, dtype=torch.bool)
        falls_BT[:, 1:] = branches_BT[:, 1:] < branches_BT[:, :-1]
        wrong["branch_ids do not count up within a document"] = (falls_BT & ~packed.document_starts_BT) | (
            branches_BT < 0
        )
        if labels is not None:
            learned_BT = (labels != IGNORE_INDEX).to(documents_BT.device)
            wrong[
                "a branch begins with a learned token, whose prediction is the shared beginning's (end that sooner)"
            ] = packed.branch_starts_BT & learned_BT
    rows = torch.stack([wrong_BT.any(dim=1) for wrong_BT in wrong.values()])
    if torch.compiler.is_compiling():
        torch._assert_async(~rows.any(), "packed rows are out of order: run the batch uncompiled to see where")
        return
    for what, found in zip(wrong, rows.tolist(), strict=True):
        if any(found):
            raise ValueError(f"packed row {found.index(True)} of the batch: {what}")
