"""What a start goes on from, and what may be removed: never for want of evidence."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import ray.train

from pipelines.checkpoint.committed import latest_checkpoint
from pipelines.checkpoint.fallback import LostSnapshotError, fall_back, remove_uncommitted, set_aside, settle_start
from pipelines.checkpoint.losses import LossFile, write_losses
from pipelines.checkpoint.state import STATE_FILE, CheckpointError, TrainState
from pipelines.compat.ray import make_snapshot, parse_snapshot
from pipelines.io import retry
from pipelines.io.run_folder import RunFolder, run_folder
from pipelines.io.sealed import DamagedFileError, list_name
from pipelines.io.upload import CheckpointUpload

WORLD = 2


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF", retry.Backoff(0.001, 0.01))


class Run:
    """A run in a local folder, with checkpoints as workers upload them."""

    def __init__(self, root: Path) -> None:
        self.root, self.scratch = root, root / "scratch"
        self.folder: RunFolder = run_folder(str(root), "a")
        self.said: list[str] = []
        Path(self.folder.train).mkdir(parents=True)

    def upload(self, step: int, ranks: int = WORLD, sealed: bool = True) -> str:
        name = f"step-{step:07d}-x"
        for rank in range(ranks):
            local = self.scratch / f"{step}-{rank}"
            (local / "zero3").mkdir(parents=True, exist_ok=True)
            (local / "zero3" / f"rank_{rank}.pt").write_bytes(random.Random(step).randbytes(100))
            if rank == 0:
                state = TrainState("abc", WORLD, 99, step=step, first_losses=(1.0,), last_losses=(float(step),))
                (local / STATE_FILE).write_text(state.to_json())
            CheckpointUpload(self.folder.train, part=rank, parts=WORLD)(ray.train.Checkpoint(str(local)), name)
        if not sealed:
            for path in self.path(name).glob("checksums-*"):
                path.unlink()
        write_losses(self.folder, LossFile(step - 2, step), bytes(16), 0.0)
        return name

    def commit(self, *steps: int) -> None:
        names = [self.upload(step) for step in steps]
        Path(self.folder.snapshot).write_bytes(make_snapshot([(name, {"step": 1.0}) for name in names]))

    def path(self, name: str) -> Path:
        return Path(self.folder.checkpoint(name))

    def settle(self, resume_step: int | None = None) -> Any:
        self.said = []
        return settle_start(str(self.root), "a", resume_step, self.said.append)

    @property
    def folders(self) -> list[int]:
        files = [path for path in Path(self.folder.train).rglob("*") if path.is_file()]
        names = {path.relative_to(self.folder.train).parts[0] for path in files}
        return sorted(int(name[5:12]) for name in names if name.startswith("step-"))

    @property
    def latest(self) -> int | None:
        checkpoint = latest_checkpoint(str(self.root), "a")
        return checkpoint.state.step if checkpoint else None


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_a_new_run_and_a_usual_start_say_nothing(run: Run) -> None:
    assert run.settle() is None
    assert remove_uncommitted(str(run.root), "a") == []
    run.commit(2, 4)
    assert run.settle().state.step == 4
    assert run.said == []
    assert set_aside(run.folder).checkpoints == ()


@pytest.mark.parametrize("damage", ["changed", "cut", "missing file", "missing list", "missing folder"])
def test_a_damaged_newest_checkpoint_falls_back_loudly_to_the_one_before(run: Run, damage: str) -> None:
    run.commit(2, 4, 6)
    newest = run.path("step-0000006-x")
    state = newest / STATE_FILE
    if damage == "changed":
        state.write_text(state.read_text().replace('"step": 6', '"step": 7'))
    elif damage == "cut":
        state.write_text(state.read_text()[:50])
    elif damage == "missing file":
        state.unlink()
    elif damage == "missing list":
        (newest / list_name(0, WORLD)).unlink()
    else:
        shutil.rmtree(newest)
    assert run.settle().state.step == 4 == run.latest
    assert any("step-0000006-x" in line and "SET ASIDE" in line for line in run.said)
    assert [one.step for one in set_aside(run.folder).checkpoints] == [6]
    left = [2, 4] if damage == "missing folder" else [2, 4, 6]
    assert remove_uncommitted(str(run.root), "a") == []
    assert run.folders == left, "what was set aside stays until a later step is committed"
    assert run.settle().state.step == 4
    assert run.said == []


def test_what_workers_find_damaged_is_set_aside_until_none_is_left(run: Run) -> None:
    run.commit(2, 4)
    error = DamagedFileError(run.folder.checkpoint("step-0000004-x"), "zero3/rank_1.pt", "it is missing")
    assert fall_back(run.folder, error.folder, error, run.said.append) == "step-0000002-x"
    assert run.latest == 2
    error = DamagedFileError(run.folder.checkpoint("step-0000002-x"), "zero3/rank_1.pt", "it is missing")
    with pytest.raises(CheckpointError, match=r"zero3/rank_1.pt is damaged.*No other checkpoint of the run is kept"):
        fall_back(run.folder, error.folder, error, run.said.append)
    assert run.latest == 2
    assert run.folders == [2, 4]


def test_what_was_set_aside_goes_once_a_later_step_is_committed(run: Run) -> None:
    run.commit(2, 4, 6)
    (run.path("step-0000006-x") / STATE_FILE).unlink()
    run.settle()
    name = run.upload(8)
    Path(run.folder.snapshot).write_bytes(make_snapshot([(name, {})]))
    assert remove_uncommitted(str(run.root), "a") == ["step-0000002-x", "step-0000004-x", "step-0000006-x"]


def test_a_named_step_is_gone_back_to_once(run: Run) -> None:
    run.commit(2, 4, 6)
    with pytest.raises(
        CheckpointError, match=r"run.resume_step is 5, but .* keeps the checkpoints of the steps 2, 4, 6"
    ):
        run.settle(5)
    assert run.settle(6).state.step == 6
    assert run.settle(2).state.step == 2 == run.latest
    assert remove_uncommitted(str(run.root), "a") == []
    assert run.folders == [2, 4, 6]
    again = run.upload(5)  # trained on from step 2
    results: list[tuple[str, dict[str, float]]] = [("step-0000002-x", {}), (again, {})]
    Path(run.folder.snapshot).write_bytes(make_snapshot(results))
    assert run.settle(2).state.step == 5, "the same command goes on"
    assert any("went back to it before" in line for line in run.said)
    Path(run.folder.snapshot).write_bytes(make_snapshot(results[1:]))
    assert run.settle(2).state.step == 5, "also when step 2 is kept no more"


@pytest.mark.parametrize("damage", ["lost", "cut", "empty", "other json"])
def test_a_lost_snapshot_removes_nothing_and_a_named_step_brings_the_run_back(run: Run, damage: str) -> None:
    run.commit(2, 4, 6)
    snapshot = Path(run.folder.snapshot)
    content = {"lost": None, "cut": snapshot.read_text()[:99], "empty": "", "other json": "[1]"}[damage]
    snapshot.unlink()
    if content is not None:
        snapshot.write_text(content)
    before = sorted(str(path) for path in run.root.rglob("*"))
    with pytest.raises(LostSnapshotError, match=r"--run.resume-step 6 \(whole: the steps 2, 4, 6\).*begin at step 0"):
        run.settle()
    with pytest.raises(CheckpointError):
        remove_uncommitted(str(run.root), "a")
    with pytest.raises(LostSnapshotError, match="Nothing was removed"):
        run.settle(3)
    assert before == sorted(str(path) for path in run.root.rglob("*"))
    assert run.settle(4).state.step == 4 == run.latest
    assert parse_snapshot(snapshot.read_bytes()).names == {"step-0000002-x", "step-0000004-x"}
    assert run.settle().state.step == 4


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("files", ["checkpoints", "no checkpoint but losses"])
def test_without_a_snapshot_only_a_first_upload_that_was_cut_short_is_removed(
    run: Run, sealed: bool, files: str
) -> None:
    names = [run.upload(step, sealed=sealed) for step in (2, 4)]
    if files != "checkpoints":
        shutil.rmtree(run.folder.train)
        names = []
    before = sorted(str(path) for path in run.root.rglob("*"))
    for start in (run.settle, lambda: remove_uncommitted(str(run.root), "a")):
        with pytest.raises(LostSnapshotError, match="Nothing was removed"):
            start()
    assert before == sorted(str(path) for path in run.root.rglob("*"))
    assert len(run.folders) == len(names)


@pytest.mark.parametrize("left", ["a worker's part is missing", "a file is missing", "whole", "without any list"])
def test_the_first_upload_of_a_run(run: Run, left: str) -> None:
    name = run.upload(2, ranks=1 if left == "a worker's part is missing" else WORLD, sealed=left != "without any list")
    if left == "a file is missing":
        (run.path(name) / "zero3" / "rank_1.pt").unlink()
    if left == "without any list":
        with pytest.raises(LostSnapshotError):
            run.settle()
        return
    if left == "whole":  # killed between the upload and its commit
        assert run.settle().state.step == 2 == run.latest
        assert any("about to be committed" in line for line in run.said)
        assert remove_uncommitted(str(run.root), "a") == []
        return
    assert run.settle() is None
    assert remove_uncommitted(str(run.root), "a") == [name]
    assert run.folders == []


def test_a_snapshot_is_one_for_ray(run: Run) -> None:
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

    run.commit(2, 4, 6)
    (run.path("step-0000006-x") / STATE_FILE).unlink()
    run.settle()
    state = _CheckpointManagerState(**json.loads(Path(run.folder.snapshot).read_bytes()))
    assert state.latest_checkpoint_result is not None
    assert state.latest_checkpoint_result.checkpoint_dir_name == "step-0000004-x"
    assert len(state.checkpoint_results) == len(state.checkpoint_report_indices) == 2
