"""Parity tells a right export from a wrong one in fp32 and in bf16, on the kernels of another machine, too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from meteor_model.replay import GivenTokens
from pipelines.checkpoint.parity_file import ParityBatch, read_parity
from pipelines.checkpoint.state import CheckpointError
from pipelines.checkpoint.weight_sums import COARSER, DTYPES, Precision, weight_sums
from pipelines.registry.folder import export_model
from pipelines.registry.parity import ParityError, check_parity
from pipelines.registry.proof import Parity, allowed_difference

Tiny = tuple[MeteorForConditionalGeneration, MeteorProcessor]
Change = Callable[[MeteorForConditionalGeneration], None]


@torch.no_grad()
def left_behind(trained: MeteorForConditionalGeneration, tiny: Tiny, precision: Precision, path: Path) -> Path:
    """What a training of `trained` in a precision leaves, computed by other kernels than a reload uses."""
    model, processor = copy.deepcopy(trained).to(DTYPES[precision]), tiny[1]
    sums = {rounded_to: weight_sums(model.named_parameters(), rounded_to) for rounded_to in COARSER[precision]}
    model.set_attn_implementation("eager")
    pictures = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    batch = processor(["what is this?" * (1 + extra) for extra in range(6)], list(pictures), padding_side="right")
    output = model(**batch, use_cache=False)
    ParityBatch(dict(batch), output.logits, GivenTokens.of(output.pruning_stats), sums).save(path, precision)
    return path


@pytest.fixture(scope="module")
def lively(tiny: Tiny) -> MeteorForConditionalGeneration:
    """Weights that are no random start: logits of some size, so that rounding shows."""
    model = copy.deepcopy(tiny[0])
    pruning = model.config.pruning  # without a lambda, which would hold other settings up before parity sees them
    model.config = model.config.with_pruning(replace(pruning, decode=replace(pruning.decode, lam=None)))
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        for name, parameter in model.named_parameters():
            if name.startswith("projectors.") and name.endswith("output.weight"):
                parameter.mul_(20)
    return model


def changed(model: MeteorForConditionalGeneration, change: Change) -> MeteorForConditionalGeneration:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return other


@pytest.mark.parametrize("trained_in", ["fp32", "bf16"])
@pytest.mark.parametrize("exported_in", ["fp32", "bf16"])
def test_a_right_export_passes_in_the_coarser_precision(
    tiny: Tiny, lively: MeteorForConditionalGeneration, tmp_path: Path, trained_in: Precision, exported_in: Precision
) -> None:
    file = left_behind(lively, tiny, trained_in, tmp_path / "parity")
    folder = export_model(copy.deepcopy(lively).to(DTYPES[exported_in]), tiny[1], tmp_path / "model")
    parity = check_parity(folder, file)
    assert parity.precision == ("fp32" if trained_in == exported_in == "fp32" else "bf16")
    assert parity.exported == exported_in
    assert parity.weights == len(list(lively.named_parameters()))
    assert parity.agreement is not None
    assert parity.agreement > 0.99
    assert parity.difference <= parity.allowed == allowed_difference(parity.precision, parity.largest_logit)


def noise(name: str, scale: float) -> Change:
    def change(model: MeteorForConditionalGeneration) -> None:
        weight = model.get_parameter(name)
        weight.mul_(1 + scale * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))

    return change


def one_bit(model: MeteorForConditionalGeneration) -> None:
    weight = model.lm_head.weight.view(-1)
    weight[7] = torch.nextafter(weight[7].bfloat16(), torch.tensor(torch.inf).bfloat16()).float()


def swap_elements(model: MeteorForConditionalGeneration) -> None:
    weight = model.get_parameter("language_model.layers.1.mlp.up_proj.weight")
    weight.copy_(weight.flip(0))


def swap_projectors(model: MeteorForConditionalGeneration) -> None:
    towers = model.projectors
    towers["clip"], towers["pix2struct"] = towers["pix2struct"], towers["clip"]


WRONG = {
    "noise": (noise("encoders.pix2struct.tower.encoder.layer.1.attention.key.weight", 0.01), "1 of .*attention.key"),
    "one rounding": (one_bit, "1 of .*: lm_head.weight"),
    "rows in another order": (swap_elements, "1 of .*up_proj"),
    "towers swapped": (swap_projectors, "4 of .* projectors.clip.input.weight, .* projectors.pix2struct.output.weight"),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_weight_fails(
    tiny: Tiny, lively: MeteorForConditionalGeneration, tmp_path: Path, precision: Precision, wrong: str
) -> None:
    change, message = WRONG[wrong]
    file = left_behind(lively, tiny, precision, tmp_path / "parity")
    folder = export_model(changed(lively, change).to(DTYPES[precision]), tiny[1], tmp_path / "model")
    with pytest.raises(ParityError, match=f"{message}.* is not the model that was trained"):
        check_parity(folder, file)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_layer_that_is_dropped_fails(
    tiny: Tiny, lively: MeteorForConditionalGeneration, tmp_path: Path, precision: Precision
) -> None:
    file = left_behind(lively, tiny, precision, tmp_path / "parity")
    shallow = copy.deepcopy(lively)
    shallow.language_model.layers = nn.ModuleList(shallow.language_model.layers[:-1])
    shallow.config.text_config.num_hidden_layers -= 1
    folder = export_model(shallow.to(DTYPES[precision]), tiny[1], tmp_path / "model")
    with pytest.raises(ParityError, match=r"9 of \d+ weights .*language_model.layers.3"):
        check_parity(folder, file)


def other_norm(model: MeteorForConditionalGeneration) -> None:
    model.config.text_config.rms_norm_eps = 0.1


def other_scores(model: MeteorForConditionalGeneration) -> None:
    pruning = model.config.pruning
    model.config = model.config.with_pruning(
        replace(pruning, encode=replace(pruning.encode, first_deep_segment=4)), "keep"
    )


def other_budget(model: MeteorForConditionalGeneration) -> None:
    pruning = model.config.pruning
    model.config = model.config.with_pruning(
        replace(pruning, encode=replace(pruning.encode, totals=(90, 60, 60))), "keep"
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_norm, "logits differ from the training model's by up to"),
        (other_scores, "scores keep"),
        (other_budget, r"prunes otherwise .* encoder 'clip', boundary 1: \(6, 48\) .* are given"),
    ],
    ids=["norm", "scores", "budget"],
)
def test_the_right_weights_in_another_computation_fail(
    tiny: Tiny,
    lively: MeteorForConditionalGeneration,
    tmp_path: Path,
    precision: Precision,
    change: Change,
    message: str,
) -> None:
    file = left_behind(lively, tiny, precision, tmp_path / "parity")
    folder = export_model(changed(lively, change).to(DTYPES[precision]), tiny[1], tmp_path / "model")
    with pytest.raises(ParityError, match=message):
        check_parity(folder, file)


def test_a_file_of_before_is_compared_by_its_logits(
    tiny: Tiny, lively: MeteorForConditionalGeneration, tmp_path: Path
) -> None:
    tensors = load_file(left_behind(lively, tiny, "fp32", tmp_path / "parity"))
    before = {name: tensors[name] for name in ("input_ids", "attention_mask", "pixel_values", "logits")}
    save_file(before, tmp_path / "before", metadata={"precision": "fp32"})
    folder = export_model(lively, tiny[1], tmp_path / "model")
    parity = check_parity(folder, tmp_path / "before")
    assert (parity.agreement, parity.weights) == (None, 0)
    assert parity.difference <= 1e-3
    save_file(before, tmp_path / "strange", metadata={"precision": "fp8"})
    with pytest.raises(CheckpointError, match="is of precision 'fp8'"):
        check_parity(folder, tmp_path / "strange")
    (tmp_path / "cut").write_bytes((tmp_path / "before").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cut holds no parity batch"):
        check_parity(folder, tmp_path / "cut")


def test_the_file_brings_back_what_was_written(
    tiny: Tiny, lively: MeteorForConditionalGeneration, tmp_path: Path
) -> None:
    batch, precision = read_parity(left_behind(lively, tiny, "fp32", tmp_path / "parity"))
    assert precision == "fp32"
    assert batch.kept is not None
    assert {name: [tuple(kept.shape) for kept in boundaries] for name, boundaries in batch.kept.encode.items()} == {
        "clip": [(6, 48), (6, 32), (6, 22)],
        "pix2struct": [(6, 48), (6, 32), (6, 21)],
        "convnext": [(6, 21)],
    }
    assert batch.kept.fuse.shape == (6, 32)
    assert batch.sums["bf16"] == weight_sums(copy.deepcopy(lively).bfloat16().named_parameters(), "bf16")


def test_what_earlier_versions_stored_of_a_parity_is_read() -> None:
    parity = Parity(0.03, 0.5, "fp32", "bf16", 8.0, 0.999, 12)
    assert Parity.from_dict(parity.to_dict(), "exported.json") == parity
    assert Parity.from_dict(2e-6, "exported.json") == Parity(2e-6)
    with pytest.raises(ValueError, match=r"exported\.json holds no parity"):
        Parity.from_dict({"difference": "much"}, "exported.json")


def test_towers_that_keep_the_same_tokens_are_stored_each(tmp_path: Path) -> None:
    whole_MN = torch.arange(4).expand(2, 4)  # one tensor under three names, and no row of its own
    inputs = {"input_ids": whole_MN, "attention_mask": whole_MN, "pixel_values": torch.zeros(2, 3, 2, 2).byte()}
    kept = GivenTokens({"clip": (whole_MN, whole_MN[:, :2]), "reader": (whole_MN,)}, whole_MN)
    ParityBatch(inputs, torch.ones(2, 4, 5), kept).save(tmp_path / "parity", "fp32")
    read = read_parity(tmp_path / "parity")[0].kept
    assert read is not None
    assert torch.equal(read.fuse, whole_MN)
    assert torch.equal(read.encode["reader"][0], whole_MN)
    assert torch.equal(read.encode["clip"][1], whole_MN[:, :2])
