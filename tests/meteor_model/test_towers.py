"""Models of some of their towers share weights with the whole, and maps before pruning are those of the whole pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
import torch

from meteor_model.configuration_meteor import EncodePruning, FusePruning, PruningConfig
from meteor_model.encoders import VisionEncoder, encoder_class
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.towers import of_towers, towers_of, with_towers
from tests.meteor_model.builders import DENSE, PRUNED, config, model, pixels

SOME = {"clip": 64, "convnext": 48}
OF_SOME = PruningConfig(EncodePruning(totals=(50, 40, 60)), FusePruning(keep=20), DENSE.decode)


def test_a_model_of_some_towers_is_one_built_without_the_others() -> None:
    whole = model()
    before = whole.config
    wanted = with_towers(before, SOME).with_pruning(OF_SOME, None)
    part = of_towers(whole, wanted)
    assert towers_of(part.config) == SOME
    built = MeteorForConditionalGeneration(wanted).eval()
    weights = {name: value for name, value in whole.state_dict().items() if ".pix2struct." not in name}
    built.load_state_dict(weights)
    ids = torch.tensor([[1, *[3] * 20, 9, 8]])
    with torch.no_grad():
        expected = built(input_ids=ids, pixel_values=pixels(1)).logits
        assert torch.equal(part(input_ids=ids, pixel_values=pixels(1)).logits, expected)
    assert part.lm_head is whole.lm_head
    assert not any(value.is_meta for value in part.state_dict().values())
    whole.follow(before)
    fresh = model()
    assert torch.equal(whole.encode_images(pixels(2))[0], fresh.encode_images(pixels(2))[0])
    assert of_towers(whole, before) is whole


@pytest.mark.parametrize(
    ("sides", "message"),
    [({}, "no tower is left"), ({"sam": 64}, "not in the model"), ({"clip": 32}, "runs at 64 pixels alone")],
)
def test_what_is_no_choice_of_towers_is_named(
    sides: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_class("clip"), "any_size", False)
    with pytest.raises(ValueError, match=message):
        with_towers(config(), sides)


@pytest.mark.parametrize(
    "pruning",
    [
        PRUNED,
        DENSE,
        PruningConfig(EncodePruning(totals=(96, 64, 60), first_deep_segment=1), FusePruning(keep=24), PRUNED.decode),
        PruningConfig(EncodePruning(totals=(128, 64, 60)), FusePruning(keep=24), PRUNED.decode),
        PruningConfig(EncodePruning(totals=(96, 60)), FusePruning(keep=24), PRUNED.decode),
    ],
    ids=["paper", "dense", "deep from the first boundary", "first boundary keeps all", "two segments"],
)
def test_the_maps_before_pruning_give_the_same_tokens_to_the_bit(
    pruning: PruningConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, images, ran = model(pruning), pixels(3), list[tuple[str, int]]()
    depths = built.dense_depths()
    with torch.no_grad():
        expected, stats = built.encode_images(images)
        maps = {name: built.dense_map(name, images, depth) for name, depth in depths.items()}
        for name, encoder in built.encoders.items():
            block = cast(VisionEncoder, encoder).run_block

            def noted(
                index: int, *rest: torch.Tensor, name: str = name, block: Callable[..., torch.Tensor] = block
            ) -> torch.Tensor:
                ran.append((name, index))
                return block(index, *rest)

            monkeypatch.setattr(encoder, "run_block", noted)
        found, found_stats = built.encode_dense(maps)
    assert torch.equal(found, expected)
    assert torch.equal(found_stats.fuse, stats.fuse)
    assert not [block for block in ran if block[1] < depths[block[0]]], "none of them ran again"
    assert bool(ran) == (pruning is not DENSE)
