"""Criteria of stage 3: which visual tokens stay after a layer of the language model, and how many of each sample.

A criterion is given a `LayerView` of the layer that was just run and returns scores (B, T) fp32, high = keep, read at
the visual tokens; METEOR's own also says which heads it listened to (`VisualScores`). A criterion may bring a `select`
of its own, which may also change hidden states: the default takes the best-scored. A budget rule gives each sample its
number of tokens.

Legend: B samples, T tokens present, C language model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from meteor_model.pruners.counts import counts_of_mass
from meteor_model.pruners.places import random_scores
from meteor_model.pruners.registry import Registry
from meteor_model.pruners.text_scores import VisualScores

if TYPE_CHECKING:
    from meteor_model.decoder.view import LayerView

DecodeCriterion = Callable[..., Tensor | VisualScores]
Select = Callable[..., tuple[Tensor, Tensor]]
#: `select`: (view, hidden_BTC, scores_BT, counts_B, **options) -> (which visual tokens stay (B, T) bool, hidden_BTC);
#: a score of infinity must stay. `grid`: whether it looks at rows and columns, so that nothing may be pruned before.
DECODE_CRITERIA: Registry[DecodeCriterion] = Registry("pruning.decode.criterion", select=None, grid=False)


FIRST_IN_SCORES = 1e6


@DECODE_CRITERIA.register("top_heads")
def top_heads(view: LayerView, *, rotary: float = 1, stride: float = 0) -> VisualScores:
    """METEOR (arXiv 2507.20842): attention of the asking text, summed over the heads that look at the image most.

    With `rotary` 0 queries and keys are taken without their rotary positions, whose early scores favour the end of an
    image; with a `stride` n every n-th of the sample's visual tokens comes before any other at the first pruning (both
    FEATHER, ICCV 2025). Ours: the n-th in their order, for stages 1 and 2 leave no rows and columns; they count into
    the number that stays, which still goes by the attention.
    """
    found = view.listen(view.num_heads, rotary=bool(rotary))
    if stride > 0 and view.prompt.whole is None:
        visual_BT = view.visual_BT
        rank_BT = visual_BT.cumsum(dim=1) - visual_BT.long()
        first_BT = visual_BT & (rank_BT % int(stride) == 0)
        found = replace(found, scores_BT=found.scores_BT + first_BT * FIRST_IN_SCORES)
    return found


@DECODE_CRITERIA.register("all_heads")
def all_heads(view: LayerView) -> Tensor:
    """Attention of the asking text, heads averaged: the ranking of FastV and PyramidDrop."""
    return view.attention().mean(dim=1)


@DECODE_CRITERIA.register("random")
def random(view: LayerView, *, seed: float = 0) -> Tensor:
    """Tokens drawn at random by their place among the sample's visual tokens, so that padding changes nothing."""
    rank_BT = view.prompt.visual_BT.cumsum(dim=1) - view.prompt.visual_BT.long()
    return random_scores(rank_BT.shape[1], int(seed), rank_BT.device)[rank_BT]


class Asked(NamedTuple):
    """What a budget rule is given.

    Attributes:
        mass_B: fp32, the sum of the scores of each sample's visual tokens.
        visual_B: int64, visual tokens present.
        images_B: float64, images of each sample (its visual tokens before any was dropped over those of an image).
        keep: visual tokens an image that the settings ask for; None where they ask for none.
        lam: lambda; None where it is not known.
        k_min: fewest tokens that a sample with images keeps.
        view: the layer.
    """

    mass_B: Tensor
    visual_B: Tensor
    images_B: Tensor
    keep: float | None
    lam: float | None
    k_min: int
    view: LayerView


DecodeBudget = Callable[..., Tensor]
#: `lam`: whether the rule needs lambda, which is solved for target_mean; `keep`: whether target_mean is what it keeps
#: of each image; `through`: whether it gives the numbers of all prunings, and is called at each of them as
#: (asked, plan, memo, **options): the (layer, tokens an image) of all, and what it noted before in the same prefill.
DECODE_BUDGETS: Registry[DecodeBudget] = Registry("pruning.decode.budget", lam=False, keep=False, through=False)


@DECODE_BUDGETS.register("attention_mass", lam=True)
def by_attention_mass(asked: Asked) -> Tensor:
    """METEOR (arXiv 2507.20842): lambda times the attention mass on visual tokens, sample by sample."""
    assert asked.lam is not None, "MeteorCache wants it"
    return counts_of_mass(asked.mass_B, asked.lam, asked.visual_B, asked.k_min)


@DECODE_BUDGETS.register("fixed", keep=True)
def fixed(asked: Asked) -> Tensor:
    """The same number for every image: target_mean times the sample's images, rounded half up."""
    assert asked.keep is not None, "DecodePruning wants it"
    wanted_B = torch.floor(asked.images_B * asked.keep + 0.5).to(torch.int64)
    return torch.maximum(torch.minimum(wanted_B, asked.visual_B), asked.visual_B.clamp(max=asked.k_min))
