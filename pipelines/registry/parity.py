"""Parity: an exported folder, loaded again, is and computes what the model that it was made of is and computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.replay import GivenTokens
from meteor_model.replay_logits import replay_logits
from pipelines.checkpoint.parity_file import INPUTS, ParityBatch, read_parity
from pipelines.checkpoint.weight_sums import DTYPES, Precision, WeightSums, differing, weight_sums
from pipelines.registry.proof import LEAST_AGREEMENT, Parity, allowed_difference

NAMED_WEIGHTS = 4


class ParityError(ValueError):
    """The exported model is not, or does not compute, what the training model was."""


@torch.inference_mode()
def write_parity_batch(model: MeteorForConditionalGeneration, processor: MeteorProcessor, path: Path) -> None:
    """Write the file for `check_parity` of a model in memory.

    It holds four pictures of noise under questions of growing length, and what the model makes of them.

    Args:
        model: in eval mode.
        processor: the model's.
        path: of the file.
    """
    size, generator = processor.image_size, torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=generator)
    questions = ["what is this?" + " and what is that?" * extra for extra in range(len(pictures))]
    batch = processor(questions, list(pictures), padding_side="right").to(model.device)
    output = model(**batch, use_cache=False)
    precision = _precision(model.dtype)
    sums = {precision: weight_sums(model.named_parameters(), precision)}
    ParityBatch(dict(batch), output.logits, GivenTokens.of(output.pruning_stats), sums).save(path, precision)


def check_parity(folder: Path, parity_file: Path, tolerance: float | None = None, device: str = "cpu") -> Parity:
    """Load the folder afresh and compare it with the model that left the file (`pipelines.registry.proof`).

    It is loaded in the coarser one of that model's precision and the export's.

    Args:
        folder: written by `export_model`.
        parity_file: of `ParityBatch.save`.
        tolerance: largest absolute difference of a logit that is allowed; positions of padding do not count. None
            takes `allowed_difference`.
        device: where the model runs.

    Raises:
        CheckpointError: a file that is damaged or not whole.
        ParityError: naming the weights that differ, the difference, or the share of tokens.
    """
    batch, precision = read_parity(parity_file)
    exported = _precision(MeteorForConditionalGeneration.config_class.from_pretrained(folder).dtype)
    if exported == "bf16":
        precision = exported
    model = MeteorForConditionalGeneration.from_pretrained(folder, dtype=DTYPES[precision], use_safetensors=True)
    model.eval().to(device)
    compared = _check_weights(model, batch, precision, folder)
    with torch.inference_mode():
        logits_BTV, agreement = _logits(model, batch)
    _check_tokens(agreement, precision, folder)
    largest = batch.logits.abs().max().item()
    allowed = allowed_difference(precision, largest) if tolerance is None else tolerance
    difference = _largest_difference(logits_BTV.float().cpu(), batch)
    if not difference <= allowed:  # also where it is not a number
        raise ParityError(
            f"the exported model's logits differ from the training model's by up to {difference:.3g} in {precision}, "
            f"allowed are {allowed:.3g}: {_refused(folder)}"
        )
    return Parity(difference, allowed, exported, precision, largest, agreement, compared)


def _precision(dtype: torch.dtype) -> Precision:
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def _refused(folder: Path) -> str:
    return f"the export in {folder} is not the model that was trained and will not be registered"


def _check_weights(
    model: MeteorForConditionalGeneration, batch: ParityBatch, precision: Precision, folder: Path
) -> int:
    """How many parameters were compared; files of earlier versions hold no sums."""
    expected: WeightSums = batch.sums.get(precision, {})
    if not expected:
        return 0
    own = ((name, weight) for name, weight in model.named_parameters() if name not in batch.merged)
    if wrong := differing(weight_sums(own, precision), expected):
        raise ParityError(
            f"{len(wrong)} of {len(expected)} weights are not those of the training model in {precision}: "
            f"{_listed(wrong)}; {_refused(folder)}"
        )
    return len(expected)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_WEIGHTS} more" if len(names) > NAMED_WEIGHTS else ""
    return ", ".join(names[:NAMED_WEIGHTS]) + more


def _logits(model: MeteorForConditionalGeneration, batch: ParityBatch) -> tuple[Tensor, float | None]:
    """Logits (B, T, V) given the tokens that were kept, and the share of them that the model keeps itself."""
    inputs = {name: batch.inputs[name].to(model.device) for name in INPUTS}
    if batch.kept is None:
        return model(**inputs, use_cache=False).logits, None
    try:
        return replay_logits(model, **inputs, given=batch.kept), batch.kept.agreement
    except ValueError as error:  # of the tokens: another number of them, or of encoders
        raise ParityError(f"the exported model prunes otherwise than the training model: {error}") from error


def _check_tokens(agreement: float | None, precision: Precision, folder: Path) -> None:
    if agreement is not None and agreement < LEAST_AGREEMENT[precision]:
        raise ParityError(
            f"of the visual tokens that the training model kept, the exported model's scores keep {agreement:.1%}; at "
            f"least {LEAST_AGREEMENT[precision]:.1%} is asked in {precision}: {_refused(folder)}"
        )


def _largest_difference(logits_BTV: Tensor, batch: ParityBatch) -> float:
    if logits_BTV.shape != batch.logits.shape:
        raise ParityError(f"the exported model gives logits {tuple(logits_BTV.shape)}, not {tuple(batch.logits.shape)}")
    difference_BT = (logits_BTV - batch.logits).abs().amax(dim=-1)
    return difference_BT[batch.inputs["attention_mask"].bool()].max().item()
