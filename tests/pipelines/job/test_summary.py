"""What a person reads at the end of a job names everything that was left out of it."""

from typing import Any

from pipelines.job.summary import summary_text

SUMMARY: dict[str, Any] = {
    "run_name": "r",
    "run_id": "1",
    "model_uri": "models:/meteor/1",
    "model_alias_uri": "models:/meteor@latest",
    "world_size": 2,
    "steps": 8,
    "samples_expected": 100,
    "samples_seen": 93,
    "dropped": {"undecodable_image": 2, "too_long": 5},
    "truncated": 7,
    "data": {"s3://b/a/manifest.parquet": {"left out": {"directory": 2}, "not read": {"url": 1000}}, "s3://b/c": {}},
    "padding_share": 0.1,
    "restarts": 0,
    "loss_first": 5.0,
    "loss_last": 1.0,
    "exported_step": 8,
    "heldout_loss": 1.0,
    "heldout_loss_shuffled_images": 2.0,
    "heldout_answers": 4,
    "heldout_answers_right": 3,
    "visual_tokens": {"encode": {}, "fuse": {"in": 64, "kept": 32}, "decode_kept_mean": None},
    "lambda": None,
    "parity_max_abs_diff": 0.0,
    "samples_per_s": 10.0,
    "wall_s": {"total": 1.0},
}


def test_dropped_truncated_and_left_out_are_said() -> None:
    lines = [" ".join(line.split()) for line in summary_text(SUMMARY).splitlines()]
    assert "samples 93 of 100 trained (7 of them truncated), dropped: 2 undecodable_image, 5 too_long" in lines
    assert "data s3://b/a/manifest.parquet: left out: 2 directory" in lines
    assert "data s3://b/a/manifest.parquet: not read: 1,000 url" in lines


def test_a_summary_from_before_is_shown() -> None:
    before = {name: value for name, value in SUMMARY.items() if name not in ("truncated", "data")}
    text = " ".join(summary_text(before).split())
    assert "samples 93 of 100 trained, dropped: 2 undecodable_image" in text
