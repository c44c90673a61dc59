"""Weights of the parts: every family from the library's own folders, and every way a checkpoint can be wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from meteor_model.encoders import ENCODERS, EncoderConfig, VisionEncoder, build_encoder
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.weights import checksum, load_encoder, load_llm, load_parts
from meteor_model.weights.checkpoints import WeightsError, parse_source
from meteor_model.weights.names import FAMILIES
from tests.meteor_model.builders import DENSE, config, model
from tests.meteor_model.towers import library_tokens

VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 16,
}
DINO = {key: value for key, value in VIT.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
SIGLIP2 = {key: value for key, value in VIT.items() if key != "image_size"} | {"num_patches": 16}
PIX2STRUCT = {
    "hidden_size": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_embed_hidden_size": 192,
    "seq_len": 64,
    "initializer_range": 0.02,
}
CONVNEXT = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_stages": 2}
SAM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "window_size": 3,
    "global_attn_indexes": [1],
    "output_channels": 16,
    "mlp_dim": 48,
}
EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}
EVA_DETECTOR = {
    **EVA,
    "qkv_fused": False,
    "swiglu_mlp": True,
    "scale_mlp": True,
    "window_size": 2,
    "global_blocks": [1],
}
EFFICIENTNET = {"model_name": "tf_efficientnet_lite0", "stage": -1}


@dataclass(frozen=True)
class Case:
    """A published kind of checkpoint: the larger model that is stored, and the tower that takes its part of it."""

    family: str
    tower: dict[str, Any]
    store: Callable[[Path], Any]
    inner: Callable[[Any], Any]


def _stored(build: Callable[[], Any]) -> Callable[[Path], Any]:
    def store(folder: Path) -> Any:
        whole = build().eval()
        with torch.no_grad():  # library initialisations leave zeros, which would hide a mistake
            for parameter in whole.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        whole.save_pretrained(folder)
        return whole

    return store


def _timm(build: Callable[[], torch.nn.Module], rename: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    def store(folder: Path) -> Any:
        whole = build().eval()
        with torch.no_grad():
            for parameter in whole.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        state = {name: tensor.clone().contiguous() for name, tensor in rename(whole.state_dict()).items()}
        save_file(state, folder / "model.safetensors")
        return whole

    return store


def _detector_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Timm's names as EVA-02's detectron2 checkpoints have them, with the detector around the backbone."""
    renamed = {}
    for name, tensor in state.items():
        for new, old in (("mlp.fc1_g", "mlp.w1"), ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3")):
            name = name.replace(new, old)
        name = name.replace("mlp.norm", "mlp.ffn_ln").replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias")
        if name == "pos_embed":  # of the pre-training: with the position of CLS in front
            tensor = torch.cat([torch.full_like(tensor[:, :1], 7.0), tensor], dim=1)
        renamed[f"backbone.net.{name}"] = tensor
    width = state["pos_embed"].shape[-1]
    for block in range(2):
        for kind in ("freqs_cos", "freqs_sin"):
            renamed[f"backbone.net.blocks.{block}.attn.rope.{kind}"] = torch.rand(16, 8)
    renamed |= {f"backbone.net.rope_{kind}.freqs_cos": torch.rand(16, 8) for kind in ("win", "glb")}
    renamed["backbone.simfp_2.0.weight"] = torch.rand(width, 4)
    renamed["proposal_generator.rpn_head.conv.conv0.weight"] = torch.rand(4, 4)
    renamed["roi_heads.box_predictor.0.cls_score.weight"] = torch.rand(4, 4)
    return renamed


def _eva(family: str, tower: dict[str, Any]) -> Any:
    return build_encoder(EncoderConfig("whole", family, 32, tower)).tower


def _sam_tower(whole: Any) -> Any:
    """SAM's tower alone is the library's model around the same module."""
    tower = hf.SamVisionModel(hf.SamVisionConfig(**SAM)).eval()
    tower.vision_encoder = whole.vision_encoder
    return tower


CASES = {
    "clip": Case(
        "clip",
        VIT,
        _stored(lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=VIT, text_config=TEXT))),
        lambda whole: whole.vision_model,
    ),
    "siglip": Case(
        "siglip",
        VIT,
        _stored(lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=VIT, text_config=TEXT))),
        lambda whole: whole.vision_model,
    ),
    "siglip2": Case(
        "siglip2",
        SIGLIP2,
        _stored(lambda: hf.Siglip2Model(hf.Siglip2Config(vision_config=SIGLIP2, text_config=TEXT))),
        lambda whole: whole.vision_model,
    ),
    "vit": Case(
        "vit", VIT, _stored(lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT))), lambda whole: whole.vit
    ),
    "dinov2": Case(
        "dinov2",
        DINO,
        _stored(lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINO))),
        lambda whole: whole.dinov2,
    ),
    "dinov2_registers": Case(
        "dinov2_registers",
        DINO,
        _stored(lambda: hf.Dinov2WithRegistersForImageClassification(hf.Dinov2WithRegistersConfig(**DINO))),
        lambda whole: whole.dinov2_with_registers,
    ),
    "convnext": Case(
        "convnext",
        CONVNEXT,
        _stored(lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**CONVNEXT))),
        lambda whole: whole.convnext,
    ),
    "pix2struct": Case(
        "pix2struct",
        PIX2STRUCT,
        _stored(
            lambda: hf.Pix2StructForConditionalGeneration(
                hf.Pix2StructConfig(
                    vision_config=PIX2STRUCT,
                    text_config={
                        "vocab_size": 50,
                        "hidden_size": 32,
                        "d_kv": 8,
                        "d_ff": 48,
                        "num_layers": 1,
                        "num_heads": 4,
                    },
                )
            )
        ),
        lambda whole: whole.encoder,
    ),
    "sam": Case(
        "sam",
        SAM,
        _stored(
            lambda: hf.SamModel(
                hf.SamConfig(
                    vision_config=SAM,
                    prompt_encoder_config={"hidden_size": 16, "image_size": 32, "patch_size": 8},
                    mask_decoder_config={
                        "hidden_size": 16,
                        "num_attention_heads": 2,
                        "mlp_dim": 16,
                        "iou_head_hidden_dim": 16,
                    },
                )
            )
        ),
        _sam_tower,
    ),
    "timm_conv": Case(
        "timm_conv", EFFICIENTNET, _timm(lambda: timm.create_model("tf_efficientnet_lite0"), dict), lambda whole: whole
    ),
    "eva02": Case("eva02", EVA, _timm(lambda: _eva("eva02", EVA), dict), lambda whole: whole),
    "eva02_det": Case(
        "eva02_det", EVA_DETECTOR, _timm(lambda: _eva("eva02_det", EVA_DETECTOR), _detector_names), lambda whole: whole
    ),
}


def encoder_of(name: str, **changes: Any) -> VisionEncoder:
    """The case's tower behind its adapter, random; `changes` are arguments of the library's configuration."""
    case = CASES[name]
    torch.manual_seed(1)
    return build_encoder(EncoderConfig("eye", case.family, 32, {**case.tower, **changes})).eval()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Folder and larger model of a case, written once."""
    made: dict[str, tuple[Path, Any]] = {}

    def get(name: str) -> tuple[Path, Any]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            made[name] = folder, CASES[name].store(folder)
        return made[name]

    return get


def test_every_family_has_a_case_and_says_what_its_checkpoints_hold() -> None:
    assert set(ENCODERS) <= set(FAMILIES)
    assert set(ENCODERS) <= set(CASES)


REGISTERED = [name for name, case in CASES.items() if case.family in ENCODERS]


@pytest.mark.parametrize("name", REGISTERED)
def test_a_tower_takes_its_part_of_a_published_kind_of_checkpoint(
    name: str, stored: Callable[[str], tuple[Path, Any]]
) -> None:
    """What the adapter's tower computes is what the larger model's own tower computes."""
    folder, whole = stored(name)
    encoder = encoder_of(name)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = library_tokens(encoder, images)
    part = load_encoder(encoder, str(folder))
    after = library_tokens(encoder, images)
    tensors = encoder.tower.state_dict()
    assert not torch.allclose(before, after, atol=1e-3)
    assert (part.name, part.source, part.tensors) == ("eye", str(folder), len(tensors))
    encoder.tower, inner = CASES[name].inner(whole), encoder.tower
    torch.testing.assert_close(library_tokens(encoder, images), after, rtol=0, atol=0)
    for key, tensor in inner.state_dict().items():  # nothing stayed as it was initialised
        assert key.endswith("num_batches_tracked") or torch.equal(tensor, tensors[key])


@pytest.mark.parametrize("name", REGISTERED)
def test_a_missing_an_extra_and_a_misshapen_tensor_are_named_in_one_error(
    name: str, stored: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = stored(name)
    encoder = encoder_of(name)
    tensors = load_file(folder / "model.safetensors")
    load_encoder(encoder, str(folder))
    ours = encoder.tower.state_dict()
    inside = [key for key, value in tensors.items() if value.ndim > 1 and _own_name(key, value, ours) is not None]
    gone, cut = inside[-1], inside[-2]
    names = [_own_name(key, tensors[key], ours) for key in (gone, cut)]
    shape = tuple(tensors[cut].shape)
    del tensors[gone]
    tensors[cut] = tensors[cut][..., :-1].clone()
    prefix = next((key[: len("backbone.net.")] for key in tensors if key.startswith("backbone.net.")), "")
    tensors[f"{prefix}rogue.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as caught:
        load_encoder(encoder, str(tmp_path))
    message = str(caught.value)
    assert "'eye'" in message
    assert str(tmp_path / "model.safetensors") in message
    assert f"missing (1): {names[0]}" in message
    assert "unexpected (1): rogue.weight" in message
    assert f"of another shape (1): {names[1]} is {(*shape[:-1], shape[-1] - 1)} there and {shape}" in message


def _own_name(key: str, tensor: torch.Tensor, ours: dict[str, torch.Tensor]) -> str | None:
    """The tower's name of a stored tensor, found by its values."""
    found = [name for name, own in ours.items() if own.shape == tensor.shape and torch.equal(own, tensor)]
    return found[0] if len(found) == 1 else None


def test_a_shorter_tower_takes_the_first_blocks_and_lists_the_others(
    stored: Callable[[str], tuple[Path, Any]],
) -> None:
    folder, whole = stored("dinov2")
    encoder = encoder_of("dinov2", num_hidden_layers=1)
    part = load_encoder(encoder, str(folder))
    assert part.dropped
    assert all(name.startswith("encoder.layer.1.") for name in part.dropped)
    assert part.tensors + len(part.dropped) == len(whole.dinov2.state_dict())
    images = torch.randn(1, 3, 32, 32)
    hidden = encoder.run_block(0, encoder.embed(images), torch.arange(16)[None])
    expected = whole.dinov2(images, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(hidden, expected)

    front = encoder_of("timm_conv", stage=2)
    dropped = load_encoder(front, str(stored("timm_conv")[0])).dropped
    assert any(name.startswith("blocks.6.") for name in dropped)
    assert "classifier.weight" in dropped


def test_a_longer_tower_misses_a_block(stored: Callable[[str], tuple[Path, Any]]) -> None:
    with pytest.raises(WeightsError, match=r"missing \(\d+\): encoder\.layers\.2\."):
        load_encoder(encoder_of("clip", num_hidden_layers=3), str(stored("clip")[0]))


@pytest.mark.parametrize(
    ("name", "setting", "message"),
    [
        ("clip", {"layer_norm_eps": 1e-3}, r"layer_norm_eps is 1e-05 there and 0\.001 in the model"),
        ("clip", {"num_attention_heads": 8}, "num_attention_heads is 4 there and 8"),
        ("pix2struct", {"num_attention_heads": 2, "d_kv": 16}, "num_attention_heads is 4 there and 2"),
    ],
)
def test_settings_that_no_shape_shows_are_compared(
    name: str, setting: dict[str, Any], message: str, stored: Callable[[str], tuple[Path, Any]]
) -> None:
    with pytest.raises(WeightsError, match=message):
        load_encoder(encoder_of(name, **setting), str(stored(name)[0]))


def test_nets_of_timm_that_differ_in_padding_alone_are_told_apart(
    stored: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    tensors = load_file(stored("timm_conv")[0] / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "efficientnet_lite0"}))
    with pytest.raises(WeightsError, match="is of efficientnet_lite0, the tower of tf_efficientnet_lite0"):
        load_encoder(encoder_of("timm_conv"), str(tmp_path))


def test_one_file_shards_and_older_formats_hold_the_same_part(
    stored: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, whole = stored("clip")
    tensors = load_file(folder / "model.safetensors")
    shards, old = tmp_path / "shards", tmp_path / "old"
    whole.save_pretrained(shards, max_shard_size="40KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 1
    old.mkdir()
    torch.save(tensors, old / "pytorch_model.bin")
    torch.save({"model": tensors, "epoch": 3}, old / "wrapped.pth")
    sources = (folder, folder / "model.safetensors", shards, old, old / "wrapped.pth")
    parts = [load_encoder(encoder_of("clip"), str(source)) for source in sources]
    assert len({part.sha256 for part in parts}) == 1
    assert {part.bytes for part in parts} == {
        sum(t.numel() * 4 for t in encoder_of("clip").tower.state_dict().values())
    }

    index = json.loads((shards / "model.safetensors.index.json").read_text())
    lost = shards / index["weight_map"]["vision_model.post_layernorm.weight"]
    lost.unlink()
    with pytest.raises(WeightsError, match=lost.name):
        load_encoder(encoder_of("clip"), str(shards))


class _Harmful:
    def __reduce__(self) -> Any:
        return (print, ("loaded",))


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("model.safetensors", lambda path: path.write_bytes(b"no tensors"), "is damaged"),
        ("pytorch_model.bin", lambda path: torch.save({"x": _Harmful()}, path), "weights_only"),
        ("pytorch_model.bin", lambda path: torch.save({"x": torch.zeros(1), "step": 3}, path), "'step' is no tensor"),
        ("model.safetensors.index.json", lambda path: path.write_text("{"), "is damaged"),
        ("notes.txt", lambda path: path.write_text("x"), "holds no weights: looked for model.safetensors"),
    ],
)
def test_files_without_plain_tensors_are_refused(
    name: str, write: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name)
    with pytest.raises(WeightsError, match=message):
        load_encoder(encoder_of("clip"), str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no such file or folder"),
        ("/nowhere/model.safetensors", "no such file or folder"),
        ("just-a-name", "no such file or folder"),
        ("parts:dinov2-small", "pipelines.parts"),
        ("owner/name#sha256=12", "64 lower-case hexadecimal digits"),
        ("owner/name#md5=12", "64 lower-case hexadecimal digits"),
    ],
)
def test_a_source_that_cannot_be_is_refused(source: str, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        parse_source(source)


def test_hub_sources_are_taken_apart() -> None:
    plain, pinned = parse_source("owner/name"), parse_source("owner/na-me_2@v1.0:sub/eva.pth#sha256=" + "0" * 64)
    assert (plain.place, plain.revision, plain.file, plain.sha256) == ("owner/name", None, None, None)
    assert (pinned.place, pinned.revision, pinned.file) == ("owner/na-me_2", "v1.0", "sub/eva.pth")
    assert pinned.sha256 == "0" * 64


def test_a_cached_repository_loads_without_the_network(
    stored: Callable[[str], tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache as it lies on disk: a commit under snapshots, named by refs/main or by itself."""
    folder, _ = stored("dinov2")
    commit, repository = "c" * 40, tmp_path / "models--owner--eye"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    expected = load_encoder(encoder_of("dinov2"), str(folder)).sha256
    for source in ("owner/eye", f"owner/eye@{commit}", "owner/eye:model.safetensors"):
        assert load_encoder(encoder_of("dinov2"), source).sha256 == expected
    with pytest.raises(WeightsError, match=r"other\.safetensors of 'owner/eye:other\.safetensors' does not come"):
        load_encoder(encoder_of("dinov2"), "owner/eye:other.safetensors")


def test_a_hub_that_does_not_answer_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"owner/not-cached.*HF_HOME.*local folder"):
        load_encoder(encoder_of("clip"), "owner/not-cached")


def test_a_checksum_confirms_what_stands_in_the_model(stored: Callable[[str], tuple[Path, Any]]) -> None:
    folder, _ = stored("clip")
    first = load_encoder(encoder_of("clip"), str(folder))
    again = load_encoder(encoder_of("clip").bfloat16().float(), f"{folder}#sha256={first.sha256}")
    assert again.sha256 == first.sha256
    with pytest.raises(WeightsError, match=f"{first.sha256}: other weights than meant"):
        load_encoder(encoder_of("clip"), f"{folder}#sha256={'0' * 64}")
    rounded = encoder_of("clip").bfloat16()
    assert load_encoder(rounded, str(folder)).sha256 != first.sha256  # fp32 at the source, bf16 in the model


def test_the_checksum_is_what_it_says() -> None:
    """Literal form, and sensitive to name, shape and every value; wider numbers do not change it."""
    tensors = {"b": torch.tensor([[1.0, 2.0]]), "a": torch.tensor([3])}
    text = b"a\0torch.int64\x001\0" + (3).to_bytes(8, "little") + b"b\0torch.bfloat16\x001x2\0\x80\x3f\x00\x40"
    assert checksum(tensors, torch.bfloat16) == hashlib.sha256(text).hexdigest()
    assert checksum({**tensors, "b": tensors["b"].bfloat16()}, torch.bfloat16) == checksum(tensors, torch.bfloat16)
    for other in ({"b": torch.tensor([[1.0], [2.0]])}, {"b": torch.tensor([[1.0, 2.5]])}, {"c": torch.zeros(1)}):
        assert checksum({**tensors, **other}, torch.bfloat16) != checksum(tensors, torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------- LLM


def _llm(folder: Path, vocab_size: int = 290, **changes: Any) -> Any:
    """A random language model of the tiny architecture's shape, stored in a folder."""
    torch.manual_seed(5)
    settings = {**config(DENSE).text_config.to_dict(), "vocab_size": vocab_size, **changes}
    whole = hf.LlamaForCausalLM(hf.LlamaConfig(**settings)).eval()
    whole.save_pretrained(folder)
    return whole


@pytest.mark.parametrize("tied", [False, True])
def test_the_llm_computes_what_it_computed_alone(tied: bool, tmp_path: Path) -> None:
    whole = _llm(tmp_path, tie_word_embeddings=tied)
    text = {**config(DENSE).text_config.to_dict(), "tie_word_embeddings": tied}
    built = MeteorForConditionalGeneration(config(DENSE, text_config=text, tie_word_embeddings=tied)).eval()
    (part,) = load_parts(built, {"llm": str(tmp_path)})
    assert part.tensors == len(whole.state_dict()) - tied
    ids = torch.randint(4, 290, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        theirs, ours = whole(ids).logits, built(input_ids=ids).logits
    torch.testing.assert_close(ours[..., :290], theirs, rtol=0, atol=0)
    rows = built.get_input_embeddings().weight
    torch.testing.assert_close(rows[290:], rows[:290].mean(dim=0).expand(10, -1))
    assert (built.lm_head.weight is rows) == tied


def test_buffers_that_older_versions_stored_are_no_fault(
    stored: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    """CLIP's position indices and Llama's rotary frequencies, which today are computed."""
    clip, llm = tmp_path / "clip", tmp_path / "llm"
    clip.mkdir()
    ids = {f"{half}.embeddings.position_ids": torch.arange(17)[None] for half in ("vision_model", "text_model")}
    save_file({**load_file(stored("clip")[0] / "model.safetensors"), **ids}, clip / "model.safetensors")
    plain = load_encoder(encoder_of("clip"), str(stored("clip")[0]))
    assert load_encoder(encoder_of("clip"), str(clip)).sha256 == plain.sha256
    _llm(llm)
    before = load_llm(model(DENSE), str(llm))
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(16) for layer in range(4)}
    save_file({**load_file(llm / "model.safetensors"), **frequencies}, llm / "model.safetensors")
    assert load_llm(model(DENSE), str(llm)) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 301}, "embeddings of 301 tokens, the model of 300"),
        ({"rms_norm_eps": 0.5}, r"rms_norm_eps is 0\.5 there"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True there and False"),
        ({"hidden_size": 64}, "of another shape"),
        ({"num_hidden_layers": 3}, r"missing \(9\): model\.layers\.3\."),
        ({"num_hidden_layers": 5}, r"unexpected \(9\): model\.layers\.4\."),
    ],
)
def test_another_llm_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    _llm(tmp_path, **changes)
    with pytest.raises(WeightsError, match=message):
        load_llm(model(DENSE), str(tmp_path))


def test_parts_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"the part 'eva'; the model has clip, pix2struct, convnext, llm"):
        load_parts(model(DENSE), {"eva": "owner/name"})
