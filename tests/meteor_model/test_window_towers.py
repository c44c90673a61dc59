"""EVA-02, its detector layout and SAM with dropped tokens: rotations, windows, relative positions, padding, neck.

Oracle: the library's own modules on all tokens, the dropped ones masked out of attention as keys.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from meteor_model.encode import encode_pruned
from meteor_model.encoders import EncoderConfig, VisionEncoder, encoder_class
from meteor_model.encoders import sam as sam_module
from meteor_model.encoders.windows import partition
from tests.meteor_model.builders import pixels
from tests.meteor_model.towers import TOWERS, full_grid, tower

NAMES = [name for name in TOWERS if TOWERS[name].family in ("eva02", "eva02_det", "sam")]
WINDOWED = [name for name in NAMES if TOWERS[name].family != "eva02"]

#: Kept cells of the 8 x 8 grid: one corner only, so that most windows lose all their tokens; and spread unevenly.
KEPT_MK = torch.tensor(
    [[0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 24, 25, 27], [4, 7, 15, 20, 23, 28, 31, 39, 47, 55, 61, 62, 63]]
)


def strong(name: str, **changes: Any) -> VisionEncoder:
    """A tower whose every parameter matters: relative positions and biases start at zero in the libraries."""
    encoder = tower(name, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2)
    return encoder


def tokens(encoder: VisionEncoder) -> Tensor:
    """Input of the first block, every token present."""
    generator = torch.Generator().manual_seed(2)
    width = encoder.embed(encoder.normalize(pixels(1), torch.float32)).shape[2]
    hidden = torch.randn(2, encoder.num_prefix_tokens + 64, width, generator=generator)
    return hidden.requires_grad_()


def run(encoder: VisionEncoder, hidden: Tensor, positions: Tensor) -> Tensor:
    for index in range(len(encoder.blocks)):
        hidden = encoder.run_block(index, hidden, positions)
    return hidden


def run_kept(encoder: VisionEncoder, hidden: Tensor, kept: Tensor) -> Tensor:
    prefix = encoder.num_prefix_tokens
    index = torch.cat([torch.arange(prefix).expand(len(kept), -1), prefix + kept], dim=1)
    return run(encoder, hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2])), kept)


def run_masked(encoder: VisionEncoder, hidden: Tensor, kept: Tensor) -> Tensor:
    """All tokens through the library's modules; a dropped one is no key. Returns the rows of the kept ones."""
    prefix, attention = encoder.num_prefix_tokens, F.scaled_dot_product_attention
    dropped_MN = torch.ones(len(kept), 64, dtype=torch.bool).scatter(1, kept, False)
    calls = Counter[bool]()

    def masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        calls[len(query) == len(kept)] += 1
        if len(query) == len(kept):
            dropped = F.pad(dropped_MN, (prefix, 0))
        else:  # the cells that pad a window are zero in `partition`: not dropped
            dropped = partition(dropped_MN[..., None].float(), (8, 8), encoder.config.tower["window_size"])[..., 0] > 0
            dropped &= ~dropped.all(dim=1, keepdim=True)  # rows of a window without tokens are of no interest
        added = torch.zeros(len(query), 1, 1, key.shape[2]).masked_fill(dropped[:, None, None], float("-inf"))
        return attention(query, key, value, attn_mask=added if attn_mask is None else attn_mask + added, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", masked):
        hidden = run(encoder, hidden, full_grid(encoder, len(kept)))
    assert calls[True] == (4 if encoder.config.family == "eva02" else 2)
    assert calls[False] == 4 - calls[True]
    rows = hidden[:, prefix:].gather(1, kept[..., None].expand(-1, -1, hidden.shape[2]))
    return torch.cat([hidden[:, :prefix], rows], dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_dropping_tokens_equals_masking_them_forward_and_gradient(name: str) -> None:
    encoder = strong(name)
    hidden = tokens(encoder)
    inputs = {
        "input": hidden,
        **{key: p for key, p in encoder.named_parameters() if "blocks" in key or "layers" in key},
    }
    ours, theirs = run_kept(encoder, hidden, KEPT_MK), run_masked(encoder, hidden, KEPT_MK)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    weight = torch.randn_like(ours)
    mine = torch.autograd.grad((ours * weight).sum(), list(inputs.values()))
    expected = torch.autograd.grad((theirs * weight).sum(), list(inputs.values()))
    for key, gradient, other in zip(inputs, mine, expected, strict=True):
        scale = other.abs().max().clamp(min=1e-3)
        assert (gradient - other).abs().max() < 1e-4 * scale, key


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_the_path_of_dropped_tokens_with_nothing_dropped_is_the_library(name: str) -> None:
    encoder = strong(name)
    hidden, positions = tokens(encoder), full_grid(encoder, 2)
    expected = run(encoder, hidden, positions)
    with mock.patch.object(type(encoder), "_all_present", return_value=False):
        torch.testing.assert_close(run(encoder, hidden, positions), expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_global_attention_of_sam_in_chunks_is_that_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = strong("sam")
    whole = run_kept(encoder, tokens(encoder), KEPT_MK)
    monkeypatch.setattr(sam_module, "BIAS_ELEMENTS", 2 * 4 * 13 * 5)
    torch.testing.assert_close(run_kept(encoder, tokens(encoder), KEPT_MK), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_bfloat16_with_dropped_tokens_stays_close(name: str) -> None:
    encoder = tower(name)
    hidden = tokens(encoder)
    exact = run_kept(encoder, hidden, KEPT_MK)
    rounded = run_kept(encoder.to(torch.bfloat16), hidden.to(torch.bfloat16), KEPT_MK)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("name", ["eva02", "eva02_det_padded", "sam_padded"])
def test_blocks_compile_without_a_break_and_agree(name: str) -> None:
    encoder = strong(name)
    hidden = tokens(encoder)

    def first_two(kept_MTD: Tensor) -> Tensor:  # with windows, without
        return encoder.run_block(1, encoder.run_block(0, kept_MTD, KEPT_MK), KEPT_MK)

    present = hidden[:, : encoder.num_prefix_tokens + KEPT_MK.shape[1]]
    expected = first_two(present)
    ours = torch.compile(first_two, fullgraph=True, backend="aot_eager")(present)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)
    (ours_grad,) = torch.autograd.grad(ours.square().sum(), hidden)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), hidden)
    torch.testing.assert_close(ours_grad, expected_grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_recomputed_once_with_dropped_tokens_too(name: str) -> None:
    encoder = strong(name).train()
    module: Any
    for module in encoder.modules():  # what `gradient_checkpointing_enable` of transformers sets
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
            module._gradient_checkpointing_func = lambda *args: checkpoint(*args, use_reentrant=False)
    runs = Counter[int]()
    block: Any
    for index, block in enumerate(encoder.blocks):
        block.mlp.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
    images = encoder.normalize(pixels(2), torch.float32)
    encode_pruned(encoder, images, (40, 24, 10), 2, 7)[0].hidden.sum().backward()
    assert runs == Counter({0: 2, 1: 2, 2: 2, 3: 2})


# ----------------------------------------------------------------------------------------------------------- scores


def attention_map(encoder: VisionEncoder, index: int, hidden: Tensor) -> Tensor:
    """The attention probabilities (M, H, T, T) that the library's own module computes."""
    block: Any = encoder.blocks[index]
    if encoder.config.family == "sam":
        _, weights = block.attn(block.layer_norm1(hidden.unflatten(1, (8, 8))))
        return weights.unflatten(0, (len(hidden), -1))
    seen: list[Tensor] = []
    block.attn.fused_attn = False
    with block.attn.attn_drop.register_forward_hook(lambda _, __, output: seen.append(output)):
        block(hidden, rope=encoder.tower.rope.get_embed(shape=(8, 8)))
    return seen[0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_importance_is_read_off_the_attention_of_the_library(name: str) -> None:
    """On all tokens, and on the kept ones: their map is that of all tokens, cut out and normalised again."""
    encoder = strong(name)
    if encoder.config.family == "sam":
        encoder = strong(name, tower={**encoder.config.tower, "attn_implementation": "eager"})
    prefix, hidden = encoder.num_prefix_tokens, tokens(encoder)
    full = attention_map(encoder, 1, hidden).double()
    for positions in (full_grid(encoder, 2), KEPT_MK):
        index = torch.cat([torch.arange(prefix).expand(2, -1), prefix + positions], dim=1)
        maps = torch.stack([full[m][:, index[m]][:, :, index[m]] for m in range(2)])
        maps = (maps / maps.sum(-1, keepdim=True)).mean(1)
        present = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
        middle = [positions.shape[1] // 4, positions.shape[1] * 3 // 4]
        for queries, rows in ((None, slice(None)), (1000, slice(None)), (2, middle)):
            expected = maps[:, 0, 1:] if prefix else maps[:, rows].mean(1)
            scores = encoder.importance(1, present, positions, queries)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["eva02_det", "sam"])
def test_tokens_are_scored_by_a_global_block_or_not_at_all(name: str) -> None:
    encoder = tower(name)
    assert [encoder.score_block(end) for end in (1, 2, 3, 4)] == [-1, 1, 1, 3]
    with pytest.raises(ValueError, match=rf"'{name}': block 2 attends within windows.*\[1, 3\]"):
        encoder.importance(2, tokens(encoder), full_grid(encoder, 2), None)
    images = encoder.normalize(pixels(1), torch.float32)
    with pytest.raises(ValueError, match=rf"'{name}': the segment of blocks 0\.\.0 has no block"):
        encode_pruned(encoder, images, (40, 24, 10), 1, None)


# ---------------------------------------------------------------------------------------------------- EVA-02 and SAM


@pytest.mark.parametrize(("side", "trained"), [(16, 16), (64, 16)])
def test_rotations_are_those_of_the_published_detector(side: int, trained: int) -> None:
    """Angles: position / side * trained * 10000 ** (-2 i / (d / 2)), rows in the first half of the head."""
    encoder = encoder_class("eva02_det")(
        EncoderConfig(
            "det", "eva02_det", 1024, {"depth": 1, "ref_feat_shape": 16, "window_size": 16, "global_blocks": [0]}
        )
    )
    width = 64
    table = encoder.tower.rope.get_embed(shape=(side, side))
    frequency = 10000.0 ** -(torch.arange(0, width // 2, 2) / (width // 2))
    angle = (torch.arange(side) / side * trained)[:, None] * frequency
    row, column = torch.arange(side * side) // side, torch.arange(side * side) % side
    angles = torch.cat([angle[row], angle[column]], dim=1).repeat_interleave(2, dim=1)
    torch.testing.assert_close(table, torch.cat([angles.sin(), angles.cos()], dim=1), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_full_neck_sees_dropped_cells_as_zero_and_the_short_one_sees_none() -> None:
    encoder = strong("sam")
    kept = torch.randn(2, 13, 32)
    grid = torch.zeros(2, 64, 32)
    for image in range(2):
        grid[image, KEPT_MK[image]] = kept[image]
    expected = encoder.tower.vision_encoder.neck(grid.unflatten(1, (8, 8))).flatten(2)
    finished = encoder.finish(kept, KEPT_MK)
    for image in range(2):
        torch.testing.assert_close(finished[image], expected[image][:, KEPT_MK[image]].T)
    short = strong("sam_short")
    neck = short.tower.vision_encoder.neck
    norm = neck.layer_norm1
    literal = F.layer_norm(kept @ neck.conv1.weight[:, :, 0, 0].T, (16,), norm.weight, norm.bias, norm.eps)
    assert literal.shape == (2, 13, short.embed_dim)
    torch.testing.assert_close(short.finish(kept, KEPT_MK), literal)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("eva02", {"depht": 3}, "'eva02': timm's Eva has no argument 'depht'"),
        ("eva02", {"class_token": False}, "'eva02': family 'eva02' needs class_token=True, not False"),
        ("eva02", {"rope_type": "mixed"}, "'eva02': family 'eva02' needs rope_type='cat', not 'mixed'"),
        ("eva02_det", {"class_token": True}, "'eva02_det': family 'eva02_det' needs class_token=False, not True"),
        ("eva02_det", {"window_size": 0}, "'eva02_det': window_size must be at least 1, got 0"),
        ("eva02_det", {"global_blocks": [1, 4]}, r"'eva02_det': global_blocks must be some of 0..3, got \[1, 4\]"),
        ("eva02_det", {"global_blocks": []}, r"'eva02_det': global_blocks must be some of 0..3, got \[\]"),
        ("sam", {"window": 3}, "'sam': SamVisionConfig has no setting 'window'; did you mean 'window_size'"),
        ("sam", {"neck": "long"}, "'sam': neck must be one of full, short, got 'long'"),
    ],
)
def test_bad_towers_name_the_encoder_and_the_setting(name: str, changes: dict[str, Any], message: str) -> None:
    base = TOWERS[name]
    config = EncoderConfig(name, base.family, 64, {**base.tower, **changes})
    with pytest.raises(ValueError, match=message):
        encoder_class(base.family).grid_size(config)


def test_the_detector_layout_needs_its_windows() -> None:
    config = EncoderConfig("det", "eva02_det", 64, {"depth": 4, "patch_size": 8})
    with pytest.raises(ValueError, match="'det': the tower of family 'eva02_det' needs 'window_size'"):
        encoder_class("eva02_det").grid_size(config)
