"""What a user of transformers expects of a model: auto classes, loading, kernels, outputs, adapters, pipelines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, pipeline

from meteor_model.configuration_meteor import DecodePruning, MeteorConfig
from meteor_model.encoders import VisionEncoder
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.outputs import MeteorImageFeatures
from meteor_model.pretrained import CheckpointLayoutError
from tests.meteor_model.builders import DENSE, PRUNED, config, model, pixels, processor
from tests.meteor_model.test_modeling import batch
from tests.meteor_model.towers import TOWERS

UNDECODED = replace(PRUNED, decode=DecodePruning(enabled=False))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and processor, in shards."""
    path = tmp_path_factory.mktemp("saved")
    model(PRUNED).save_pretrained(path, max_shard_size="1MB")
    processor(PRUNED).save_pretrained(path)
    return path


@torch.no_grad()
def logits(built: Any, **settings: Any) -> torch.Tensor:
    inputs = batch(PRUNED)
    del inputs["labels"]
    result: torch.Tensor = built.eval()(**inputs, **settings).logits
    return result


def test_the_package_is_light_and_its_names_register_the_auto_classes(folder: Path) -> None:
    code = """
import sys, meteor_model
assert not {"torch", "transformers"} & set(sys.modules), "constants must cost nothing"
assert "MeteorProcessor" in dir(meteor_model)
from meteor_model import MeteorForConditionalGeneration, MeteorProcessor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
print(type(AutoConfig.from_pretrained(folder)).__name__)
print(isinstance(AutoProcessor.from_pretrained(folder), MeteorProcessor))
print(isinstance(AutoModelForImageTextToText.from_pretrained(folder), MeteorForConditionalGeneration))
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["MeteorConfig", "True", "True"], done.stderr


@pytest.mark.parametrize("trust", [None, False, True])
def test_without_the_package_the_error_names_it(trust: bool | None, folder: Path) -> None:
    code = """
import sys
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
for cls in (AutoConfig, AutoModelForImageTextToText, AutoProcessor):
    try:
        cls.from_pretrained(sys.argv[1], trust_remote_code=eval(sys.argv[2]))
    except Exception as error:
        print("\\nrefused:", " ".join(str(error).split()))
assert "meteor_model" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), repr(trust)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("refused:")]
    assert len(lines) == 3, done.stderr
    assert all("the Python package meteor_model (install it, and `import meteor_model.auto`" in line for line in lines)
    assert "import meteor_model.auto" in (folder / "README.md").read_text()


def test_shards_are_safetensors_and_the_processor_lies_beside_them(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    assert {"config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"device_map": "cpu"}, torch.float32),
        ({"device_map": {"": "cpu"}}, torch.float32),
        ({"device_map": "auto", "dtype": torch.bfloat16}, torch.bfloat16),
    ],
)
def test_loading(folder: Path, settings: dict[str, Any], dtype: torch.dtype) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(folder, **settings)
    assert {parameter.dtype for parameter in loaded.parameters()} == {loaded.dtype} == {dtype}
    assert loaded.num_parameters() == model(PRUNED).num_parameters()
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    expected = model(PRUNED)
    for parameter in expected.parameters():  # not the rotary tables, which stay fp32
        parameter.data = parameter.data.to(dtype)
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize("name", sorted(TOWERS))
@torch.no_grad()
def test_every_tower_survives_saving(name: str, tmp_path: Path) -> None:
    """A loaded model is built without memory: tables that are no weights must be made again."""
    data = {**config(DENSE).to_dict(), "encoders": [TOWERS[name].to_dict()]}
    torch.manual_seed(0)
    built = MeteorForConditionalGeneration(MeteorConfig(**data)).eval()
    built.save_pretrained(tmp_path)
    loaded = MeteorForConditionalGeneration.from_pretrained(tmp_path)
    images = pixels(1)
    assert torch.equal(loaded.encode_images(images)[0], built.encode_images(images)[0])
    buffers = dict(built.named_buffers())
    for key, value in loaded.named_buffers():
        assert torch.equal(value, buffers[key]), key


def _without(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["projectors.clip.input.weight"]


def _with(tensors: dict[str, torch.Tensor]) -> None:
    tensors["projectors.eva.input.weight"] = torch.zeros(2)


def _reshaped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["projectors.clip.output.weight"] = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, "1 missing: projectors.clip.input.weight$"),
        (_with, "1 unexpected: projectors.eva.input.weight$"),
        (_reshaped, r"1 of another shape: projectors.clip.output.weight \(file \(3, 5\), model \(128, 128\)\)$"),
    ],
)
def test_a_checkpoint_of_another_layout_says_what_differs(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path
) -> None:
    model(PRUNED).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointLayoutError, match=message):
        AutoModelForImageTextToText.from_pretrained(tmp_path)
    info = MeteorForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert sum(len(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")) == 1


@pytest.mark.parametrize("cut", [5, 2000, -100])
def test_a_weights_file_that_is_cut_short_is_named(cut: int, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = sorted(tmp_path.glob("*.safetensors"))[1]
    broken.write_bytes(broken.read_bytes()[:cut])
    with pytest.raises(ValueError, match=f"cut short or broken, copy it again: {broken} "):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_a_config_with_another_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "config.json").read_text())
    data["encoders"][0]["name"] = "other"
    del data["calibrated"]  # which would be refused first, with another error
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(
        CheckpointLayoutError, match=r"\d+ missing: encoders.other.* more; \d+ unexpected: encoders.clip"
    ):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_can_grow(tied: bool, tmp_path: Path) -> None:
    text = {**config(PRUNED).to_dict()["text_config"], "tie_word_embeddings": tied}
    built = MeteorForConditionalGeneration(config(PRUNED, text_config=text, tie_word_embeddings=tied))
    before = logits(built)
    built.resize_token_embeddings(321)
    assert built.config.text_config.vocab_size == built.lm_head.out_features == 321
    assert (built.lm_head.weight is built.get_input_embeddings().weight) == tied
    torch.testing.assert_close(logits(built)[..., :300], before)
    built.save_pretrained(tmp_path)
    assert torch.equal(logits(MeteorForConditionalGeneration.from_pretrained(tmp_path)), logits(built))


@torch.no_grad()
def test_hidden_states_attentions_and_tuples() -> None:
    built = model(PRUNED)
    inputs = batch(PRUNED)
    plain = built(**inputs)
    built.set_attn_implementation("eager")
    output = built(**inputs, output_hidden_states=True, output_attentions=True)
    rows, length = inputs["input_ids"].shape
    assert [tuple(state.shape) for state in output.hidden_states] == [(rows, length, 128)] * 5
    assert [tuple(weights.shape) for weights in output.attentions] == [(rows, 4, length, length)] * 4
    torch.testing.assert_close(built.lm_head(output.hidden_states[-1]), plain.logits)
    is_image = inputs["input_ids"] == built.config.image_token_id
    assert torch.equal(output.hidden_states[0][is_image], output.image_hidden_states.flatten(0, 1))
    as_tuple = built(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], built(**inputs).loss)
    assert len(as_tuple) == 4, "loss, logits, cache, visual tokens; no statistics"
    features = built.get_image_features(inputs["pixel_values"])
    assert isinstance(features, MeteorImageFeatures)
    assert torch.equal(features.pooler_output, output.image_hidden_states)
    assert features.pruning_stats is not None
    assert features.pruning_stats.fuse.shape == (3, 24)
    del inputs["labels"]
    with pytest.raises(ValueError, match=r"\['output_hidden_states'\] cannot be given where stage 3 prunes"):
        built(**inputs, output_hidden_states=True, past_key_values=built.new_cache())


def test_generate_gives_hidden_states_with_an_unpruned_cache() -> None:
    built = model(PRUNED)
    inputs = processor(PRUNED)("What colour?", pixels(1)[0])
    ask: dict[str, Any] = {
        "max_new_tokens": 2,
        "output_hidden_states": True,
        "return_dict_in_generate": True,
        "eos_token_id": None,
    }
    given = built.generate(**inputs, past_key_values=DynamicCache(config=built.config.text_config), **ask)
    assert len(given.hidden_states) == 2
    assert given.hidden_states[0][0].shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("way", ["loaded", "set"])
def test_the_attention_kernel_reaches_llm_and_towers(folder: Path, kernel: str, way: str) -> None:
    if way == "loaded":
        built = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=kernel)
    else:
        built = model(PRUNED)
        built.set_attn_implementation(kernel)
    kernels = (
        built.config._attn_implementation,
        built.language_model.config._attn_implementation,
        built.encoders["clip"].tower.config._attn_implementation,
    )
    assert kernels == (kernel,) * 3
    assert built.encoders["convnext"].tower.config._attn_implementation == "eager", "it has no attention"
    torch.testing.assert_close(logits(built), logits(model(PRUNED)), rtol=1e-4, atol=1e-5)
    built.set_attn_implementation({"text_config": "eager", "": "sdpa"})
    assert built.language_model.config._attn_implementation == "eager"
    assert cast(VisionEncoder, built.encoders["clip"]).tower.config._attn_implementation == "sdpa"


def test_a_tower_s_own_choice_of_kernel_stays() -> None:
    encoders = config(PRUNED).to_dict()["encoders"]
    encoders[0]["tower"]["attn_implementation"] = "eager"
    built = MeteorForConditionalGeneration(config(PRUNED, encoders=encoders))
    assert cast(VisionEncoder, built.encoders["clip"]).tower.config._attn_implementation == "eager"
    assert built.language_model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_embeddings_may_be_given_instead_of_ids() -> None:
    built = model(UNDECODED)
    inputs = {key: value for key, value in batch(PRUNED).items() if key != "labels"}
    embeds = built.get_input_embeddings()(inputs["input_ids"])
    ids = inputs.pop("input_ids")
    assert torch.equal(built(inputs_embeds=embeds, **inputs).logits, built(ids, **inputs).logits)
    left = processor(PRUNED)(["What colour?", "Where is it?"], [[pixels(1)[0]], [pixels(2)[1]]])
    ask: dict[str, Any] = {"max_new_tokens": 3, "eos_token_id": None, "attention_mask": left["attention_mask"]}
    expected = built.generate(left["input_ids"], left["pixel_values"], **ask)
    embeds = built.get_input_embeddings()(left["input_ids"])
    assert torch.equal(built.generate(left["input_ids"], left["pixel_values"], inputs_embeds=embeds, **ask), expected)
    alone = built.generate(pixel_values=left["pixel_values"], inputs_embeds=embeds, **ask)
    assert torch.equal(alone, expected[:, -3:])


@pytest.mark.parametrize("ask", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_generation_without_a_cache_gives_the_same_tokens(ask: dict[str, Any]) -> None:
    built = model(UNDECODED)
    inputs = processor(PRUNED)(["What colour?", "Two <image><image>?"], [[pixels(1)[0]], list(pixels(2))])
    ask = {**ask, "max_new_tokens": 4, "eos_token_id": None, "do_sample": False, "return_dict_in_generate": True}
    expected = built.generate(**inputs, **ask)
    given = built.generate(**inputs, **ask, use_cache=False, output_hidden_states=True)
    assert torch.equal(given.sequences, expected.sequences)
    assert given.past_key_values is None
    lengths = [states[0].shape[1] for states in given.hidden_states]
    assert lengths == [inputs["input_ids"].shape[1] + step for step in range(4)], "every step sees everything"


def test_lora_adapters_train_merge_and_reload(tmp_path: Path) -> None:
    names = r"(language_model|encoders\.(clip|pix2struct))\..*\.(q_proj|v_proj|query|value)"
    settings = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(model(PRUNED), settings).train()
    adapted.enable_input_require_grads()
    adapters = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[2] for name in adapters} == {"language_model", "encoders"}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    inputs = batch(PRUNED)
    first = adapted(**inputs).loss
    first.backward()
    trained = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    untouched = [n for n, grad in trained.items() if grad is None or not torch.count_nonzero(grad)]
    assert untouched == []
    optimizer.step()
    expected = logits(adapted)
    assert adapted(**inputs).loss < first
    adapted.save_pretrained(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(model(PRUNED), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), expected)
    merged = reloaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


def test_a_folder_of_adapters_loads_onto_its_base(folder: Path, tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(MeteorForConditionalGeneration.from_pretrained(folder), settings)
    adapted.save_pretrained(str(tmp_path))
    loaded = MeteorForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(adapted))


def test_the_pipeline_of_transformers_answers(folder: Path) -> None:
    proc = AutoProcessor.from_pretrained(folder)
    built = AutoModelForImageTextToText.from_pretrained(folder)
    ask = pipeline("image-text-to-text", model=built, processor=proc)
    image = pixels(1)[0]
    picture = Image.fromarray(image.movedim(0, -1).numpy())
    chat = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What colour?"}]}
    ]
    settings = {"max_new_tokens": 4, "do_sample": False}
    inputs = proc("What colour?", image)
    expected = proc.decode(built.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :])
    answered = ask(text=chat, return_full_text=False, generate_kwargs=settings)
    assert answered[0]["generated_text"].strip() == expected
    asked = ask(text="What colour?", images=[picture], return_full_text=False, generate_kwargs=settings)
    assert asked[0]["generated_text"].strip() == expected
