"""What a job says of a run."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.checkpoint.committed import CheckpointRef
from pipelines.checkpoint.losses import LossFile, write_losses
from pipelines.checkpoint.state import TrainState
from pipelines.io.run_folder import RunFolder
from pipelines.job.train import Training


def state(**changes: object) -> TrainState:
    return dataclasses.replace(TrainState("abc", world_size=2, total_steps=6), **changes)  # type: ignore[arg-type]


def test_a_failed_job_says_what_is_kept(tmp_path: Path) -> None:
    from pipelines.job.run import what_is_kept

    assert what_is_kept(str(tmp_path), "a").startswith(
        f"kept: run a with no step, in {tmp_path}/runs/a; the same command"
    )
    folder = tmp_path / "runs" / "a" / "train"
    (folder / "step-4").mkdir(parents=True)
    (folder / "step-4" / "train_state.json").write_text(state(step=4).to_json())
    snapshot = folder / "checkpoint_manager_snapshot.json"
    snapshot.write_text('{"latest_checkpoint_result": {"checkpoint_dir_name": "step-4"}, "checkpoint_results": []}')
    assert "the checkpoint of step 4 of 6" in what_is_kept(str(tmp_path), "a")
    snapshot.write_text("{")
    assert "cannot be read just now" in what_is_kept(str(tmp_path), "a")


def test_a_lost_file_of_losses_costs_a_picture_and_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.job.answers import _draw_training

    run = RunFolder(str(tmp_path / "run"))
    final = {"heldout_loss": 1.0, "heldout_loss_shuffled_images": 2.0}
    last = CheckpointRef("last", state(step=2, final=final))
    ranks = {"estimator": "entropy", "expected": {}}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipelines.job.answers.draw_ranks", lambda ranks: Image.new("RGB", (2, 2)))
        _draw_training(run, Training(last, last, 8), ranks, tmp_path)
        assert "loss.png is left out" in capsys.readouterr().out
        write_losses(run, LossFile(0, 2), np.array([2.0, 1.0]).tobytes(), 0.0)
        _draw_training(run, Training(last, last, 8), ranks, tmp_path)
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_summary_ends_with_two_commands_that_the_jobs_take() -> None:
    import shlex

    from jobs import predict, sweep
    from pipelines.job.summary import what_next

    summary = {"model_alias_uri": "models:/meteor@latest-pretrain", "visual_tokens": {"fuse": {"kept": 33}}}
    ask, search = (shlex.split(line.partition("python ")[2]) for line in what_next(summary).splitlines())
    assert ask[0] == "jobs/predict.py"
    assert predict.JOB.parse(ask[1:]).model == "models:/meteor@latest-pretrain"
    assert search[0] == "jobs/sweep.py"
    assert sweep.JOB.parse(search[1:]).settings.budgets == (16.0,)
