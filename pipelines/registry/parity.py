"""Parity: an exported folder, loaded again, computes what the model that it was made of computes."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.registry.folder import PARITY_TOLERANCE


class ParityError(ValueError):
    """The exported model does not compute what the training model computed."""


@torch.inference_mode()
def write_parity_batch(model: MeteorForConditionalGeneration, processor: MeteorProcessor, path: Path) -> None:
    """Write the file for `check_parity` of a model in memory.

    It holds four pictures of noise under questions of growing length, and the model's logits on them.

    Args:
        model: fp32, in eval mode.
        processor: the model's.
        path: of the file.
    """
    size, generator = processor.image_size, torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    questions = ["what is this?" + " and what is that?" * extra for extra in range(len(pictures))]
    batch = processor(questions, list(pictures), padding_side="right").to(model.device)
    logits_BTV = model(**batch, use_cache=False).logits
    save_file({name: tensor.cpu().contiguous() for name, tensor in {**batch, "logits": logits_BTV}.items()}, path)


def check_parity(folder: Path, parity_file: Path, tolerance: float = PARITY_TOLERANCE) -> float:
    """Load the folder afresh (fp32, eval) and compare its logits with those that the training model left behind.

    Args:
        folder: written by `export_model`.
        parity_file: safetensors with input_ids and attention_mask (B, T), pixel_values (M, 3, S, S) uint8, logits
            (B, T, V).
        tolerance: largest absolute difference allowed; positions of padding do not count.

    Returns:
        The largest absolute difference.

    Raises:
        ParityError: naming the difference.
    """
    tensors = load_file(parity_file)
    if lacking := sorted({"input_ids", "attention_mask", "pixel_values", "logits"} - set(tensors)):
        raise ParityError(f"{parity_file} lacks {', '.join(lacking)}: the parity batch was not written whole")
    model = MeteorForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    with torch.inference_mode():
        inputs = {key: tensors[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        output = model(**inputs, use_cache=False)
    expected_BTV = tensors["logits"].float()
    if output.logits.shape != expected_BTV.shape:
        raise ParityError(
            f"the exported model gives logits {tuple(output.logits.shape)}, not {tuple(expected_BTV.shape)}"
        )
    difference_BT = (output.logits - expected_BTV).abs().amax(dim=-1)
    difference = difference_BT[tensors["attention_mask"].bool()].max().item()
    if not difference <= tolerance:  # also where it is not a number
        raise ParityError(
            f"the exported model's logits differ from the training model's by up to {difference:.3g}, allowed are "
            f"{tolerance:g}: the export in {folder} is not the model that was trained and will not be registered"
        )
    return difference
