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


def test_speed_is_one_line_with_what_was_measured() -> None:
    speed = {"tokens_per_s": 1234.4, "workers/data_wait_share": 0.02, "workers/peak_memory_gb": 1.26}
    lines = [" ".join(line.split()) for line in summary_text({**SUMMARY, "speed": speed}).splitlines()]
    assert "speed 1234 tokens/s, 2% waiting for data, 1.3 GB a worker at most" in lines
    counted = {**speed, "workers/tflops": 0.04567, "mfu": 0.31, "hfu": 0.402}
    lines = [" ".join(line.split()) for line in summary_text({**SUMMARY, "speed": counted}).splitlines()]
    assert any("1234 tokens/s, 0.0457 TFLOP/s a worker, MFU 31%, HFU 40%, 2% waiting" in line for line in lines)
    assert len(lines) == len(summary_text({**SUMMARY, "speed": {}}).splitlines()) + 1


def test_a_summary_from_before_is_shown() -> None:
    before = {name: value for name, value in SUMMARY.items() if name not in ("truncated", "data")}
    text = " ".join(summary_text(before).split())
    assert "samples 93 of 100 trained, dropped: 2 undecodable_image" in text
