"""Options of stages 2 and 3 beyond the paper, against slow, literal readings.

Legend: M images, N tokens of the pool, K tokens kept, C width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from meteor_model.configuration_meteor import DecodePruning, FusePruning, MeteorConfig
from meteor_model.flops import count_flops
from meteor_model.fusion import prune_pool
from meteor_model.pruners.fuse_criteria import FUSE_CRITERIA, Pool, floored, floors_of
from meteor_model.pruners.redundancy import mutual_redundancy
from meteor_model.pruners.select import top_indices
from tests.meteor_model.builders import PRUNED, config, model, pixels
from tests.meteor_model.decoder.batches import LAYOUTS, build_prompts, new_cache, prefill
from tests.meteor_model.decoder.oracle import HEADS, LISTENING, build_model
from tests.meteor_model.pruners.test_decode_rules import GROUPS, HEAD, LAYER, Layer, best, layer_of
from tests.meteor_model.pruners.test_fuse_rules import COUNT, GRIDS, cosine, pool_of

SIZES = [rows * columns for rows, columns in GRIDS]


# ------------------------------------------------------------------------------------------------------------- coverage


def coverage(pool: Pool, image: int, floors: list[int], powers: dict[str, float]) -> list[int]:
    """Picks in their order."""
    x = pool.tokens_MNC[image]
    owner = [index for index, size in enumerate(SIZES) for _ in range(size)]
    weight = []
    for j in range(COUNT):
        own = pool.tokens[owner[j]][image]
        saliency = (1 - cosine(x[j], own.mean(dim=0))) / 2
        others = [i for i in range(COUNT) if owner[i] != owner[j]]
        novelty = (1 - sum(cosine(x[j], x[i]) for i in others) / len(others)) / 2
        said = saliency ** powers.get("saliency", 1.0) * novelty ** powers.get("novelty", 0.0)
        if "relevance" in powers:
            assert pool.text_MC is not None
            said *= ((1 + cosine(x[j], pool.text_MC[image])) / 2) ** powers["relevance"]
        weight.append(said)
    chosen, covered, owed = list[int](), [0.0] * COUNT, list(floors)
    while len(chosen) < pool.keep:
        rest = [j for j in range(COUNT) if j not in chosen]
        if sum(owed) >= pool.keep - len(chosen):
            rest = [j for j in rest if owed[owner[j]]]
        gain = {j: sum(max(0.0, cosine(x[i], x[j]) - covered[i]) for i in range(COUNT)) * weight[j] for j in rest}
        chosen.append(max(rest, key=lambda j: (gain[j], -j)))
        owed[owner[chosen[-1]]] = max(0, owed[owner[chosen[-1]]] - 1)
        covered = [max(covered[i], cosine(x[i], x[chosen[-1]])) for i in range(COUNT)]
    return chosen


@pytest.mark.parametrize("floors", [(), (2, 4)])
@pytest.mark.parametrize(
    ("name", "options", "powers"),
    [
        ("coverage", {}, {}),
        ("coverage", {"saliency": 0.5, "novelty": 2.0}, {"saliency": 0.5, "novelty": 2.0}),
        ("coverage_text", {}, {"relevance": 1.0}),
        ("coverage_text", {"relevance": 3.0, "saliency": 0.0}, {"relevance": 3.0, "saliency": 0.0}),
    ],
)
def test_coverage_picks_as_its_definition(
    name: str, options: dict[str, float], powers: dict[str, float], floors: tuple[int, ...]
) -> None:
    pool = pool_of(7)._replace(floors=floors)
    scores_MN = FUSE_CRITERIA[name].run(pool, **options)
    for image, row_N in enumerate(scores_MN):
        picks = sorted(range(COUNT), key=lambda i: -float(row_N[i]))[: pool.keep]
        assert picks == coverage(pool, image, list(floors) or [1, 1], powers)


def test_coverage_leaves_no_encoder_out_and_floors_are_held_by_any_criterion() -> None:
    """An encoder whose tokens are all alike, and all like the others', loses to METEOR's own score."""
    pool = pool_of(8, images=3)
    dull = pool.tokens_MNC.mean(dim=1, keepdim=True).expand(-1, SIZES[1], -1) * 3
    pool = pool._replace(tokens=(pool.tokens[0], dull))
    of_second = [(keep_MK >= SIZES[0]).sum(dim=1).tolist() for keep_MK in (
        prune_pool(pool, FusePruning(keep=8))[1],
        prune_pool(pool, FusePruning(keep=8, criterion="coverage"))[1],
        prune_pool(pool._replace(floors=floors_of(SIZES, 8, 1.0)), FusePruning(keep=8, floor=1.0))[1],
    )]  # fmt: skip
    assert of_second[0] == [0, 0, 0], "the case must drop it whole"
    assert min(of_second[1]) >= 1
    assert of_second[2] == [2, 2, 2], "8 of 22, by 16 and 6 tokens"


def test_floors_take_the_best_of_each_map_first() -> None:
    pool = pool_of(9)
    scores_MN = -mutual_redundancy(pool.tokens)
    keep_MK = top_indices(floored(scores_MN, SIZES, (3, 4)), 9)
    for row_N, kept in zip(scores_MN, keep_MK.tolist(), strict=True):
        score = dict(enumerate(row_N.tolist()))
        of_map = [{i: score[i] for i in among} for among in (range(SIZES[0]), range(SIZES[0], COUNT))]
        expected = [*best(of_map[0], 3), *best(of_map[1], 4)]
        expected += best({i: score[i] for i in score if i not in expected}, 2)
        assert kept == sorted(expected)
    assert floors_of([16, 6], 8, 0.5) == (3, 1)
    assert floors_of([16, 6, 0], 8, 0.01) == (1, 1, 0), "one each, none of an encoder that is not run"
    assert floors_of([16], 8, 1.0) == floors_of([16, 6], 8, 0.0) == ()
    with pytest.raises(ValueError, match="keep 2 is below one token for each of 3 encoders"):
        floors_of([5, 5, 5], 2, 0.5)


@pytest.mark.parametrize("criterion", ["mutual_redundancy", "coverage", "random"])
def test_dropped_tokens_are_averaged_into_their_nearest_kept_one(criterion: str) -> None:
    pool = pool_of(6)
    leaf = pool.tokens[0].clone().requires_grad_()
    pool = pool._replace(tokens=(leaf, pool.tokens[1]))
    merged, keep = prune_pool(pool, FusePruning(keep=6, criterion=criterion, merge="nearest"))
    plain, same = prune_pool(pool, FusePruning(keep=6, criterion=criterion))
    assert torch.equal(keep, same)
    assert not torch.equal(merged, plain)
    tokens = pool.tokens_MNC.detach()
    for image, kept in enumerate(keep.tolist()):
        members = {index: [index] for index in kept}
        for i in set(range(COUNT)) - set(kept):
            members[max(kept, key=lambda j: cosine(tokens[image, i], tokens[image, j]))].append(i)
        for place, index in enumerate(kept):
            torch.testing.assert_close(merged[image, place], tokens[image, members[index]].mean(dim=0))
    merged.square().sum().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad.abs().sum(dim=2) > 0).all()), "a merged token is learned, too"


@torch.no_grad()
def test_the_whole_model_follows_its_floor_and_merge() -> None:
    fuse = replace(PRUNED.fuse, floor=0.75, merge="nearest")
    built = model(replace(PRUNED, fuse=fuse))
    visual, stats = built.encode_images(pixels(3))
    sizes = [kept[-1].shape[1] for kept in stats.encode.values()]
    owner = torch.repeat_interleave(torch.tensor(sizes))
    counts = torch.nn.functional.one_hot(owner[stats.fuse], len(sizes)).sum(dim=1)
    floors = torch.tensor(floors_of(sizes, fuse.keep, 0.75))
    assert int(floors.sum()) == 18
    assert bool((counts >= floors).all())
    again = MeteorConfig(**built.config.to_dict())
    assert again.pruning.fuse == fuse
    assert visual.shape == (3, fuse.keep, 128)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"floor": 1.5}, r"floor must be between 0 and 1, got 1\.5"),
        ({"merge": "all"}, "merge must be one of none, nearest, got 'all'"),
        ({"criterion": "average_pooling", "merge": "nearest"}, "'average_pooling' merges by a rule of its own"),
        ({"criterion": "average_pooling", "floor": 0.5}, "'average_pooling' merges by a rule of its own"),
        ({"keep": 2, "floor": 0.5}, "keep 2 is below one token for each of 3 encoders"),
    ],
)
def test_options_of_stage_2_that_contradict_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(replace(PRUNED, fuse=replace(PRUNED.fuse, **changes), decode=DecodePruning(False)))


# --------------------------------------------------------------------------------------------- stage 3's own criterion


def heads_without_rotary(layer: Layer) -> list[dict[int, float]]:
    """For each head, the last token's attention to each visual token, no position rotated."""
    query, key = layer.states("q_proj", HEADS), layer.states("k_proj", GROUPS)
    length, found = len(layer.embeds_TC), []
    for h in range(HEADS):
        weight = [math.exp(float(query[h, -1] @ key[h * GROUPS // HEADS, t]) / math.sqrt(HEAD)) for t in range(length)]
        found.append({t: weight[t] / sum(weight) for t in layer.visual})
    return found


@pytest.mark.parametrize(("rotary", "stride"), [(0, 0), (1, 3), (0, 2)])
@torch.no_grad()
def test_meteor_s_criterion_without_rotary_positions_and_with_a_stride(rotary: int, stride: int) -> None:
    model, prompts = build_model(), build_prompts()
    settings = DecodePruning(layer=LAYER, lam=4.0, options={"rotary": rotary, "stride": stride})
    decision = prefill(model, prompts, new_cache(model, settings)).decision
    pruned = False
    for row, (embeds_1TC, visual_T) in enumerate(prompts.singles):
        layer = layer_of(model, embeds_1TC, visual_T)
        heads = [{t: float(layer.map_HTT[h, -1, t]) for t in layer.visual} for h in range(HEADS)]
        if not rotary:
            heads = heads_without_rotary(layer)
        listening = sorted(range(HEADS), key=lambda h: (-sum(heads[h].values()), h))[:LISTENING]
        score = {t: sum(heads[h][t] for h in listening) for t in layer.visual}
        mass = sum(score.values())
        count = min(max(math.floor(4.0 * mass + 0.5), min(1, len(layer.visual))), len(layer.visual))
        first = {t: score[t] + 1e6 * (stride > 0 and rank % max(stride, 1) == 0) for rank, t in enumerate(layer.visual)}
        kept = [layer.visual[rank] for rank in decision.kept_visual()[row].tolist()]
        assert float(decision.mass_B[row]) == pytest.approx(mass, rel=1e-4, abs=1e-7)
        assert kept == sorted(best(first, count))
        pruned = pruned or 0 < len(kept) < len(layer.visual)
    assert pruned
    assert len(prompts.singles) == len(LAYOUTS)


@pytest.mark.parametrize("criterion", ["coverage", "coverage_text"])
def test_coverage_has_shapes_on_the_meta_device(criterion: str) -> None:
    fuse = replace(PRUNED.fuse, criterion=criterion, floor=0.5, merge="nearest")
    assert count_flops(config(replace(PRUNED, fuse=fuse, decode=DecodePruning(False)))).fusion > 0
