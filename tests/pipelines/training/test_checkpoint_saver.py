"""The order in which one worker's checkpoint comes to storage."""

from pathlib import Path

import pytest
from ray.train import Checkpoint

from pipelines.checkpoint.losses import LossLog, read_losses
from pipelines.checkpoint.state import TrainState
from pipelines.data.ledger import Ledger
from pipelines.io.run_folder import RunFolder
from pipelines.training import checkpoint_saver
from pipelines.training.checkpoint_saver import CheckpointSaver, Upload
from pipelines.training.validation_turn import ValidationTurn
from pipelines.training.worker import Worker


def saver_of(folder: Path, rank: int, state: TrainState, upload: Upload, saved: int = 0) -> CheckpointSaver:
    return CheckpointSaver(
        worker=Worker(None, rank, world=2, start=""),
        run_url=str(folder),
        precision="fp32",
        lora_scale=None,
        recipe={},
        ledger=Ledger([[1]]),
        losses=LossLog(state),
        upload=upload,
        retry_s=0.0,
        require_lease=lambda: None,
        validation=ValidationTurn(0),
        saved=saved,
    )


@pytest.mark.parametrize("saved", [0, 3])
def test_the_second_checkpoint_of_a_run_waits_for_the_commit_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    """Else a worker that dies before Ray's first record leaves two whole checkpoints that nothing names."""
    order: list[str] = []
    state = TrainState("abc", 2, 9, step=4, last_losses=(0.5,))
    saver = saver_of(tmp_path, 1, state, lambda checkpoint, name: checkpoint, saved)

    def committed(name: str, timeout_s: float) -> bool:
        order.append(f"wait {name}")
        return True

    for name in ("_gather", "_await_upload"):
        monkeypatch.setattr(saver, name, lambda: None)
    monkeypatch.setattr(checkpoint_saver, "save_shards", lambda *_: order.append("write"))
    monkeypatch.setattr(checkpoint_saver, "checkpoint_bytes", lambda _: 1)
    monkeypatch.setattr(checkpoint_saver.torch.distributed, "broadcast_object_list", lambda names, src: None)
    monkeypatch.setattr(checkpoint_saver.ray.train, "report", lambda *_, **__: order.append("report"))
    monkeypatch.setattr(checkpoint_saver, "wait_committed", committed)
    first = saver.save(state, [])
    saver.save(state, [])
    saver.save(state, [])
    waits = [f"wait {first}"] if saved == 0 else []
    assert order == ["write", "report", *waits, "write", "report", "write", "report"]


@pytest.mark.parametrize("rank", [0, 1])
def test_losses_are_stored_before_the_checkpoint_that_is_then_committed(tmp_path: Path, rank: int) -> None:
    state = TrainState("abc", 2, 9)
    stored: list[list[str]] = []

    def upload(checkpoint: Checkpoint, name: str) -> Checkpoint:
        stored.append(sorted(path.name for path in tmp_path.rglob("*.f64")))
        raise ConnectionError("the worker is killed in the upload")

    saver = saver_of(tmp_path, rank, state, upload)
    saver.trained([], 0.5)
    saver._loss_file = saver.losses.take()
    with pytest.raises(ConnectionError):
        saver._upload(Checkpoint(str(tmp_path)), "step-1")
    assert stored == [["000000000-000000001.f64"] if rank == 0 else []]
    if rank == 0:
        assert read_losses(RunFolder(str(tmp_path)), TrainState("abc", 2, 9, step=1)).tolist() == [0.5]
