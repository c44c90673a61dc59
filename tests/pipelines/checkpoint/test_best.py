"""The best checkpoint is a whole copy, whenever the process that makes it is killed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.checkpoint.best import best_checkpoint, checkpoint_to_export, keep_best
from pipelines.checkpoint.committed import CheckpointRef
from pipelines.checkpoint.state import PARITY_FILE, STATE_FILE, CheckpointError, TrainState
from pipelines.io import storage


def write_checkpoint(run: Path, step: int) -> str:
    folder = run / "train" / f"step-{step}"
    (folder / "zero3").mkdir(parents=True)
    (folder / "zero3" / "rank_0.pt").write_text(f"weights of step {step}" * step)
    (folder / STATE_FILE).write_text(TrainState("hash", 2, 9, step=step).to_json())
    return str(folder)


def test_the_lowest_loss_is_kept(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "name"
    assert best_checkpoint(str(tmp_path), "name") is None
    losses = {1: 3.0, 2: float("nan"), 3: 2.0, 4: 2.0, 5: 1.5, 6: float("inf")}
    metrics = {step: {"heldout_loss": loss} for step, loss in losses.items()}
    kept = {step: keep_best(str(run), write_checkpoint(run, step), step, of) for step, of in metrics.items()}
    assert kept == {1: True, 2: False, 3: True, 4: False, 5: True, 6: False}
    shutil.rmtree(run / "train")  # as Ray deletes old checkpoints
    best = best_checkpoint(str(tmp_path), "name")
    assert best is not None
    assert best.state.step == 5
    assert {name.partition("/")[0] for name in storage.list_files(str(run / "best"))} == {"step-5", "best.json"}
    (run / "best" / "step-5" / "zero3" / "rank_0.pt").write_text("short")
    with pytest.raises(ValueError, match=r"is not what .*best.json says: zero3/rank_0.pt"):
        best_checkpoint(str(tmp_path), "name")


def test_a_best_copy_that_kept_the_loss_alone_is_read(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "name"
    keep_best(str(run), write_checkpoint(run, 3), 3, {"heldout_loss": 2.0, "heldout_loss_shuffled_images": 3.0})
    record = str(run / "best" / "best.json")
    values = storage.read_json(record)
    for name in ("metrics", "unknown", "sha256"):
        del values[name]
    storage.write_json(record, values)
    best = best_checkpoint(str(tmp_path), "name")
    assert best is not None
    assert (best.state.step, best.state.final) == (3, {"heldout_loss": 2.0})


def test_the_checkpoint_to_export_has_the_lowest_loss_of_all_or_is_the_last(tmp_path: Path) -> None:
    run, root = tmp_path / "runs" / "name", str(tmp_path)

    def last(loss: float) -> CheckpointRef:
        return CheckpointRef("last", TrainState("hash", 2, 9, step=9, final={"heldout_loss": loss}))

    assert checkpoint_to_export(root, "name", last(1.0), "last").url == "last"
    with pytest.raises(CheckpointError, match=r"training.validate_every_checkpoints of at least 1"):
        checkpoint_to_export(root, "name", last(1.0), "best")
    metrics = {"heldout_loss": 2.0, "heldout_loss_shuffled_images": 3.0}
    keep_best(str(run), write_checkpoint(run, 5), 5, metrics)
    assert checkpoint_to_export(root, "name", last(1.0), "best").url == "last"
    assert checkpoint_to_export(root, "name", last(2.5), "last").url == "last"
    with pytest.raises(CheckpointError, match=r"step-5 .*holds no parity.safetensors"):
        checkpoint_to_export(root, "name", last(2.5), "best")
    newer = Path(write_checkpoint(run, 6))
    (newer / PARITY_FILE).write_text("batch")
    better = {**metrics, "heldout_loss": 1.5}
    keep_best(str(run), str(newer), 6, better)
    found = checkpoint_to_export(root, "name", last(2.5), "best")
    assert (Path(found.url), found.state.step, found.state.final) == (run / "best" / "step-6", 6, better)


class Killed(BaseException):
    """The process ends here."""


def test_killed_at_any_point_best_json_names_a_whole_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_file = shutil.copyfile

    def dying(call: Callable[..., Any], fuse: list[int], half: bool = False) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            fuse[0] -= 1
            if fuse[0] < 0:
                if half:  # a file that was being copied
                    Path(arguments[1]).write_text("half")
                raise Killed
            return call(*arguments, **named)

        return wrapped

    points = 0
    seen = set()
    while True:
        run = tmp_path / str(points) / "runs" / "name"
        keep_best(str(run), write_checkpoint(run, 1), 1, {"heldout_loss": 3.0})
        newer, fuse = write_checkpoint(run, 2), [points]
        with monkeypatch.context() as patched:
            for name in ("list_sizes", "list_files", "read_json", "write_json", "delete"):
                patched.setattr(storage, name, dying(getattr(storage, name), fuse))
            patched.setattr(shutil, "copyfile", dying(copy_file, fuse, half=True))
            try:
                keep_best(str(run), newer, 2, {"heldout_loss": 2.0})
            except Killed:
                pass
            else:
                break
        best = best_checkpoint(str(tmp_path / str(points)), "name")  # checks every file's size
        assert best is not None
        seen.add(best.state.step)
        keep_best(str(run), newer, 2, {"heldout_loss": 2.0})
        after = best_checkpoint(str(tmp_path / str(points)), "name")
        assert after is not None
        assert after.state.step == 2
        left = {name.partition("/")[0] for name in storage.list_files(str(run / "best"))}
        assert left == {"step-2", "best.json"}
        points += 1
    assert points > 6
    assert seen == {1, 2}
