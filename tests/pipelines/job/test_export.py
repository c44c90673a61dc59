"""From a checkpoint to an exported folder in each precision, in storage and proven, without Ray."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meteor_model.configuration_meteor import PruningConfig
from meteor_model.loading import load_model_and_processor
from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.checkpoint.weight_sums import COARSER, DTYPES, Precision, weight_sums
from pipelines.checkpoint.zero3 import save_for_sharding
from pipelines.evaluation.questions import Question
from pipelines.io.run_folder import RunFolder
from pipelines.job.export import export_checkpoint
from pipelines.registry.folder import verify_checksums
from pipelines.registry.parity import ParityError
from tests.pipelines.checkpoint.made import write_checkpoint
from tests.pipelines.registry.test_parity import left_behind

Tiny = tuple[MeteorForConditionalGeneration, MeteorProcessor]


def none_needed(model: MeteorForConditionalGeneration, processor: MeteorProcessor) -> Sequence[Question]:
    raise AssertionError("lambda is solved already")


@pytest.fixture(params=["fp32", "bf16"])
def trained_in(request: pytest.FixtureRequest) -> Precision:
    precision: Precision = request.param
    return precision


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path, trained_in: Precision) -> RunFolder:
    """A run whose only checkpoint is step-1."""
    folder = RunFolder(str(tmp_path / "run"))
    model = copy.deepcopy(tiny[0])
    model.config = model.config.with_pruning(with_decode_off(model.config.pruning), "keep")
    save_for_sharding(model, Path(folder.init))
    tiny[1].save_pretrained(Path(folder.processor))
    write_checkpoint(model, tmp_path / "run" / "step-1", world=2)
    left_behind(model, tiny, trained_in, tmp_path / "run" / "step-1" / "parity.safetensors")
    return folder


def with_decode_off(pruning: PruningConfig) -> PruningConfig:
    return replace(pruning, decode=replace(pruning.decode, enabled=False, lam=None))


@pytest.mark.parametrize("exported_in", ["fp32", "bf16"])
def test_a_checkpoint_becomes_a_folder_in_the_precision_that_is_asked_for(
    run: RunFolder, tiny: Tiny, tmp_path: Path, trained_in: Precision, exported_in: Precision
) -> None:
    made = export_checkpoint(
        run, f"{run.url}/step-1", none_needed, tmp_path / "model", run.export, precision=exported_in, tolerance=None
    )
    assert made.parity.exported == exported_in
    assert made.parity.precision == ("fp32" if trained_in == exported_in == "fp32" else "bf16")
    verify_checksums(Path(run.export))
    loaded, _ = load_model_and_processor(run.export)
    assert {parameter.dtype for parameter in loaded.parameters()} == {DTYPES[exported_in]}
    assert loaded.config.dtype == DTYPES[exported_in]
    for precision in COARSER[exported_in]:
        assert weight_sums(loaded.named_parameters(), precision) == weight_sums(tiny[0].named_parameters(), precision)
    before, after = tiny[0].state_dict(), loaded.state_dict()
    assert all(torch.equal(after[name], tensor.to(after[name].dtype)) for name, tensor in before.items())


def test_a_checkpoint_with_another_weight_is_not_stored(run: RunFolder, tiny: Tiny, tmp_path: Path) -> None:
    other = copy.deepcopy(tiny[0])
    with torch.no_grad():
        other.get_parameter("language_model.layers.1.mlp.down_proj.weight")[0, 0] += 0.01
    write_checkpoint(other, tmp_path / "run" / "step-2", world=1)
    parity = tmp_path / "run" / "step-1" / "parity.safetensors"
    (tmp_path / "run" / "step-2" / parity.name).write_bytes(parity.read_bytes())
    with pytest.raises(ParityError, match=r"1 of \d+ weights .*layers\.1\.mlp\.down_proj"):
        export_checkpoint(
            run, f"{run.url}/step-2", none_needed, tmp_path / "model", run.export, precision="fp32", tolerance=None
        )
    assert not Path(run.export).exists()
