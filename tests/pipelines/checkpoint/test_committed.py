"""What Ray's snapshot names counts; nothing else does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.checkpoint.committed import latest_checkpoint, sweep_uncommitted
from pipelines.checkpoint.state import CheckpointError


def test_no_checkpoint_before_the_first(tmp_path: Path) -> None:
    assert latest_checkpoint(str(tmp_path), "a") is None


def test_damaged_snapshot_names_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a" / "train"
    folder.mkdir(parents=True)
    (folder / "checkpoint_manager_snapshot.json").write_text('{"latest_checkpoint_res')
    with pytest.raises(CheckpointError, match=r"checkpoint_manager_snapshot.json is damaged"):
        latest_checkpoint(str(tmp_path), "a")


def test_only_what_no_snapshot_names_is_swept(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a" / "train"
    for name in ("step-0000002-a", "step-0000004-b", "step-0000006-c"):
        (folder / name / "zero3").mkdir(parents=True)
        (folder / name / "zero3" / "file").write_text("x")
    latest, older = {"checkpoint_dir_name": "step-0000004-b"}, {"checkpoint_dir_name": "step-0000002-a"}
    snapshot = {"latest_checkpoint_result": latest, "checkpoint_results": [older, latest]}
    (folder / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    assert sweep_uncommitted(str(tmp_path), "a") == ["step-0000006-c"]
    assert sorted(path.parent.parent.name for path in folder.rglob("file")) == ["step-0000002-a", "step-0000004-b"]
    assert sweep_uncommitted(str(tmp_path), "a") == []
    assert sweep_uncommitted(str(tmp_path), "never started") == []


def test_what_ray_s_controller_imports_loads_no_torch() -> None:
    """It starts anew with every attempt to train; torch and transformers would take it 6 s."""
    rooms = "checkpoint.committed checkpoint.best checkpoint.local recovery.run_lock training.validation"
    imports = ", ".join(f"pipelines.{name}" for name in rooms.split())
    code = f"import sys, {imports}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
