"""Stage 2: pooled tokens by mutual redundancy, and EAGLE's joining on the channels as the dense baseline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from meteor_model.configuration_meteor import DecodePruning, FusePruning, MeteorConfig
from meteor_model.fusion import concat_channels, concat_width, prune_pool
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.pruners.fuse_criteria import Pool
from tests.meteor_model.builders import DENSE, PRUNED, config, pixels


def test_a_map_that_has_the_common_grid_is_joined_as_it_is() -> None:
    maps = [torch.randn(2, 16, 3), torch.randn(2, 16, 5)]
    assert torch.equal(concat_channels(maps, [(4, 4), (4, 4)], [1, 1], 4), torch.cat(maps, dim=-1))


def test_resizing_interpolates_between_the_corners() -> None:
    """Aligned corners: a linear ramp stays the same ramp at any size, ends included."""
    ramp = torch.linspace(0, 1, 3).expand(3, 3).reshape(1, 9, 1)
    resized = concat_channels([ramp], [(3, 3)], [1], 5).reshape(5, 5)
    torch.testing.assert_close(resized, torch.linspace(0, 1, 5).expand(5, 5))


def test_folding_moves_cells_into_channels_in_the_library_s_order() -> None:
    hidden = torch.randn(1, 16, 3)
    folded = concat_channels([hidden], [(4, 4)], [2], 2)
    assert folded.shape == (1, 4, concat_width([3], [2]))
    for cell in range(4):
        row, column = divmod(cell, 2)
        for channel in range(3):
            for inner in range(4):
                source = (2 * row + inner // 2) * 4 + 2 * column + inner % 2
                assert folded[0, cell, channel * 4 + inner] == hidden[0, source, channel]


def test_a_pruned_map_cannot_be_joined() -> None:
    with pytest.raises(ValueError, match="needs full maps: 10 tokens came from a 4 x 4 grid"):
        concat_channels([torch.randn(1, 10, 3)], [(4, 4)], [1], 4)


def test_keeping_the_whole_pool_changes_nothing() -> None:
    projected = (torch.randn(2, 5, 8), torch.randn(2, 3, 8))
    places = tuple(torch.arange(tokens.shape[1]).expand(2, -1) for tokens in projected)
    pool, keep = prune_pool(Pool(projected, ((1, 5), (1, 3)), places, 8), FusePruning())
    assert torch.equal(pool, torch.cat(projected, dim=1))
    assert keep.tolist() == [list(range(8))] * 2


def test_eagle_is_a_setting() -> None:
    """The dense baseline.

    One joint projector on all maps, one token per cell of the common grid, no pruning before the LLM; stage 3 (and so
    FastV's place) still applies.
    """
    pruning = replace(DENSE, decode=DecodePruning(layer=2, lam=2.0))
    eagle = MeteorForConditionalGeneration(config(pruning, fusion="channel_concat", concat_grid=4)).eval()
    assert list(eagle.projectors) == ["joint"]
    assert eagle.config.tokens_per_image == 16
    images = pixels(2)
    features, stats = eagle.encode_images(images)
    assert features.shape == (2, 16, 128)
    assert stats.as_metrics()["visual_tokens/fuse/kept"] == 16
    maps = []
    for encoder in eagle.encoders.values():
        hidden = encoder.embed(encoder.normalize(images, torch.float32))
        for index in range(len(encoder.blocks)):
            hidden = encoder.run_block(index, hidden, torch.arange(64).expand(2, -1))
        if hidden.ndim == 3:
            hidden = encoder.finish(hidden, torch.arange(64).expand(2, -1))[:, encoder.num_prefix_tokens :]
            hidden = hidden.transpose(1, 2).reshape(2, -1, 8, 8)
        maps.append(F.interpolate(hidden, size=(4, 4), mode="bilinear", align_corners=True))
    joined = torch.cat(maps, dim=1).flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, eagle.projectors["joint"](joined))
    reloaded = MeteorConfig(**eagle.config.to_dict())
    assert (reloaded.fusion, reloaded.concat_grid) == ("channel_concat", 4)


@pytest.mark.parametrize(
    ("pruning", "changes", "message"),
    [
        (PRUNED, {"fusion": "channel_concat"}, "pruning.encode.enabled is true with fusion='channel_concat'"),
        (DENSE, {"fusion": "channel_conact"}, "fusion 'channel_conact' is unknown.*did you mean 'channel_concat'"),
        (DENSE, {"fusion": "channel_concat", "concat_grid": 0}, "concat_grid must be at least 1, got 0"),
    ],
)
def test_contradictions_name_the_field(pruning: object, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(pruning, **changes)  # type: ignore[arg-type]


def test_fold_belongs_to_channel_concat() -> None:
    data = config(DENSE).to_dict()
    data["encoders"][0]["fold"] = 2
    with pytest.raises(ValueError, match=r"encoders \['clip'\] set fold, which only fusion='channel_concat' uses"):
        MeteorConfig(**data)
    data["encoders"][0]["fold"] = 3
    with pytest.raises(ValueError, match="encoder 'clip': its 8 x 8 grid cannot be folded by 3"):
        MeteorConfig(**{**data, "fusion": "channel_concat"})
