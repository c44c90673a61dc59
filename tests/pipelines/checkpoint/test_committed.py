"""What Ray's snapshot names counts; nothing else does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.checkpoint.committed import latest_checkpoint
from pipelines.checkpoint.fallback import remove_uncommitted
from pipelines.checkpoint.losses import LossFile, write_losses
from pipelines.checkpoint.state import CheckpointError, TrainState
from pipelines.io.run_folder import RunFolder


def test_no_checkpoint_before_the_first(tmp_path: Path) -> None:
    assert latest_checkpoint(str(tmp_path), "a") is None


def test_damaged_snapshot_names_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a" / "train"
    folder.mkdir(parents=True)
    (folder / "checkpoint_manager_snapshot.json").write_text('{"latest_checkpoint_res')
    with pytest.raises(CheckpointError, match=r"checkpoint_manager_snapshot.json is damaged"):
        latest_checkpoint(str(tmp_path), "a")


def test_only_what_no_snapshot_names_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a" / "train"
    for name in ("step-0000002-a", "step-0000004-b", "step-0000006-c"):
        (folder / name / "zero3").mkdir(parents=True)
        (folder / name / "zero3" / "file").write_text("x")
    (folder / "step-0000004-b" / "train_state.json").write_text(TrainState("abc", 2, 9, step=4).to_json())
    for first, last in ((0, 2), (2, 4), (4, 6)):
        write_losses(RunFolder(str(folder.parent)), LossFile(first, last), b"", retry_s=0.0)
    latest, older = {"checkpoint_dir_name": "step-0000004-b"}, {"checkpoint_dir_name": "step-0000002-a"}
    snapshot = {"latest_checkpoint_result": latest, "checkpoint_results": [older, latest]}
    (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    assert remove_uncommitted(str(tmp_path), "a") == ["step-0000006-c"]
    assert sorted(path.parent.parent.name for path in folder.rglob("file")) == ["step-0000002-a", "step-0000004-b"]
    kept = ["000000000-000000002.f64", "000000002-000000004.f64"]
    assert sorted(path.name for path in (folder.parent / "step-losses").iterdir()) == kept
    assert remove_uncommitted(str(tmp_path), "a") == []
    assert remove_uncommitted(str(tmp_path), "never-started") == []


def test_what_ray_s_controller_imports_loads_no_torch() -> None:
    """It starts anew with every attempt to train; torch and transformers would take it 6 s."""
    rooms = "checkpoint.committed checkpoint.fallback checkpoint.best checkpoint.local"
    rooms += " recovery.run_lock recovery.lease training.validation"
    imports = ", ".join(f"pipelines.{name}" for name in rooms.split())
    code = f"import sys, {imports}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
