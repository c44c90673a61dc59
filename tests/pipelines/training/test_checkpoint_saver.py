"""The order in which one worker's checkpoint comes to storage."""

from pathlib import Path

import pytest
from ray.train import Checkpoint

from pipelines.checkpoint.losses import LossLog, read_losses
from pipelines.checkpoint.state import TrainState
from pipelines.data.ledger import Ledger
from pipelines.io.run_folder import RunFolder
from pipelines.training.checkpoint_saver import CheckpointSaver
from pipelines.training.validation_turn import ValidationTurn
from pipelines.training.worker import Worker


@pytest.mark.parametrize("rank", [0, 1])
def test_losses_are_stored_before_the_checkpoint_that_is_then_committed(tmp_path: Path, rank: int) -> None:
    state = TrainState("abc", 2, 9)
    stored: list[list[str]] = []

    def upload(checkpoint: Checkpoint, name: str) -> Checkpoint:
        stored.append(sorted(path.name for path in tmp_path.rglob("*.f64")))
        raise ConnectionError("the worker is killed in the upload")

    saver = CheckpointSaver(
        worker=Worker(None, rank, world=2, start=""),
        run_url=str(tmp_path),
        precision="fp32",
        lora_scale=None,
        recipe={},
        ledger=Ledger([[1]]),
        losses=LossLog(state),
        upload=upload,
        retry_s=0.0,
        require_lease=lambda: None,
        validation=ValidationTurn(0),
        saved=0,
    )
    saver.trained([], 0.5)
    saver._loss_file = saver.losses.take()
    with pytest.raises(ConnectionError):
        saver._upload(Checkpoint(str(tmp_path)), "step-1")
    assert stored == [["000000000-000000001.f64"] if rank == 0 else []]
    if rank == 0:
        assert read_losses(RunFolder(str(tmp_path)), TrainState("abc", 2, 9, step=1)).tolist() == [0.5]
