"""Every registered family: run in segments it is the library's own tower; pruned, it keeps the right tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from meteor_model.encode import dense_maps, encode_pruned, segment_ends
from meteor_model.encoders import ENCODERS, EncoderConfig, VisionEncoder, encoder_class
from meteor_model.encoders.clip import ClipEncoder
from meteor_model.encoders.pix2struct import Pix2StructEncoder
from tests.meteor_model.builders import pixels
from tests.meteor_model.towers import TOWERS, full_grid, library_forward, library_tokens, tower

EVERY = sorted(TOWERS)
PRUNED_INSIDE = [name for name in EVERY if encoder_class(TOWERS[name].family).prunes_between_blocks]
CONVOLUTIONAL = [name for name in EVERY if name not in PRUNED_INSIDE]
#: Families whose blocks attend within windows: what masking a token means there is tested in test_window_towers.py.
WINDOWED = ("eva02_det", "sam")
BUDGETS = (40, 24, 10)


def inputs(encoder: VisionEncoder, count: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return encoder.normalize(pixels(count), dtype)


def _by_score(scores: Sequence[float], index: int) -> tuple[float, int]:
    return -scores[index], index


def joined(tokens: Any) -> torch.Tensor:
    return torch.cat([tokens.prefix, tokens.hidden], dim=1)


def budgets_of(encoder: VisionEncoder) -> tuple[int, ...]:
    return BUDGETS if encoder.prunes_between_blocks else BUDGETS[-1:]


def test_a_tower_is_tested_for_every_registered_family() -> None:
    assert {config.family for config in TOWERS.values()} == set(ENCODERS)


# ------------------------------------------------------------------------------------------------- unpruned = library


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_segments_without_pruning_equal_the_library_forward(name: str, size: int) -> None:
    """At the tower's own resolution, and at another one with positions as the library interpolates them."""
    encoder = tower(name, image_size=size)
    images = inputs(encoder)
    assert images.shape[-2:] == (size, size)
    positions = full_grid(encoder, 2)
    tokens, kept = encode_pruned(encoder, images, [positions.shape[1]] * 3, 2, None)
    assert torch.equal(joined(tokens), library_tokens(encoder, images))
    assert tokens.prefix.shape[1] == encoder.num_prefix_tokens
    assert torch.equal(kept[-1], positions)
    assert len(encoder.blocks) == encoder.num_blocks(encoder.config)
    assert tokens.hidden.shape[2] == encoder.embed_dim


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_dense_maps_are_the_hidden_states_at_the_boundaries(name: str) -> None:
    encoder = tower(name)
    images = inputs(encoder)
    maps = dense_maps(encoder, images, 3)
    if not encoder.prunes_between_blocks:
        assert len(maps) == 1
        assert torch.equal(maps[0], library_tokens(encoder, images))
        return
    hidden = encoder.embed(images)
    states = [hidden]
    for index in range(len(encoder.blocks)):
        hidden = encoder.run_block(index, hidden, full_grid(encoder, 2))
        states.append(hidden)
    for boundary, end in enumerate(segment_ends(len(encoder.blocks), 3)):
        assert torch.equal(maps[boundary], states[end][:, encoder.num_prefix_tokens :])


# ---------------------------------------------------------------------------------------------------- pruned = oracle


@pytest.mark.parametrize("queries", [None, 7])
@pytest.mark.parametrize("name", PRUNED_INSIDE)
@torch.no_grad()
def test_pruned_run_equals_a_literal_rerun_over_the_kept_tokens(name: str, queries: int | None) -> None:
    """Oracle: the tower's blocks called by hand, image by image, on explicitly indexed tokens."""
    encoder = tower(name)
    images = inputs(encoder, 3)
    tokens, kept = encode_pruned(encoder, images, BUDGETS, 2, queries)
    prefix = encoder.num_prefix_tokens
    for sample in range(3):
        hidden = encoder.embed(images[sample : sample + 1])
        alive = list(range(hidden.shape[1] - prefix))
        start = 0
        for segment, (end, budget) in enumerate(zip(segment_ends(len(encoder.blocks), 3), BUDGETS, strict=True)):
            before = {}
            for index in range(start, end):
                before[index] = hidden
                hidden = encoder.run_block(index, hidden, torch.tensor([alive]))
            start = end
            if segment == 0:
                patches = hidden[0, prefix:]
                mean = patches.mean(0)
                scores = [-torch.cosine_similarity(token, mean, dim=0).item() for token in patches]
            else:
                scorer = encoder.score_block(end)
                scores = encoder.importance(scorer, before[scorer], torch.tensor([alive]), queries)[0].tolist()
            chosen = sorted(sorted(range(len(alive)), key=partial(_by_score, scores))[:budget])
            alive = [alive[i] for i in chosen]
            hidden = torch.cat([hidden[:, :prefix], hidden[:, [prefix + i for i in chosen]]], dim=1)
            assert kept[segment][sample].tolist() == alive
        expected = encoder.finish(hidden, torch.tensor([alive]))[0]
        torch.testing.assert_close(joined(tokens)[sample], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in PRUNED_INSIDE if TOWERS[n].family not in WINDOWED])
@torch.no_grad()
def test_dropping_tokens_equals_masking_them(name: str) -> None:
    """Oracle: every token stays in every block, but the dropped ones are masked out of attention as keys."""
    encoder = tower(name)
    images = inputs(encoder)
    tokens, kept = encode_pruned(encoder, images, BUDGETS, 2, None)
    prefix, positions = encoder.num_prefix_tokens, full_grid(encoder, 2)
    hidden = encoder.embed(images)
    present = torch.ones(hidden.shape[:2], dtype=torch.bool)
    attention = F.scaled_dot_product_attention

    def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return attention(query, key, value, *args, **{**kwargs, "attn_mask": present[:, None, None]})

    start = 0
    with mock.patch.object(F, "scaled_dot_product_attention", masked) as patched:
        assert F.scaled_dot_product_attention is patched
        for end, kept_MK in zip(segment_ends(len(encoder.blocks), 3), kept, strict=True):
            for index in range(start, end):
                hidden = encoder.run_block(index, hidden, positions)
            start = end
            present = torch.zeros_like(present).scatter(1, prefix + kept_MK, True)
            present[:, :prefix] = True
    expected = encoder.finish(hidden, positions)[present].unflatten(0, (2, -1))
    torch.testing.assert_close(joined(tokens), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CONVOLUTIONAL)
@torch.no_grad()
def test_a_convolutional_tower_is_pruned_at_its_output_only(name: str) -> None:
    encoder = tower(name)
    images = inputs(encoder)
    dense = library_tokens(encoder, images)
    tokens, kept = encode_pruned(encoder, images, [10], 2, None)
    assert len(kept) == 1
    for sample in range(2):
        mean = dense[sample].mean(0)
        similarity = [torch.cosine_similarity(token, mean, dim=0).item() for token in dense[sample]]
        expected = sorted(sorted(range(64), key=partial(_by_score, [-value for value in similarity]))[:10])
        assert kept[0][sample].tolist() == expected
        assert torch.equal(tokens.hidden[sample], dense[sample, expected])


# ----------------------------------------------------------------------------------------------------------- scores


def attention_maps(name: str) -> tuple[VisionEncoder, torch.Tensor, list[torch.Tensor]]:
    """A tower, its images and the attention maps (M, H, T, T) that the library itself returns."""
    encoder = tower(name, tower={**TOWERS[name].tower, "attn_implementation": "eager"})
    images = inputs(encoder)
    with torch.no_grad():
        maps = library_forward(encoder, images, output_attentions=True).attentions
    assert len(maps) == len(encoder.blocks)
    return encoder, images, list(maps)


@pytest.mark.parametrize("name", [n for n in PRUNED_INSIDE if TOWERS[n].family not in ("eva02", *WINDOWED)])
@torch.no_grad()
def test_importance_is_read_off_the_attention_maps_of_the_library(name: str) -> None:
    encoder, images, maps = attention_maps(name)
    prefix, positions = encoder.num_prefix_tokens, full_grid(encoder, 2)
    hidden = encoder.embed(images)
    for index, map_MHTT in enumerate(maps):
        mean_MTT = map_MHTT.double().mean(1)
        for queries, rows in ((None, range(64)), (64, range(64)), (4, (8, 24, 40, 56))):
            expected = mean_MTT[:, 0, prefix:] if prefix else mean_MTT[:, list(rows)].mean(1)
            scores = encoder.importance(index, hidden, positions, queries)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, expected.float(), rtol=2e-5, atol=1e-8)
        hidden = encoder.run_block(index, hidden, positions)


class Adapter(nn.Module):
    """What an adapter library puts around a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, torch.zeros(())  # a weight that must not be taken for the layer's
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


@torch.no_grad()
def test_an_adapted_key_projection_is_run_not_read() -> None:
    encoder = tower("clip")
    block: Any = encoder.blocks[2].self_attn
    adapter = Adapter(block.k_proj)
    block.k_proj = adapter
    hidden, positions = encoder.embed(inputs(encoder)), full_grid(encoder, 2)
    adapted = encoder.importance(2, hidden, positions, None)
    merged = nn.Linear(32, 32)
    merged.weight.copy_(adapter.base.weight + adapter.up.weight @ adapter.down.weight)
    merged.bias.copy_(adapter.base.bias)
    block.k_proj = merged
    torch.testing.assert_close(adapted, encoder.importance(2, hidden, positions, None))


class EarlyScorer(ClipEncoder):
    """Scores by the first of four blocks, wherever the boundary is."""

    def score_block(self, end: int) -> int:
        return 0


@torch.no_grad()
def test_a_scoring_block_may_lie_anywhere_in_its_segment_but_not_outside() -> None:
    torch.manual_seed(0)
    encoder = EarlyScorer(TOWERS["clip"]).eval()
    images = inputs(encoder)
    _, (kept,) = encode_pruned(encoder, images, [10], 1, None)
    scores = encoder.importance(0, encoder.embed(images), full_grid(encoder, 2), None)
    assert torch.equal(kept, scores.topk(10).indices.sort().values)
    with pytest.raises(ValueError, match=r"'clip': the segment of blocks 2\.\.3 has no block .* before its end is 0"):
        encode_pruned(encoder, images, [40, 10], 2, None)


@torch.no_grad()
def test_features_that_are_not_finite_are_an_error_not_a_selection() -> None:
    encoder = tower("clip")
    cast(nn.LayerNorm, encoder.blocks[3].layer_norm1).weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"48 of 256 token scores are NaN"):
        encode_pruned(encoder, inputs(encoder), BUDGETS, 2, None)


# --------------------------------------------------------------------------------- precision, gradients, meta device


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_bfloat16_runs_and_stays_close(name: str) -> None:
    encoder = tower(name)
    exact = library_tokens(encoder, inputs(encoder))
    encoder = encoder.to(torch.bfloat16)
    images = inputs(encoder, dtype=torch.bfloat16)
    tokens, _ = encode_pruned(encoder, images, [64] * 3, 2, None)
    assert tokens.hidden.dtype == torch.bfloat16
    assert (joined(tokens).float() - exact).norm() < 0.03 * exact.norm()
    pruned, kept = encode_pruned(encoder, images, budgets_of(encoder), 2, 7)
    assert pruned.hidden.dtype == torch.bfloat16
    assert bool(pruned.hidden.isfinite().all())
    assert kept[-1].shape == (2, 10)


@pytest.mark.parametrize("name", EVERY)
def test_gradients_reach_every_parameter_that_the_kept_tokens_use(name: str) -> None:
    encoder = tower(name).train()
    tokens, _ = encode_pruned(encoder, inputs(encoder), budgets_of(encoder), 2, None)
    tokens.hidden.square().sum().backward()
    unused = {key for key, parameter in encoder.tower.named_parameters() if parameter.grad is None}
    # What the library uses for pooling or pre-training only.
    idle: tuple[str, ...] = ("post_layernorm", "layernorm", "embeddings.mask_token", "fc_norm")
    if name == "sam_short":
        idle += ("vision_encoder.neck.conv2", "vision_encoder.neck.layer_norm2")
    assert all(key.startswith(idle) for key in unused), unused


class Holder(PreTrainedModel):
    """A model of transformers around one tower, for its switch of gradient checkpointing."""

    supports_gradient_checkpointing = True

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__(PreTrainedConfig())
        self.encoder = encoder


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_checkpointing_recomputes_each_block_once_and_changes_no_gradient(name: str, reentrant: bool) -> None:
    encoder = tower(name).train()
    images, budgets = inputs(encoder), budgets_of(encoder)

    def gradients(budgets: tuple[int, ...]) -> dict[str, torch.Tensor]:
        encoder.zero_grad()
        # Cubes: the squares of normalised tokens add up to a constant, whose gradient is rounding.
        encode_pruned(encoder, images, budgets, 2, None)[0].hidden.pow(3).sum().backward()
        return {key: p.grad.clone() for key, p in encoder.named_parameters() if p.grad is not None}

    expected = gradients(budgets)
    Holder(encoder).gradient_checkpointing_enable({"use_reentrant": reentrant})
    recomputed = gradients(budgets)
    assert expected.keys() == recomputed.keys()
    for key, gradient in expected.items():
        # The reentrant kind is a backward pass of its own per block; kernels of convolutions, and of attention with
        # SAM's biases, may differ by rounding.
        tolerance = (2e-5 if TOWERS[name].family == "sam" else 1e-6) * float(gradient.abs().max()) if reentrant else 0.0
        torch.testing.assert_close(recomputed[key], gradient, rtol=0.0, atol=tolerance, msg=key)

    runs: Counter[int] = Counter()
    for index, block in enumerate(encoder.blocks):
        first = next(module for module in block.modules() if not list(module.children()))
        first.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
    gradients((64,) * len(budgets))
    assert runs == Counter(dict.fromkeys(range(len(encoder.blocks)), 2))


@pytest.mark.parametrize("name", EVERY)
def test_shapes_alone_run_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        encoder = tower(name)
    images = torch.empty(2, 3, 64, 64, device="meta")
    tokens, kept = encode_pruned(encoder, images, budgets_of(encoder), 2, 7)
    assert tokens.hidden.shape == (2, 10, encoder.embed_dim)
    assert [positions.shape[1] for positions in kept] == list(budgets_of(encoder))


def test_batch_norm_statistics_do_not_move() -> None:
    encoder = tower("timm_efficientnet").train()
    before = {key: value.clone() for key, value in encoder.named_buffers()}
    encode_pruned(encoder, inputs(encoder), [10], 2, None)
    assert before
    assert all(torch.equal(value, before[key]) for key, value in encoder.named_buffers())


# ------------------------------------------------------------------------------------------------------- bad settings


def test_pix2struct_patches_are_those_of_the_library_processor() -> None:
    from transformers.models.pix2struct.image_processing_pix2struct import Pix2StructImageProcessor

    encoder = tower("pix2struct")
    image = pixels(1)
    processor = Pix2StructImageProcessor(patch_size={"height": 8, "width": 8}, max_patches=64)
    theirs = processor(image[0], return_tensors="pt")["flattened_patches"]
    ours = cast(Pix2StructEncoder, encoder).flatten_patches(encoder.normalize(image, torch.float32))
    torch.testing.assert_close(ours[:, :, :2], theirs[:, :, :2])
    # Theirs standardises values of 0..255, ours of -1..1: the same up to the order of operations.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_segment_ends_cut_evenly() -> None:
    assert segment_ends(24, 3) == (8, 16, 24)
    assert segment_ends(4, 3) == (1, 3, 4)
    assert segment_ends(18, 3) == (6, 12, 18)


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown encoder family 'convnet'.*did you mean 'convnext'"):
        encoder_class("convnet")


def test_bad_tower_configurations_name_the_encoder() -> None:
    with pytest.raises(ValueError, match=r"'clip': image_size 60 is not a multiple of patch size 8"):
        encoder_class("clip").grid_size(EncoderConfig("clip", "clip", 60, TOWERS["clip"].tower))
    with pytest.raises(ValueError, match="patch_embed_hidden_size 200"):
        encoder_class("pix2struct").grid_size(
            EncoderConfig("p", "pix2struct", 64, {**TOWERS["pix2struct"].tower, "patch_embed_hidden_size": 200})
        )
    with pytest.raises(ValueError, match=r"encoder name 'a\.b'"):
        EncoderConfig("a.b", "clip", 64, {})


@pytest.mark.parametrize(
    ("name", "size", "tower_changes", "message"),
    [
        ("clip", 64, {"hiden_size": 3}, "'clip': CLIPVisionConfig has no setting 'hiden_size'; did you mean 'hidden_s"),
        ("vit", 64, {"patch_size": [8, 4]}, r"'vit': patch_size must be one number .*got \[8, 4\]"),
        ("pix2struct", 64, {"seq_len": 8}, r"'pix2struct': image_size 64 has 8 rows of patches, the tower 8 row embed"),
        ("timm_resnet", 68, {}, "'timm_resnet': image_size 68 is not a multiple of patch size 8"),
        ("timm_resnet", 64, {"model_name": "resnet81"}, "'timm_resnet'.*timm has no model 'resnet81'.*near: "),
        ("timm_resnet", 64, {"stage": 9}, "'timm_resnet': cannot build"),
        ("timm_resnet", 64, {"model_name": "vit_tiny_patch16_224"}, "'timm_resnet': cannot build"),
    ],
)
def test_bad_towers_are_refused_from_the_configuration(
    name: str, size: int, tower_changes: dict[str, Any], message: str
) -> None:
    base = TOWERS[name]
    config = EncoderConfig(name, base.family, size, {**base.tower, **tower_changes})
    with pytest.raises(ValueError, match=message):
        encoder_class(base.family).grid_size(config)
