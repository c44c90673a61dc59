"""Criteria of stage 2: which of the projected tokens of all encoders go on into the language model.

A criterion is given a `Pool` and returns scores (M, N) fp32 whose `keep` largest stay; one that picks tokens one after
another returns the order of its picks as scores (`picks_as_scores`). A criterion may also say what the kept tokens
become (`merge`): by default they stay what they are.

Legend: M images, N tokens of the pool, K tokens kept, C language model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from meteor_model.pruners.budgets import allocate_budgets
from meteor_model.pruners.places import even_scores, grid_cells, random_scores
from meteor_model.pruners.redundancy import mutual_redundancy
from meteor_model.pruners.registry import Registry
from meteor_model.pruners.select import top_indices


class Pool(NamedTuple):
    """What a criterion of stage 2 is given.

    Attributes:
        tokens: one (M, N_l, C) per projected map: one an encoder, or the joint one where maps are joined on channels.
        grids: rows and columns of each map's full grid.
        positions: int64 (M, N_l) ascending, the tokens' places in that grid.
        keep: tokens that will stay.
        attention: of the towers to the pool's tokens, (M, N) fp32 with mean 1, by the `looks` of the criterion.
        text_MC: the mean of the unit embeddings of each image's prompt (its text alone), for a criterion that asks for
            `text`; a prompt without text gives 0.
        floors: tokens that each map keeps at least; empty without any.
    """

    tokens: tuple[Tensor, ...]
    grids: tuple[tuple[int, int], ...]
    positions: tuple[Tensor, ...]
    keep: int
    attention: Mapping[float, Tensor] | None = None
    text_MC: Tensor | None = None
    floors: tuple[int, ...] = ()

    @property
    def tokens_MNC(self) -> Tensor:
        """All tokens, in encoder order, then raster order."""
        return self.tokens[0] if len(self.tokens) == 1 else torch.cat(self.tokens, dim=1)

    @property
    def is_whole(self) -> tuple[bool, ...]:
        """Of each map, whether all tokens of its grid are there."""
        return tuple(
            tokens.shape[1] == rows * columns for tokens, (rows, columns) in zip(self.tokens, self.grids, strict=True)
        )


FuseCriterion = Callable[..., Tensor]
#: `merge`: what the kept tokens become, (pool, keep_MK, **options) -> (M, K, C); `joint`: whether the criterion tells
#: tokens of one joint map apart, so that it may follow fusion="channel_concat"; `looks`: the blocks of the towers whose
#: attention it wants (`meteor_model.encode.encode_looking`); `text`: whether it wants the prompt's text; `floors`: it
#: minds the pool's floors itself, where the best-scored of each map would else be taken first.
FUSE_CRITERIA: Registry[FuseCriterion] = Registry(
    "pruning.fuse.criterion", merge=None, joint=True, looks=(), text=False, floors=False
)


@FUSE_CRITERIA.register("mutual_redundancy", joint=False)
def least_redundant(pool: Pool) -> Tensor:
    """METEOR (arXiv 2507.20842): the tokens with the least cosine similarity to all tokens of the other encoders."""
    return -mutual_redundancy(pool.tokens)


def _each(pool: Pool) -> Sequence[int]:
    """`keep` shared among the maps in proportion to their tokens; a map may be too small to get one."""
    sizes = [tokens.shape[1] for tokens in pool.tokens]
    if pool.keep < len(sizes):
        return [int(index < pool.keep) for index in range(len(sizes))]
    return allocate_budgets([float(size) for size in sizes], pool.keep, sizes)


@FUSE_CRITERIA.register("random")
def random(pool: Pool, *, seed: float = 0) -> Tensor:
    """Tokens drawn at random from all maps together, the same places in every image."""
    images = pool.tokens[0].shape[0]
    count = sum(tokens.shape[1] for tokens in pool.tokens)
    return random_scores(count, int(seed), pool.tokens[0].device).expand(images, -1)


@FUSE_CRITERIA.register("stride")
def stride(pool: Pool) -> Tensor:
    """The middle token of each of K near equal rectangles of the grid; maps share K by their tokens.

    A map that stage 1 has pruned is strided in raster order of what is there.
    """
    images, device = pool.tokens[0].shape[0], pool.tokens[0].device
    scores = []
    for tokens, grid, whole, keep in zip(pool.tokens, pool.grids, pool.is_whole, _each(pool), strict=True):
        if whole and keep:
            middles = torch.tensor(grid_cells(grid, keep)[1], device=device)
            scores.append(torch.zeros(tokens.shape[1], device=device).index_fill(0, middles, 1.0))
        else:
            scores.append(even_scores(tokens.shape[1], keep, device))
    return torch.cat(scores).expand(images, -1)


def pool_windows(pool: Pool, keep_MK: Tensor) -> Tensor:
    """The mean of each rectangle (of each run of tokens, where stage 1 has pruned) in the place of its middle token."""
    pooled = []
    for tokens, grid, whole, keep in zip(pool.tokens, pool.grids, pool.is_whole, _each(pool), strict=True):
        if not keep:
            continue
        count = tokens.shape[1]
        owner = grid_cells(grid, keep)[0] if whole else [index * keep // count for index in range(count)]
        sizes = [float(owner.count(index)) for index in range(keep)]
        sums_MKC = tokens.new_zeros(tokens.shape[0], keep, tokens.shape[2], dtype=torch.float32)
        sums_MKC = sums_MKC.index_add(1, torch.tensor(owner, device=tokens.device), tokens.float())
        pooled.append((sums_MKC / torch.tensor(sizes, device=tokens.device)[:, None]).to(tokens.dtype))
    return torch.cat(pooled, dim=1)


@FUSE_CRITERIA.register("average_pooling", merge=pool_windows)
def average_pooling(pool: Pool) -> Tensor:
    """The mean of each of K near equal rectangles of the grid, in the place of its middle token."""
    return stride(pool)


def floors_of(sizes: Sequence[int], keep: int, share: float) -> tuple[int, ...]:
    """Tokens that each map keeps at least: `share` of `keep`, by the maps' tokens, one or more each.

    Args:
        sizes: tokens of each map; one without any has no floor.
        keep: tokens that stay of all.
        share: between 0 (no floors) and 1.

    Raises:
        ValueError: where fewer tokens stay than there are maps.
    """
    there = [size for size in sizes if size]
    if not share or len(there) < 2:
        return ()
    if keep < len(there):
        raise ValueError(
            f"pruning.fuse.keep {keep} is below one token for each of {len(there)} encoders, which pruning.fuse.floor "
            f"{share:g} asks for"
        )
    shared = iter(allocate_budgets([float(size) for size in there], max(len(there), int(share * keep)), there))
    return tuple(next(shared) if size else 0 for size in sizes)


def floored(scores_MN: Tensor, sizes: Sequence[int], floors: Sequence[int]) -> Tensor:
    """Scores in which the best `floors` of each map come before all others."""
    parts = []
    for part_MN, floor in zip(scores_MN.split(list(sizes), dim=1), floors, strict=True):
        if floor:
            part_MN = part_MN.scatter(1, top_indices(part_MN, floor), torch.inf)
        parts.append(part_MN)
    return torch.cat(parts, dim=1)


def picks_as_scores(picks_MK: Tensor, count: int) -> Tensor:
    """Scores (M, N) fp32 of tokens that were picked one after another: K for the first, 1 for the last, else 0."""
    keep = picks_MK.shape[1]
    order_MK = torch.arange(keep, 0, -1, device=picks_MK.device, dtype=torch.float32).expand_as(picks_MK)
    return torch.zeros(picks_MK.shape[0], count, device=picks_MK.device).scatter(1, picks_MK, order_MK)
