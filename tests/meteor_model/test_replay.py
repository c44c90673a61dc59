"""A pass that is given its tokens: the model's own where they are its own, and told apart where they are not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from meteor_model.outputs import PruningStats
from meteor_model.replay import GivenTokens
from meteor_model.replay_logits import replay_logits
from tests.meteor_model.builders import PRUNED, model
from tests.meteor_model.test_modeling import batch

INPUTS = ("input_ids", "attention_mask", "pixel_values")


def inputs(images: tuple[int, ...] = (1, 0, 2)) -> dict[str, torch.Tensor]:
    found = batch(images=images)
    return {name: found[name] for name in INPUTS}


@torch.no_grad()
@pytest.mark.parametrize("images", [(1, 0, 2), (0, 0)], ids=["images", "text alone"])
def test_given_its_own_tokens_a_pass_is_the_forward(images: tuple[int, ...]) -> None:
    built, asked = model(PRUNED), inputs(images)
    output = built(**asked, use_cache=False)
    given = GivenTokens.of(output.pruning_stats)
    assert torch.equal(replay_logits(built, **asked, given=given), output.logits)
    assert given.agreement == 1.0
    assert given.tokens > 0


@torch.no_grad()
def test_given_others_tokens_it_computes_with_those_and_counts() -> None:
    """Oracle: the features of a model that keeps everything, at the given places."""
    built, asked = model(PRUNED), inputs()
    output = built(**asked, use_cache=False)
    stats: PruningStats = output.pruning_stats
    pool = sum(kept[-1].shape[1] for kept in stats.encode.values())
    images, keep = stats.fuse.shape
    others = torch.arange(pool - keep, pool).expand(images, -1)
    given = GivenTokens(stats.encode, others)
    visual, replayed = built.encode_images(asked["pixel_values"], given)
    off = replace(PRUNED.decode, enabled=False, lam=None)
    built.config = built.config.with_pruning(
        replace(PRUNED, fuse=replace(PRUNED.fuse, enabled=False), decode=off), None
    )
    whole, _ = built.encode_images(asked["pixel_values"])
    assert torch.equal(visual, whole[:, pool - keep :])
    assert torch.equal(replayed.fuse, others)
    shared = sum(len(set(mine.tolist()) & set(range(pool - keep, pool))) for mine in stats.fuse)
    chosen = given.tokens - others.numel()
    assert given.agreement == pytest.approx((chosen + shared) / given.tokens)


def dropped_before(stats: PruningStats) -> GivenTokens:
    name, kept = next((name, kept) for name, kept in stats.encode.items() if len(kept) > 1)
    gone = [place for place in range(64) if place not in kept[0][0].tolist()]
    last = kept[-1].clone()
    last[0, 0] = gone[0]
    return GivenTokens({**stats.encode, name: (*kept[:-1], last.sort(dim=1).values)}, stats.fuse)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stats: GivenTokens({}, stats.fuse), "no tokens of encoder 'clip' are given"),
        (lambda stats: GivenTokens(stats.encode, stats.fuse[:, 1:]), r"fusion, boundary 1: \(3, 23\) .* \(3, 24\)"),
        (
            lambda stats: GivenTokens({name: kept[:1] for name, kept in stats.encode.items()}, stats.fuse),
            "tokens of 1 boundaries are given, it has more",
        ),
        (dropped_before, "a token is given that was dropped before it"),
    ],
    ids=["encoders", "count", "boundaries", "dropped"],
)
def test_tokens_that_cannot_be_kept_are_refused(change: Any, message: str) -> None:
    built, asked = model(PRUNED), inputs()
    given = change(built(**asked, use_cache=False).pruning_stats)
    with pytest.raises(ValueError, match=message):
        replay_logits(built, **asked, given=given)
