"""`calibration.json`: what was measured on which model and data, beside the model and in MLflow, with its chart.

`images`, `skipped` and `ranks` are those of a run's `ranks.json`, so what reads one reads the other.
"""

from __future__ import annotations

import io
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meteor_model.visualize import draw_calibration
from pipelines.calibration.drift import Drift
from pipelines.calibration.image_plan import CalibrationError
from pipelines.calibration.lambda_check import TOLERANCE, LambdaReport
from pipelines.calibration.masking import MaskingReport
from pipelines.calibration.ranks import BudgetReport, RankReport
from pipelines.io import sealed, storage
from pipelines.io.redact import redact, redact_text
from pipelines.registry.versions import Registry
from pipelines.tracking.mlflow_run import MlflowRun, RunRequest, document, open_run
from pipelines.tracking.server import TrackingError

FORMAT_VERSION = 2
"""Of 1 lambda's means are per prompt."""
FILE, CHART = "calibration.json", "calibration.png"
_SPLIT_SUFFIX = re.compile(r"(?P<url>.+):(?P<split>[a-z][a-z0-9_]*)")


@dataclass(frozen=True)
class Dataset:
    """Where images came from: address, hash and split of a manifest."""

    manifest: str
    sha256: str
    split: str

    @property
    def name(self) -> str:
        """For people."""
        return f"{redact_text(self.manifest)}:{self.split}"


@dataclass(frozen=True)
class Calibration:
    """Everything one calibration found.

    Attributes:
        model: its address.
        weights_sha256: of the model's weights (`weights_digest`).
        estimator: the one that the model's budgets are made with.
        dataset: what was measured on.
        report: ranks.
        budgets: by estimator; empty with stage 1 off.
        drift: against another dataset, or None.
        decode: lambda, or None where none was asked for.
        masking: usefulness of the encoders, or None where none was asked for.
        settings: of the job.
        git_commit: of the code.
        created: UTC.
    """

    model: str
    weights_sha256: str
    estimator: str
    dataset: Dataset
    report: RankReport
    budgets: dict[str, BudgetReport]
    drift: Drift | None
    decode: LambdaReport | None
    masking: MaskingReport | None
    settings: dict[str, Any]
    git_commit: str
    created: str

    def to_dict(self) -> dict[str, Any]:
        """The file's content, without secrets."""
        plain: dict[str, Any] = redact(
            {
                "format_version": FORMAT_VERSION,
                "model": self.model,
                "weights_sha256": self.weights_sha256,
                "git_commit": self.git_commit,
                "created": self.created,
                "settings": self.settings,
                "dataset": asdict(self.dataset),
                "estimator": self.estimator,
                **self.report.to_dict(),
                "budgets": {name: asdict(item) for name, item in self.budgets.items()},
                "lambda": None if self.decode is None else self.decode.to_dict(),
                "drift": None if self.drift is None else self.drift.to_dict(),
                "masking": None if self.masking is None else self.masking.to_dict(),
            }
        )
        return plain

    def chart(self) -> bytes:
        """The chart as PNG."""
        buffer = io.BytesIO()
        drift = self.drift
        names = (self.dataset.name, drift.against) if drift else (self.dataset.name,)
        reports = (self.report.to_dict(), drift.report.to_dict()) if drift else (self.report.to_dict(),)
        verdict = f"{drift.verdict}: {drift.reason}" if drift else ""
        draw_calibration(dict(zip(names, reports, strict=True)), verdict).save(buffer, format="PNG")
        return buffer.getvalue()


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# ------------------------------------------------------------------------------------------------------------- reading


def split_address(address: str) -> tuple[str, str | None]:
    """Manifest and split of `MANIFEST` or `MANIFEST:SPLIT`; None where no split is named."""
    parts = _SPLIT_SUFFIX.fullmatch(address)
    return (parts["url"], parts["split"]) if parts else (address, None)


def load_report(address: str) -> tuple[RankReport, str | None]:
    """Ranks of an earlier calibration (or a run's `ranks.json`), and the hash of the weights if the file says it.

    Raises:
        CalibrationError: another file, or one of a later format.
        StorageError: where it cannot be read.
    """
    data = storage.read_json(address)
    if not isinstance(data, Mapping):
        raise CalibrationError(f"{address} is no calibration: it holds a {type(data).__name__}")
    if "sha256" in data:
        data = sealed.read_document(address)
    version = data.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise CalibrationError(f"{address} has format {version}, this code reads up to {FORMAT_VERSION}: update it")
    digest = data.get("weights_sha256")
    return RankReport.from_dict(data, address), digest if isinstance(digest, str) else None


# ------------------------------------------------------------------------------------------------------------- storing


def store(calibration: Calibration, chart: bytes, url: str) -> str:
    """Write both files under a folder or prefix; the address of the JSON. Raises StorageError."""
    storage.write_bytes(storage.join(url, CHART), chart)
    storage.write_bytes(storage.join(url, FILE), document(calibration.to_dict()))
    return storage.join(url, FILE)


def file_with_version(calibration: Calibration, chart: bytes, registry: Registry, version: int) -> str:
    """Both files as artifacts of a registered version's run, and tags of the version that name them.

    Returns: path of the JSON among the artifacts. Raises TrackingError.
    """
    run_id = registry.version(version).run_id
    if not run_id:
        raise TrackingError(f"version {version} of {registry.name} belongs to no run, which would hold its calibration")
    data = calibration.dataset
    place = f"calibration/{registry.name}-{version}-{data.sha256[:12]}-{data.split}"
    _log(calibration, chart, MlflowRun(registry.uri, run_id), place)
    tags = {"calibration": f"{place}/{FILE}", "calibration.images": str(calibration.report.images)}
    if calibration.drift is not None:
        tags["calibration.drift"] = f"{calibration.drift.verdict} against {calibration.drift.against}"
    registry.describe_version(version, tags=tags)
    return f"{place}/{FILE}"


def file_with_run(calibration: Calibration, chart: bytes, uri: str, experiment: str) -> str:
    """Both files as artifacts of a new run of its own; the run's id. Raises TrackingError."""
    request = RunRequest(
        experiment,
        f"calibrate-{calibration.dataset.sha256[:8]}-{calibration.weights_sha256[:8]}",
        calibration.settings,
        {
            "job": "calibrate",
            "git_commit": calibration.git_commit,
            "manifest_sha256": calibration.dataset.sha256,
            "weights_sha256": calibration.weights_sha256,
        },
    )
    run = open_run(uri, request)
    _log(calibration, chart, run, "calibration")
    if calibration.drift is not None:
        run.set_tags({"drift": calibration.drift.verdict})
    run.finish()
    return run.run_id


def _log(calibration: Calibration, chart: bytes, run: MlflowRun, place: str) -> None:
    run.log_documents({f"{place}/{FILE}": calibration.to_dict()})
    with tempfile.TemporaryDirectory(prefix="meteor-calibration-") as scratch:
        path = Path(scratch) / CHART
        path.write_bytes(chart)
        run.log_files(path, place)


# -------------------------------------------------------------------------------------------------------------- people


def calibration_text(calibration: Calibration) -> str:
    """What was found, for people: the model's own estimator boundary by boundary, then verdicts."""
    report, estimator = calibration.report, calibration.estimator
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(report.skipped.items())) or "none"
    lines = [
        f"  model     {redact_text(calibration.model)}",
        f"  images    {report.images} of {calibration.dataset.name}; skipped {skipped}; {report.text_only} without",
    ]
    last = max(len(items) for items in report.ranks[estimator].values())
    for name, items in report.ranks[estimator].items():
        for boundary, item in enumerate(items, start=last - len(items) + 1):
            interval = "" if item.low is None else f" [{item.low:.2f}, {item.high:.2f}]"
            spread = "" if item.cv is None else f", varies by {item.cv:.1%}, {item.images_enough} images enough"
            lines.append(f"  {estimator} rank of {name} at boundary {boundary}: {item.mean:.2f}{interval}{spread}")
    if estimator in calibration.budgets:
        lines += [f"  {line}" for line in _budget_lines(calibration.budgets[estimator])]
    if calibration.decode is not None:
        found = calibration.decode
        lines.append(
            f"  lambda    {found.lam:.5g} for {found.target_per_image:g} tokens per image: "
            f"{found.solved_per_image:.2f} on {found.solved_on} prompts it was solved on, "
            f"{found.checked_per_image:.2f} [{found.low:.2f}, {found.high:.2f}] on {found.checked_on} others: it "
            f"{'holds' if found.holds else 'is not shown to hold'} within {TOLERANCE:.0%}"
        )
    if calibration.masking is not None:
        lines += [f"  {line}" for line in calibration.masking.lines()]
    if calibration.drift is not None:
        drift = calibration.drift
        lines.append(f"  drift     {drift.verdict} against {drift.against} ({drift.images} images): {drift.reason}")
    return "\n".join(lines)


def _budget_lines(report: BudgetReport) -> list[str]:
    lines = []
    for name, row in report.budgets.items():
        ranges = " -> ".join(
            f"{budget} ({low}..{high})"
            for budget, low, high in zip(row, report.lowest[name], report.highest[name], strict=True)
        )
        lines.append(f"{name} keeps {ranges} tokens")
    enough = "no number of images is" if report.images_enough is None else f"{report.images_enough} images are"
    return [*lines, f"{enough} enough for budgets to within a token"]


def settings_of(settings: Any) -> dict[str, Any]:
    """A job's settings as plain values."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
