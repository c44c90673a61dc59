"""Stage 1, encoding: run a tower segment by segment and prune its tokens between segments.

A criterion (`meteor_model.pruners.encode_criteria`) scores the tokens at a boundary. METEOR's: shallow boundaries drop
the tokens most similar to the map's mean token; deep boundaries keep the tokens with the most attention (from CLS, or
received). Source: METEOR (arXiv 2507.20842), its encoding stage; a boundary after every segment is this project's
decision (docs/composability.md).

Legend: M images, N tokens of the full grid, K tokens kept, P prefix tokens, D width, T = P + N or P + K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from meteor_model.encoders.base import VisionEncoder, VisionTokens
from meteor_model.pruners.encode_criteria import ENCODE_CRITERIA, Boundary, EncodeCriterion
from meteor_model.pruners.select import gather_tokens, refuse_nan
from meteor_model.pruning_config import PruningConfig
from meteor_model.replay import Choose, best_scored


def segment_ends(num_blocks: int, num_segments: int) -> tuple[int, ...]:
    """Block index after which each of `num_segments` (near) equal segments ends; the last is `num_blocks`.

    >>> segment_ends(24, 3)
    (8, 16, 24)
    """
    return tuple(round(num_blocks * (segment + 1) / num_segments) for segment in range(num_segments))


def beyond_maps(pruning: PruningConfig) -> str | None:
    """The setting by which a pruning reads more of the towers than their `dense_map`: attention, or pixels."""
    if pruning.fuse.looks:
        return f"pruning.fuse.criterion {pruning.fuse.criterion!r}"
    if pruning.encode.enabled and ENCODE_CRITERIA[pruning.encode.criterion].facts["before"]:
        return f"pruning.encode.criterion {pruning.encode.criterion!r}"
    return None


def dense_depth(
    encoder: VisionEncoder, budgets: Sequence[int], first_deep_segment: int, criterion: str = "meteor"
) -> int:
    """Blocks that run before stage 1 scores or drops the first token: their map is the same under every such pruning.

    All of a convolutional tower; else the first segment, up to the block whose attention scores its boundary.

    Args:
        encoder: the tower.
        budgets: as of `encode_pruned`.
        first_deep_segment: as of `encode_pruned`.
        criterion: as of `encode_pruned`.
    """
    if not encoder.prunes_between_blocks:
        return len(encoder.blocks)
    end, tokens = segment_ends(len(encoder.blocks), len(budgets))[0], encoder.grid[0] * encoder.grid[1]
    attends = ENCODE_CRITERIA[criterion].facts["attends"]
    if budgets[0] < tokens and (attends == "always" or (attends == "deep" and first_deep_segment <= 1)):
        return _score_block(encoder, 0, end)
    return end


def dense_map(encoder: VisionEncoder, pixels_MCRR: torch.Tensor, depth: int) -> torch.Tensor:
    """What `encode_pruned` takes as `dense`: (M, P + N, D) after `depth` blocks; of a convolutional one its output."""
    if not encoder.prunes_between_blocks:
        return _dense_output(encoder, pixels_MCRR)
    hidden_MTD, positions_MN = _embed(encoder, pixels_MCRR)
    for index in range(depth):
        hidden_MTD = encoder.checkpointed_block(index, hidden_MTD, positions_MN)
    return hidden_MTD


def encode_pruned(  # noqa: PLR0913 - the settings of stage 1, by name
    encoder: VisionEncoder,
    pixels_MCRR: torch.Tensor | None,
    budgets: Sequence[int],
    first_deep_segment: int,
    score_queries: int | None,
    choose: Choose = best_scored,
    criterion: str = "meteor",
    options: Mapping[str, float] | None = None,
    dense: torch.Tensor | None = None,
) -> tuple[VisionTokens, tuple[torch.Tensor, ...]]:
    """Tokens of one encoder after the last boundary, and what every boundary kept.

    Args:
        encoder: the tower.
        pixels_MCRR: normalised pixels (M, 3, R, R); None with `dense`.
        budgets: tokens to keep after each segment; non-increasing. A convolutional tower is pruned by the last only.
        first_deep_segment: first segment (counted from 1) whose boundary scores by attention.
        score_queries: an encoder without CLS counts the attention received from so many evenly spaced tokens; None:
            from all. See `EncodePruning`.
        choose: decides by the scores which tokens stay.
        criterion: gives the scores; a name of `ENCODE_CRITERIA`.
        options: its numbers.
        dense: the images' `dense_map` after `dense_depth` blocks, which then do not run again.

    Returns:
        the finished tokens, and for each boundary the kept positions (M, K) in the full grid.
    """
    entry = ENCODE_CRITERIA[criterion]
    score, before = partial(entry.run, **(options or {})), entry.facts["before"]
    if not encoder.prunes_between_blocks:
        hidden_MND = _dense_output(encoder, _given(pixels_MCRR)) if dense is None else dense
        return _prune_output(encoder, hidden_MND, pixels_MCRR, budgets[-1], choose, score)

    num_prefix = encoder.num_prefix_tokens
    if dense is None:
        done, (hidden_MTD, positions_MN) = 0, _embed(encoder, _given(pixels_MCRR))
    else:
        assert not before, "refused by beyond_maps"
        done = dense_depth(encoder, budgets, first_deep_segment, criterion)
        hidden_MTD, positions_MN = dense, _cells(encoder, dense)
    kept, all_scores, start = [], [], 0

    def cut(
        segment: int, budget: int, attention: Callable[[], torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The hidden states and positions that a boundary leaves of those at hand."""
        patches_MND = hidden_MTD[:, num_prefix:]
        with torch.no_grad():  # selection has no gradient; what is kept carries its own
            boundary = Boundary(patches_MND, positions_MN, encoder.grid, segment, budget, attention, pixels_MCRR)
            scores_MN = score(boundary)
            keep_MK = choose(segment, scores_MN, positions_MN, budget)
        all_scores.append(scores_MN)
        patches_MKD = gather_tokens(patches_MND, keep_MK)
        return torch.cat([hidden_MTD[:, :num_prefix], patches_MKD], dim=1), gather_tokens(positions_MN, keep_MK)

    for segment, (end, budget) in enumerate(zip(segment_ends(len(encoder.blocks), len(budgets)), budgets, strict=True)):
        prunes, deep = budget < positions_MN.shape[1], segment + 1 >= first_deep_segment
        attends = entry.facts["attends"] == "always" or (deep and entry.facts["attends"] == "deep")
        scorer = _score_block(encoder, start, end) if prunes and attends else None
        if prunes and before:
            hidden_MTD, positions_MN = cut(segment, budget, None)
        score_input_MTD = hidden_MTD
        for index in range(max(start, done), end):
            if index == scorer:
                score_input_MTD = hidden_MTD
            hidden_MTD = encoder.checkpointed_block(index, hidden_MTD, positions_MN)
        start = end
        if prunes and not before:
            attention = None
            if scorer is not None:
                attention = partial(encoder.importance, scorer, score_input_MTD, positions_MN, score_queries)
            hidden_MTD, positions_MN = cut(segment, budget, attention)
        kept.append(positions_MN)
    hidden_MTD = encoder.finish(hidden_MTD, positions_MN)
    refuse_nan(*all_scores)  # once, after everything is queued: a GPU is waited for here only
    return VisionTokens(hidden_MTD[:, num_prefix:], positions_MN, hidden_MTD[:, :num_prefix]), tuple(kept)


def encode_looking(
    encoder: VisionEncoder, pixels_MCRR: torch.Tensor, looks: Sequence[float], score_queries: int | None
) -> tuple[VisionTokens, dict[float, torch.Tensor] | None]:
    """Tokens of one encoder, nothing pruned, and its attention to them in some blocks.

    Args:
        encoder: the tower.
        pixels_MCRR: normalised pixels (M, 3, R, R).
        looks: blocks, counted from the end where negative (-2: the last but one), else as a share of the depth. Where a
            tower mixes window and global attention, the last global block up to there is meant.
        score_queries: as in `encode_pruned`.

    Returns:
        the finished tokens; and for each of `looks` the scores (M, N) fp32 of the patch tokens by attention from CLS,
        or received. None for a convolutional tower.
    """
    if not encoder.prunes_between_blocks:
        hidden_MND = _dense_output(encoder, pixels_MCRR)
        cells_MN = torch.arange(hidden_MND.shape[1], device=hidden_MND.device).expand(len(hidden_MND), -1)
        return VisionTokens(hidden_MND, cells_MN, hidden_MND[:, :0]), None
    depth, num_prefix = len(encoder.blocks), encoder.num_prefix_tokens
    wanted = {look: depth + int(look) if look < 0 else round(look * depth) for look in looks}
    asked = {look: encoder.score_block(min(max(block, 0), depth - 1) + 1) for look, block in wanted.items()}
    hidden_MTD, positions_MN = _embed(encoder, pixels_MCRR)
    found = {}
    for index in range(depth):
        for look, block in asked.items():
            if block == index:
                with torch.no_grad():  # selection has no gradient
                    found[look] = encoder.importance(index, hidden_MTD, positions_MN, score_queries)
        hidden_MTD = encoder.checkpointed_block(index, hidden_MTD, positions_MN)
    hidden_MTD = encoder.finish(hidden_MTD, positions_MN)
    return VisionTokens(hidden_MTD[:, num_prefix:], positions_MN, hidden_MTD[:, :num_prefix]), found


def _score_block(encoder: VisionEncoder, start: int, end: int) -> int:
    """The block that scores the segment of blocks start..end-1. ValueError where the tower names one outside of it."""
    scorer = encoder.score_block(end)
    if not start <= scorer < end:
        raise ValueError(
            f"encoder {encoder.config.name!r}: the segment of blocks {start}..{end - 1} has no block whose attention "
            f"can score its tokens (the last one before its end is {scorer}); use fewer pruning.encode.totals, or a "
            "larger pruning.encode.first_deep_segment"
        )
    return scorer


def _prune_output(
    encoder: VisionEncoder,
    hidden_MND: torch.Tensor,
    pixels_MCRR: torch.Tensor | None,
    budget: int,
    choose: Choose,
    score: EncodeCriterion,
) -> tuple[VisionTokens, tuple[torch.Tensor, ...]]:
    """A convolutional tower: tokens of its dense output map are kept (METEOR: those least like its mean)."""
    positions_MN = torch.arange(hidden_MND.shape[1], device=hidden_MND.device).expand(len(hidden_MND), -1)
    if budget < hidden_MND.shape[1]:
        with torch.no_grad():
            scores_MN = score(Boundary(hidden_MND, positions_MN, encoder.grid, 0, budget, None, pixels_MCRR))
            refuse_nan(scores_MN)
            keep_MK = choose(0, scores_MN, positions_MN, budget)
        hidden_MND, positions_MN = gather_tokens(hidden_MND, keep_MK), gather_tokens(positions_MN, keep_MK)
    return VisionTokens(hidden_MND, positions_MN, hidden_MND[:, :0]), (positions_MN,)


def dense_maps(encoder: VisionEncoder, pixels_MCRR: torch.Tensor, num_segments: int) -> tuple[torch.Tensor, ...]:
    """The unpruned feature map (M, N, D) at every boundary of this encoder: what its ranks are measured on.

    A convolutional tower has one boundary, its output.
    """
    if not encoder.prunes_between_blocks:
        return (_dense_output(encoder, pixels_MCRR),)
    hidden_MTD, positions_MN = _embed(encoder, pixels_MCRR)
    ends, maps = segment_ends(len(encoder.blocks), num_segments), []
    for index in range(len(encoder.blocks)):
        hidden_MTD = encoder.checkpointed_block(index, hidden_MTD, positions_MN)
        if index + 1 in ends:
            maps.append(hidden_MTD[:, encoder.num_prefix_tokens :])
    return tuple(maps)


def _embed(encoder: VisionEncoder, pixels_MCRR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first block is given, and the positions (M, N) of the full grid."""
    hidden_MTD = encoder.checkpointed_input(encoder.embed(pixels_MCRR))
    return hidden_MTD, _cells(encoder, hidden_MTD)


def _cells(encoder: VisionEncoder, hidden_MTD: torch.Tensor) -> torch.Tensor:
    """Positions (M, N) of the full grid."""
    cells_N = torch.arange(encoder.grid[0] * encoder.grid[1], device=hidden_MTD.device)
    return cells_N.expand(len(hidden_MTD), -1)


def _given(pixels_MCRR: torch.Tensor | None) -> torch.Tensor:
    assert pixels_MCRR is not None, "without a dense map there are pixels"
    return pixels_MCRR


def _dense_output(encoder: VisionEncoder, pixels_MCRR: torch.Tensor) -> torch.Tensor:
    """Finished tokens (M, N, D) of a convolutional tower; no map before the last is kept."""
    hidden, positions_MN = _embed(encoder, pixels_MCRR)
    for index in range(len(encoder.blocks)):
        hidden = encoder.checkpointed_block(index, hidden, positions_MN)
    return encoder.finish(hidden, positions_MN)
