"""What a job says of a run."""

import dataclasses
from pathlib import Path

from pipelines.checkpoint.state import TrainState


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
