"""Every registered family: run in segments it is the library's own tower; pruned, it keeps the right tokens."""

from __future__ import annotations

import pytest
import torch

from meteor_model.encode import dense_maps, encode_pruned, segment_ends
from meteor_model.encoders import ENCODERS, EncoderConfig, VisionEncoder, build_encoder, encoder_class
from tests.model.builders import TOWERS, pixels


def tower(family: str, **changes: object) -> VisionEncoder:
    torch.manual_seed(0)
    base = TOWERS[family]
    return build_encoder(
        EncoderConfig(base.name, base.family, **{"image_size": 64, "tower": base.tower, **changes})
    ).eval()


def library_forward(encoder: VisionEncoder, images: torch.Tensor) -> torch.Tensor:
    """The library's own forward: (M, P + N, D)."""
    if encoder.config.family == "pix2struct":
        return encoder.tower(flattened_patches=encoder.flatten_patches(images)).last_hidden_state
    interpolate = {"interpolate_pos_encoding": True} if encoder.config.image_size != 64 else {}
    output = encoder.tower(images, **interpolate).last_hidden_state
    return output.flatten(2).transpose(1, 2) if encoder.config.family == "convnext" else output


def test_a_tower_is_tested_for_every_registered_family() -> None:
    assert set(TOWERS) == set(ENCODERS)


@pytest.mark.parametrize("family", sorted(ENCODERS))
@torch.no_grad()
def test_segments_without_pruning_equal_the_library_forward(family: str) -> None:
    encoder = tower(family)
    images = encoder.normalize(pixels(2), torch.float32)
    rows, columns = encoder.grid_size(encoder.config)
    tokens, kept = encode_pruned(encoder, images, [rows * columns] * 3, 2, None)
    expected = library_forward(encoder, images)
    assert torch.equal(torch.cat([tokens.prefix, tokens.hidden], dim=1), expected)
    assert tokens.prefix.shape[1] == encoder.num_prefix_tokens
    assert torch.equal(kept[-1], torch.arange(rows * columns).expand(2, -1))
    assert len(encoder.blocks) == encoder.num_blocks(encoder.config)
    assert tokens.hidden.shape[2] == encoder.embed_dim


@pytest.mark.parametrize("family", ["clip", "siglip"])
@torch.no_grad()
def test_another_resolution_interpolates_positions_as_the_library_does(family: str) -> None:
    encoder = tower(family, image_size=96)
    images = encoder.normalize(pixels(2), torch.float32)
    assert images.shape[-2:] == (96, 96)
    tokens, _ = encode_pruned(encoder, images, [144] * 3, 2, None)
    assert torch.equal(torch.cat([tokens.prefix, tokens.hidden], dim=1), library_forward(encoder, images))


@pytest.mark.parametrize("family", [f for f in sorted(ENCODERS) if ENCODERS[f].prunes_between_blocks])
@torch.no_grad()
def test_pruned_run_equals_a_literal_rerun_over_the_kept_tokens(family: str) -> None:
    """Oracle: the tower's blocks called by hand on explicitly indexed tokens, scores from full attention matrices."""
    encoder = tower(family)
    images = encoder.normalize(pixels(3), torch.float32)
    budgets = (40, 24, 10)
    tokens, kept = encode_pruned(encoder, images, budgets, 2, None)
    for sample in range(3):
        hidden = encoder.embed(images[sample : sample + 1])
        prefix = encoder.num_prefix_tokens
        alive = list(range(hidden.shape[1] - prefix))
        start = 0
        for segment, (end, budget) in enumerate(zip(segment_ends(len(encoder.blocks), 3), budgets, strict=True)):
            for index in range(start, end):
                before = hidden
                hidden = encoder.run_block(index, hidden, torch.tensor([alive]))
            start = end
            if segment == 0:
                patches = hidden[0, prefix:]
                mean = patches.mean(0)
                scores = [-torch.cosine_similarity(token, mean, dim=0).item() for token in patches]
            else:
                scores = literal_attention(encoder, end - 1, before)[prefix:].tolist()
            order = sorted(range(len(alive)), key=lambda i, s=scores: (-s[i], i))[:budget]
            chosen = sorted(order)
            alive = [alive[i] for i in chosen]
            hidden = torch.cat([hidden[:, :prefix], hidden[:, [prefix + i for i in chosen]]], dim=1)
            assert kept[segment][sample].tolist() == alive
        expected = encoder.finish(hidden, torch.tensor([alive]))[0]
        torch.testing.assert_close(tokens.hidden[sample], expected[prefix:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(tokens.prefix[sample], expected[:prefix], rtol=1e-5, atol=1e-6)


def literal_attention(encoder: VisionEncoder, index: int, before: torch.Tensor) -> torch.Tensor:
    """CLS row, or column mean, of the block's full attention matrix, written out head by head."""
    parts = encoder.score_projections(index)
    normed = parts.norm(before)[0]
    query, key = parts.query(normed), parts.key(normed)
    width = query.shape[1] // parts.num_heads
    rows = []
    for head in range(parts.num_heads):
        columns = slice(head * width, (head + 1) * width)
        attention = torch.softmax(query[:, columns] @ key[:, columns].T * parts.scaling, dim=-1)
        rows.append(attention[0] if encoder.num_prefix_tokens else attention.mean(0))
    return torch.stack(rows).mean(0)


@torch.no_grad()
def test_a_convolutional_tower_is_pruned_at_its_output_only() -> None:
    encoder = tower("convnext")
    images = encoder.normalize(pixels(2), torch.float32)
    dense = library_forward(encoder, images)
    tokens, kept = encode_pruned(encoder, images, [10], 2, None)
    assert len(kept) == 1
    for sample in range(2):
        mean = dense[sample].mean(0)
        similarity = [torch.cosine_similarity(token, mean, dim=0).item() for token in dense[sample]]
        expected = sorted(sorted(range(64), key=lambda i: (similarity[i], i))[:10])
        assert kept[0][sample].tolist() == expected
        assert torch.equal(tokens.hidden[sample], dense[sample, expected])


@pytest.mark.parametrize("family", sorted(ENCODERS))
@torch.no_grad()
def test_dense_maps_are_the_hidden_states_at_the_boundaries(family: str) -> None:
    encoder = tower(family)
    images = encoder.normalize(pixels(2), torch.float32)
    maps = dense_maps(encoder, images, 3)
    if not encoder.prunes_between_blocks:
        assert len(maps) == 1
        assert torch.equal(maps[0], library_forward(encoder, images))
        return
    ends = segment_ends(len(encoder.blocks), 3)
    hidden = encoder.embed(images)
    states = [hidden]
    for index in range(len(encoder.blocks)):
        hidden = encoder.run_block(index, hidden, torch.arange(64).expand(2, -1))
        states.append(hidden)
    for boundary, end in enumerate(ends):
        assert torch.equal(maps[boundary], states[end][:, encoder.num_prefix_tokens :])


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_gradients_reach_every_parameter_that_the_kept_tokens_use(family: str) -> None:
    encoder = tower(family).train()
    images = encoder.normalize(pixels(2), torch.float32)
    budgets = [40, 24, 10] if encoder.prunes_between_blocks else [10]
    tokens, _ = encode_pruned(encoder, images, budgets, 2, None)
    tokens.hidden.square().sum().backward()
    unused = {name for name, parameter in encoder.tower.named_parameters() if parameter.grad is None}
    # What the library uses for pooling only: CLIP's post_layernorm, ConvNeXt's final layernorm.
    assert all("post_layernorm" in name or name.startswith("layernorm") for name in unused), unused


def test_pix2struct_patches_are_those_of_the_library_processor() -> None:
    from transformers.models.pix2struct.image_processing_pix2struct import Pix2StructImageProcessor

    encoder = tower("pix2struct")
    image = pixels(1)
    processor = Pix2StructImageProcessor(patch_size={"height": 8, "width": 8}, max_patches=64)
    theirs = processor(image[0], return_tensors="pt")["flattened_patches"]
    ours = encoder.flatten_patches(encoder.normalize(image, torch.float32))
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
