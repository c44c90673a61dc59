"""Export and parity hold one model at a time, in memory and in mapped files together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from meteor_model.architectures import build_config
from meteor_model.configuration_meteor import DecodePruning, EncodePruning, FusePruning, MeteorConfig, PruningConfig
from meteor_model.image_processing_meteor import MeteorImageProcessor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.tokenizer import train_tokenizer
from pipelines.checkpoint.zero3 import save_for_sharding
from pipelines.registry.parity import write_parity_batch
from tests.pipelines.checkpoint.made import write_checkpoint

ROOT = Path(__file__).resolve().parents[3]
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 5, "vocab_size": 8000}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
MOST = 1.3


def made(folder: Path, llm: dict[str, int]) -> int:
    """A run's start model, checkpoint of two workers and parity batch; the model's bytes."""
    tokenizer = train_tokenizer(["what is this? a red square"] * 3, 280)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    pruning = PruningConfig(EncodePruning(totals=(96, 64, 64)), FusePruning(keep=32), DecodePruning(enabled=False))
    image = tokenizer.convert_tokens_to_ids("<image>")
    plain = build_config("tiny", pruning, len(tokenizer), special, image).to_dict()
    config = MeteorConfig(**{**plain, "text_config": {**plain["text_config"], **llm}})
    torch.manual_seed(0)
    model = MeteorForConditionalGeneration(config).eval()
    images = MeteorImageProcessor(config.image_size)
    processor = MeteorProcessor(images, tokenizer, config.tokens_per_image, template="short")
    save_for_sharding(model, folder / "init")
    processor.save_pretrained(folder / "init")
    write_checkpoint(model, folder / "checkpoint", world=2)
    write_parity_batch(model, processor, folder / "checkpoint" / "parity.safetensors")
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


@pytest.mark.timeout(300)
def test_export_and_parity_hold_one_model_at_a_time(tmp_path: Path) -> None:
    made(tmp_path / "small", {})
    size = made(tmp_path / "large", {**LARGE, **HEADS})
    assert size > 300e6
    for phase in ("export", "parity"):
        command = [sys.executable, "-m", "tests.pipelines.checkpoint.memory_probe", phase, str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        took = json.loads(done.stdout.splitlines()[-1]) / size
        assert 0.8 < took < MOST, f"{phase} took {took:.2f} times the model"
    files = sorted((tmp_path / "large" / "model").glob("*.safetensors"))
    assert len(files) >= 4
    assert all(file.stat().st_size <= 101e6 for file in files)
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    start = load_file(tmp_path / "large" / "init" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], start["lm_head.weight"])
