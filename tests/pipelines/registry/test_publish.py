"""An exported folder stands alone, computes what was trained, and shows every change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteor_model.modeling_meteor import MeteorForConditionalGeneration
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.checkpoint.state import CheckpointError
from pipelines.registry.folder import ExportError, export_model, tokens_by_stage
from pipelines.registry.parity import ParityError, check_parity
from pipelines.registry.publish import pull_model
from pipelines.registry.versions import PinnedModel


def test_the_folder_holds_no_pickle_and_says_what_is_kept(
    exported: Path, tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor]
) -> None:
    names = {path.name for path in exported.iterdir()}
    assert {"model.safetensors", "config.json", "processor_config.json", "checksums.json", "README.md"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    assert tokens_by_stage(tiny[0].config) == {
        "visual_tokens.clip": "64 > 48 > 32 > 22",
        "visual_tokens.pix2struct": "64 > 48 > 32 > 21",
        "visual_tokens.convnext": "64 > 21",
        "visual_tokens.fuse": "64 > 32",
        "visual_tokens.decode": "32 > 16 (mean)",
    }
    assert "64 > 48 > 32 > 22" in (exported / "README.md").read_text()
    assert [path.name for path in exported.parent.iterdir()] == ["model"], "scratch folders are gone"


def test_export_into_a_used_folder_is_refused(
    tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor], tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        export_model(*tiny, tmp_path)
    assert (tmp_path / "other").read_text() == "mine"


def test_parity_of_an_honest_export(exported: Path, parity_file: Path) -> None:
    assert check_parity(exported, parity_file).difference <= 1e-5


def test_parity_fails_on_other_weights(
    tiny: tuple[MeteorForConditionalGeneration, MeteorProcessor], parity_file: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    other = export_model(MeteorForConditionalGeneration(tiny[0].config), tiny[1], tmp_path / "other")
    with pytest.raises(ParityError, match=r"differ from the training model's by up to \d"):
        check_parity(other, parity_file)


@pytest.mark.parametrize(
    ("value", "attended", "message"),
    [(0.5, True, "by up to 0.5"), (torch.nan, True, "by up to nan"), (0.5, False, None)],
)
def test_parity_judges_every_attended_position(
    exported: Path, parity_file: Path, tmp_path: Path, value: float, attended: bool, message: str | None
) -> None:
    tensors = load_file(parity_file)
    sample, position = (tensors["attention_mask"] == int(attended)).nonzero()[-1].tolist()
    tensors["logits"][sample, position, 3] += value
    save_file(tensors, tmp_path / "parity.safetensors")
    if message is None:
        assert check_parity(exported, tmp_path / "parity.safetensors").difference <= 1e-5
    else:
        with pytest.raises(ParityError, match=message):
            check_parity(exported, tmp_path / "parity.safetensors")


def test_parity_file_that_does_not_fit(exported: Path, parity_file: Path, tmp_path: Path) -> None:
    tensors = load_file(parity_file)
    save_file({**tensors, "logits": tensors["logits"][..., :-1].contiguous()}, tmp_path / "narrow")
    with pytest.raises(ParityError, match="gives logits"):
        check_parity(exported, tmp_path / "narrow")
    save_file({"logits": tensors["logits"]}, tmp_path / "lacking")
    with pytest.raises(CheckpointError, match="lacks attention_mask, input_ids, pixel_values"):
        check_parity(exported, tmp_path / "lacking")


def change_a_weight(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_a_weight, r"model\.safetensors was changed"),
        (lambda folder: (folder / "config.json").unlink(), r"lacks config\.json"),
        (lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"), r"holds pytorch_model\.bin"),
        (lambda folder: (folder / "checksums.json").unlink(), r"checksums\.json is missing"),
        (lambda folder: (folder / "checksums.json").write_text("[1]"), "damaged"),
    ],
    ids=["changed", "missing", "foreign", "unsealed", "damaged"],
)
def test_a_changed_folder_is_refused(
    exported: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    assert pull_model(PinnedModel(str(copy)), tmp_path / "unused") == copy
    change(copy)
    with pytest.raises(ExportError, match=message):
        pull_model(PinnedModel(str(copy)), tmp_path / "unused")


def test_checksums_name_every_file(exported: Path) -> None:
    listed = set(json.loads((exported / "checksums.json").read_text()))
    assert listed == {path.name for path in exported.iterdir()} - {"checksums.json"}


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither a folder nor a registered model"):
        pull_model(PinnedModel(str(tmp_path / "none")), tmp_path / "to")
