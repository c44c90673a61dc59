"""`load_model_and_processor`: what every program that opens a model folder calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meteor_model.loading import load_model_and_processor
from tests.meteor_model.builders import PRUNED, model, pixels, processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model(PRUNED).train().save_pretrained(tmp_path)
    processor(PRUNED).save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_model_and_processor_answer_as_those_that_were_saved(folder: Path) -> None:
    loaded, its_processor = load_model_and_processor(folder)
    inputs = its_processor(["Name it."], [[pixels(1)[0]]])
    assert torch.equal(inputs["input_ids"], processor(PRUNED)(["Name it."], [[pixels(1)[0]]])["input_ids"])
    assert torch.equal(loaded(**inputs).logits, model(PRUNED)(**inputs).logits)
    assert not any(module.training for module in loaded.modules())


def test_weights_keep_their_dtype_or_get_the_one_asked_for(folder: Path) -> None:
    loaded, _ = load_model_and_processor(str(folder), torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(folder)
    assert load_model_and_processor(folder)[0].dtype == torch.bfloat16
    assert load_model_and_processor(folder, torch.float32)[0].dtype == torch.float32


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(model(PRUNED).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load_model_and_processor(folder)


def test_importing_it_loads_no_library() -> None:
    code = "import sys, meteor_model.loading; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
