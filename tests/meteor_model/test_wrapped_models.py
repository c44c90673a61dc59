"""What users put around the whole model acts in all three stages, with every decoder: see test_wrapped_towers.py."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from tests.meteor_model.builders import decided, model, pixels
from tests.meteor_model.decoder.oracle import DECODERS
from tests.meteor_model.test_generation import FIXED, LAYOUTS, build, make_batch
from tests.meteor_model.test_modeling import batch
from tests.meteor_model.test_transformers_habits import UNDECODED

FAMILIES = sorted({name.split("-")[0] for name in DECODERS})


def answers(built: Any) -> tuple[Tensor, list[list[int]]]:
    """Greedy tokens, and the visual tokens that stage 3 kept of each sample."""
    cache = built.new_cache()
    sequences = built.generate(**make_batch(LAYOUTS[:3]).inputs, **FIXED, do_sample=False, past_key_values=cache)
    return sequences, [kept.tolist() for kept in decided(cache).kept_visual()]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_adapters_of_the_whole_model_act_in_generate(name: str) -> None:
    built = copy.deepcopy(build(name))
    plain = answers(built)
    torch.manual_seed(3)
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=r".*_proj|.*fc[12]", init_lora_weights=False)
    adapted = get_peft_model(built, settings)
    found = answers(adapted.base_model.model)
    merged = answers(adapted.merge_and_unload())
    assert torch.equal(found[0], merged[0])
    assert found[1] == merged[1]
    assert not torch.equal(found[0], plain[0])


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_an_offloaded_model_answers_the_same(name: str, where: str, tmp_path: Path) -> None:
    built = copy.deepcopy(build(name))
    expected = answers(built)
    if where == "cpu":
        accelerate.cpu_offload(built, torch.device("cpu"))
    else:
        accelerate.disk_offload(built, tmp_path, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in built.parameters())
    found = answers(built)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_an_int8_model_prunes_and_answers(name: str) -> None:
    built = copy.deepcopy(build(name))
    lengths = [len(kept) for kept in answers(built)[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao names its successor
        torch.ao.quantization.quantize_dynamic(built, {nn.Linear}, dtype=torch.qint8, inplace=True)
    sequences, kept = answers(built)
    assert len(sequences) == len(lengths)
    assert [abs(len(row) - length) <= 3 for row, length in zip(kept, lengths, strict=True)] == [True] * 3


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("loaded", [False, True])
def test_ddp_trains_every_step_with_and_without_images(loaded: bool, tmp_path: Path) -> None:
    built = model(UNDECODED)
    if loaded:
        built.save_pretrained(tmp_path)
        built = MeteorForConditionalGeneration.from_pretrained(tmp_path)
    parallel = DistributedDataParallel(built.train())
    inputs = batch(UNDECODED)
    text = {key: value[1:2] for key, value in inputs.items() if key != "pixel_values"} | {"pixel_values": pixels(0)}
    for given in (inputs, text, inputs):
        parallel(**given).loss.backward()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
def test_adapters_of_every_tower_learn_with_recomputation(reentrant: bool) -> None:
    targets = r".*\.(q_proj|query|pointwise_conv1|pwconv1)"
    settings = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted: Any = get_peft_model(model(UNDECODED), settings).train()
    adapted.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted.enable_input_require_grads()
    adapted(**batch(UNDECODED)).loss.backward()
    learners = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    parts = {part for part in ("clip", "pix2struct", "convnext", "language_model") if any(part in n for n in learners)}
    assert len(parts) == 4
    idle = [n for n, p in learners.items() if p.grad is None or not torch.count_nonzero(p.grad)]
    assert idle == []
