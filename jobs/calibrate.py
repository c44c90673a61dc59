"""Calibrate a model: `python jobs/calibrate.py --model models:/NAME@ALIAS`.

Measures the expected rank of every encoder's feature map at each boundary, distributed over shards; says how certain
the ranks and the token budgets made from them are, whether they hold on other data, and which lambda keeps a mean.
Writes calibration.json and calibration.png beside the model and into MLflow.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
import tyro

from jobs.command_line import run_command
from meteor_model.configuration_meteor import MeteorConfig
from pipelines.calibration.drift import Drift, compare_ranks
from pipelines.calibration.image_plan import CalibrationError, Measuring
from pipelines.calibration.lambda_check import LambdaReport, solve_on_split
from pipelines.calibration.measure import calibrate_ranks
from pipelines.calibration.ranks import ESTIMATORS, RELATIVE_TOLERANCE, RankReport, Ranks, report_budgets
from pipelines.calibration.report import (
    Calibration,
    Dataset,
    file_with_run,
    file_with_version,
    load_report,
    now,
    readable,
    settings_of,
    split_address,
    store,
)
from pipelines.data import shards
from pipelines.data.shards import load_manifest
from pipelines.registry.folder import weights_digest
from pipelines.registry.open import device_for, open_model
from pipelines.registry.versions import PinnedModel, pin_model, trained_on
from pipelines.tracking.mlflow_run import git_commit, require_tracking
from pipelines.tracking.redact import hide_passwords


@dataclass(frozen=True)
class Calibrate:
    """What is measured on what."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the folder of a model that all nodes can read (also s3://)."""
    manifest: str = ""
    """Dataset: s3://BUCKET/PREFIX or a folder; by default the one that the registered version was trained on."""
    split: str = "train"
    """Split of the dataset."""
    samples: int = 256
    """Images to measure: the first usable ones; all of the split's where it has fewer."""
    seed: int | None = None
    """Take shards in a random order of this seed, not in that of the manifest."""
    against: str = ""
    """Check for drift against MANIFEST[:SPLIT] (the same split by default) or an earlier calibration.json."""
    target_mean: float | None = None
    """Visual tokens that stage 3 shall keep on average; by default the model's own target. Lambda is solved for it."""
    decode_split: str = "heldout"
    """Held-back split with the prompts for lambda."""
    decode_samples: int = 64
    """Prompts to solve lambda on; as many others check it. 0 solves none."""
    tolerance: float = RELATIVE_TOLERANCE
    """Images are enough when the mean's 95 % interval is within this share of it to either side."""
    output: str = ""
    """Folder or s3:// prefix for the result; by default MODEL-calibration, and MLflow alone for a registered model."""
    actors: int = 1
    """Copies of the model that measure side by side."""
    batch: int = 16
    """Images that one of them runs at a time."""
    cpus: float = 0.5
    """Ray CPUs that a task or a copy of the model reserves."""
    gpus: float = 0.0
    """GPUs that a copy of the model reserves; 0 runs on CPUs."""
    bad_shards: shards.BadShards = "fail"
    """What to do with a shard that is missing or damaged: fail, or drop it and count its samples."""
    experiment: str = "meteor"
    """MLflow experiment for a model that is not registered."""

    def workers(self) -> Measuring:
        """How the cluster is used."""
        return Measuring(self.actors, self.cpus, self.gpus, self.batch, self.bad_shards)


def check(settings: Calibrate) -> None:
    """What can be wrong before anything is read. Raises ValueError that names the setting."""
    settings.workers()
    if settings.samples < 2:
        raise CalibrationError(f"samples is {settings.samples}; an interval needs at least 2 images")
    if not 0 < settings.tolerance < 1:
        raise CalibrationError(f"tolerance is {settings.tolerance}; it must be a share between 0 and 1")
    if settings.decode_samples < 0 or settings.decode_samples == 1:
        raise CalibrationError(f"decode_samples is {settings.decode_samples}; it must be 0 (no lambda) or at least 2")
    if settings.target_mean is not None and not settings.decode_samples:
        raise CalibrationError("target_mean is given and decode_samples is 0: no lambda would be solved")


def calibrate(settings: Calibrate) -> Calibration:
    """Measure, compare, solve, file, print."""
    check(settings)
    subject = pin_model(settings.model)
    address = settings.manifest or trained_on(subject)
    if not address:
        raise CalibrationError(f"manifest is missing: {settings.model} does not say what it was trained on")
    manifest = load_manifest(address)
    manifest.split(settings.split)
    with open_model(subject) as folder:
        config, digest = MeteorConfig.from_pretrained(folder), weights_digest(folder)
    report = _measure(settings, subject, manifest, settings.split)
    estimator = config.pruning.encode.rank_estimator
    found = {name: report_budgets(config, report, name) for name in ESTIMATORS}
    ranks = report.expected(estimator) if config.pruning.encode.enabled else None
    calibration = Calibration(
        subject.address,
        digest,
        estimator,
        Dataset(manifest.url, manifest.sha256, settings.split),
        report,
        {name: budgets for name, budgets in found.items() if budgets is not None},
        _drift(settings, subject, config, report, digest),
        _lambda(settings, subject, config, manifest, ranks),
        settings_of(settings),
        git_commit(Path(__file__).resolve().parents[1]),
        now(),
    )
    print(readable(calibration))
    _file(settings, subject, calibration)
    return calibration


def _measure(settings: Calibrate, subject: PinnedModel, manifest: shards.Manifest, split: str) -> RankReport:
    return calibrate_ranks(
        subject,
        manifest,
        split,
        settings.samples,
        settings.workers(),
        seed=settings.seed,
        tolerance=settings.tolerance,
    )


def _drift(
    settings: Calibrate, subject: PinnedModel, config: MeteorConfig, report: RankReport, digest: str
) -> Drift | None:
    if not settings.against:
        return None
    if settings.against.endswith(".json"):
        other, other_digest = load_report(settings.against)
        if other_digest not in (None, digest):
            raise CalibrationError(
                f"{settings.against} is of weights {other_digest[:12] if other_digest else ''}, this model has "
                f"{digest[:12]}: drift of data is told on one model; give the other dataset's manifest instead"
            )
        return compare_ranks(config, report, other, hide_passwords(settings.against))
    url, split = split_address(settings.against)
    manifest, split = load_manifest(url), split or settings.split
    other = _measure(settings, subject, manifest, split)
    return compare_ranks(config, report, other, Dataset(manifest.url, manifest.sha256, split).name)


def _lambda(
    settings: Calibrate,
    subject: PinnedModel,
    config: MeteorConfig,
    manifest: shards.Manifest,
    ranks: Ranks | None,
) -> LambdaReport | None:
    decode = config.pruning.decode
    target = decode.target_mean if settings.target_mean is None else settings.target_mean
    if not settings.decode_samples or target is None or (settings.target_mean is None and not decode.enabled):
        return None
    task = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus)(_solve)
    try:
        solved: LambdaReport = ray.get(task.remote(settings, subject, manifest, target, ranks))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise
    return solved


def _solve(
    settings: Calibrate, subject: PinnedModel, manifest: shards.Manifest, target: float, ranks: Ranks | None
) -> LambdaReport:
    """A task: where its GPU is, if it has one."""
    device = device_for(settings.gpus)
    with open_model(subject) as folder:
        return solve_on_split(folder, manifest, settings.decode_split, settings.decode_samples, target, ranks, device)


def _file(settings: Calibrate, subject: PinnedModel, calibration: Calibration) -> None:
    chart = calibration.chart()
    output = settings.output or ("" if subject.registry else f"{subject.address}-calibration")
    if output:
        print(f"  written   {hide_passwords(store(calibration, chart, output))}")
    if subject.registry is not None:
        path = file_with_version(calibration, chart, subject.registry, subject.version)
        print(f"  filed     with version {subject.version} of {subject.registry.name}: {path}")
    elif uri := os.environ.get("MLFLOW_TRACKING_URI", ""):
        require_tracking(uri)
        run_id = file_with_run(calibration, chart, uri, settings.experiment)
        print(f"  filed     as run {run_id}")


def main() -> int:
    """Command line; a fault of the input is one line on stderr and exit code 2."""
    settings = tyro.cli(Calibrate, description=__doc__)

    def command() -> None:
        check(settings)
        ray.init(ignore_reinit_error=True, logging_level="WARNING")
        calibrate(settings)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
