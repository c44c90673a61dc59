"""What calibration concludes: drift, lambda on other prompts, the file. No cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from meteor_model.pruners.counts import adaptive_counts
from pipelines.calibration import report as calibration_file
from pipelines.calibration.drift import compare_ranks
from pipelines.calibration.image_plan import CalibrationError
from pipelines.calibration.lambda_check import check_lambda
from pipelines.calibration.masking import Masked, MaskingReport
from pipelines.calibration.ranks import RankReport, measures_of, report_budgets
from pipelines.calibration.report import Calibration, Dataset, calibration_text, load_report, split_address
from pipelines.calibration.statistics import RunningStatistics
from pipelines.evaluation.intervals import Interval
from pipelines.io.storage import StorageError
from pipelines.registry.folder import ExportError, weights_digest
from tests.meteor_model.builders import DENSE, PRUNED, config

MEASURES = measures_of(config())


def report(scale: dict[str, float] | None = None, std: float = 1.0, images: int = 50, seed: int = 0) -> RankReport:
    """Ranks around 20; `scale` multiplies those of an encoder."""
    means = np.array([20.0 * (scale or {}).get(name, 1.0) for _, name, _ in MEASURES])
    values = np.abs(np.random.default_rng(seed).normal(means, std, (images, len(MEASURES))))
    return RankReport.of(RunningStatistics.of(values), MEASURES, {"undecodable_image": 1}, 2)


@pytest.mark.parametrize(
    ("other", "verdict"),
    [
        (report(seed=1), "same"),
        (report({"clip": 2.0}, seed=1), "drift"),
        (report({"clip": 1.05, "pix2struct": 1.05, "convnext": 1.05}, seed=1), "ranks_only"),
        (report({"clip": 2.0}, std=25.0, images=3, seed=2), "undecided"),
    ],
)
def test_verdicts(other: RankReport, verdict: str) -> None:
    drift = compare_ranks(config(PRUNED), report(), other, "there")
    assert (drift.verdict, drift.images) == (verdict, other.images), drift.reason
    assert drift.tokens_moved is not None
    assert (drift.tokens_moved > 1) == (verdict in ("drift", "undecided"))
    shift = drift.ranks["effective"]["clip"][0]
    mine, others = report().ranks["effective"]["clip"][0], other.ranks["effective"]["clip"][0]
    assert shift.difference == pytest.approx(others.mean - mine.mean)
    assert shift.low <= shift.difference <= shift.high


def test_chance_alone_is_seldom_called_drift() -> None:
    """The family of boundaries keeps its 5 %, though 7 intervals of 95 % each would not."""
    here = [compare_ranks(config(DENSE), dense(2 * seed), dense(2 * seed + 1), "there") for seed in range(200)]
    assert sum(drift.verdict != "same" for drift in here) <= 20
    assert here[0].budgets is None
    assert "stage 1 is off" in here[0].reason


def dense(seed: int) -> RankReport:
    measures = measures_of(config(DENSE))
    values = np.random.default_rng(seed).normal(20.0, 3.0, (12, len(measures)))
    return RankReport.of(RunningStatistics.of(values), measures, {})


def test_other_models_are_not_compared() -> None:
    with pytest.raises(CalibrationError, match="compare datasets on one model"):
        compare_ranks(config(PRUNED), report(), dense(0), "there")
    with pytest.raises(CalibrationError, match="there has 1 measured image"):
        compare_ranks(config(PRUNED), report(), replace(report(), images=1), "there")


def test_lambda_is_checked_on_prompts_that_it_was_not_solved_on() -> None:
    generator = torch.Generator().manual_seed(0)
    mass, visual = torch.rand(200, generator=generator), torch.full((200,), 32)
    single, alone = torch.ones(200, dtype=torch.int64), [str(number) for number in range(200)]
    found = check_lambda(mass, visual, single, alone, 12.0, 1)
    counts = adaptive_counts(mass, found.lam, visual, 1).double()
    assert found.solved_per_image == pytest.approx(12.0, abs=0.02) == float(counts[::2].mean())
    assert found.checked_per_image == pytest.approx(float(counts[1::2].mean()))
    assert (found.solved_on, found.checked_on, found.checked_groups) == (100, 100, 100)
    assert found.low < found.checked_per_image < found.high
    assert not found.holds, "a hundred prompts leave more than 5 % open: little data never makes it hold"
    many = 4000
    mass, visual = 0.5 + 0.1 * torch.rand(many, generator=generator), torch.full((many,), 32)
    single, alone = torch.ones(many, dtype=torch.int64), [str(number) for number in range(many)]
    assert check_lambda(mass, visual, single, alone, 12.0, 1).holds
    heavy = mass.clone()
    heavy[1::2] *= 0.2  # the others ask for less: the target does not carry over, and the report says so
    assert not check_lambda(heavy, visual, single, alone, 12.0, 1).holds
    with pytest.raises(CalibrationError, match="3 prompts with images in 3 groups"):
        check_lambda(mass[:3], visual[:3], single[:3], alone[:3], 12.0, 1)


def test_lambda_is_checked_per_image_and_over_groups() -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.tensor([1, 4] * 100)
    mass, visual = torch.rand(200, generator=generator) * images, 32 * images
    groups = [str(number // 4) for number in range(200)]
    found = check_lambda(mass, visual, images, groups, 12.0, 1)
    counts = adaptive_counts(mass, found.lam, visual, 1).double()
    first = torch.tensor([int(group) % 2 == 0 for group in groups])
    assert found.solved_per_image == pytest.approx(12.0, abs=0.02)
    assert found.solved_per_image == pytest.approx(float(counts[first].sum() / images[first].sum()))
    assert found.checked_per_image == pytest.approx(float(counts[~first].sum() / images[~first].sum()))
    assert (found.solved_on, found.checked_on, found.checked_groups) == (100, 100, 25)


def calibration() -> Calibration:
    here, built = report(), config(PRUNED)
    budgets = report_budgets(built, here, "effective")
    assert budgets is not None
    return Calibration(
        "s3://user:secret@host/model",
        "0" * 64,
        "effective",
        Dataset("s3://meteor/data/manifest.parquet", "1" * 64, "train"),
        here,
        {"effective": budgets},
        compare_ranks(built, here, report({"clip": 2.0}), "there"),
        check_lambda(torch.rand(20), torch.full((20,), 32), torch.ones(20).long(), list(range(20)), 12.0, 1),
        MaskingReport("suite", 40, 0.8, Interval(0.7, 0.9), {"clip": Masked(0.2, Interval(0.1, 0.3), 0.75)}),
        {"samples": 50, "api_key": "hidden"},
        "abc",
        calibration_file.now(),
    )


def test_the_file_is_read_again_without_secrets(tmp_path: Path) -> None:
    made = calibration()
    where = calibration_file.store(made, made.chart(), str(tmp_path / "out"))
    text = Path(where).read_text()
    assert "secret" not in text
    assert "hidden" not in text
    assert json.loads(text)["format_version"] == 2
    again, digest = load_report(where)
    assert (again, digest) == (made.report, "0" * 64)
    assert (tmp_path / "out" / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(text)["masking"]["without"]["clip"]["usefulness"] == 0.75
    told = calibration_text(made)
    for part in (
        "drift against there",
        "1 undecodable_image; 2 without",
        "convnext at boundary 3",
        "lambda",
        "without clip",
    ):
        assert part in told


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    later = tmp_path / "later.json"
    later.write_text(json.dumps({**calibration().to_dict(), "format_version": 3}))
    with pytest.raises(CalibrationError, match=r"later\.json has format 3"):
        load_report(str(later))
    later.write_text("[]")
    with pytest.raises(CalibrationError, match="no calibration"):
        load_report(str(later))
    with pytest.raises(StorageError, match=r"none\.json"):
        load_report(str(tmp_path / "none.json"))
    with pytest.raises(ExportError, match="no weights"):
        weights_digest(tmp_path)


def test_a_split_is_named_after_a_colon() -> None:
    assert split_address("s3://meteor/data/x:heldout") == ("s3://meteor/data/x", "heldout")
    assert split_address("s3://meteor/data/x") == ("s3://meteor/data/x", None)
    assert split_address("/data/x") == ("/data/x", None)
