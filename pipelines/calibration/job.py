"""One calibration from a model's address to its file: ranks, budgets, drift, lambda. What jobs/calibrate.py does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from meteor_model.configuration_meteor import MeteorConfig
from pipelines.calibration.drift import Drift, compare_ranks
from pipelines.calibration.image_plan import CalibrationError, MeasureSettings
from pipelines.calibration.lambda_check import LambdaReport, solve_on_split
from pipelines.calibration.masking import MaskingReport, measure_masking
from pipelines.calibration.measure import calibrate_ranks
from pipelines.calibration.ranks import ESTIMATORS, RankReport, Ranks, report_budgets
from pipelines.calibration.report import (
    Calibration,
    Dataset,
    calibration_text,
    file_with_run,
    file_with_version,
    load_report,
    now,
    settings_of,
    split_address,
    store,
)
from pipelines.calibration.settings import CalibrateSettings
from pipelines.data import shards
from pipelines.data.shards import load_manifest
from pipelines.io.console import say
from pipelines.io.git import git_commit
from pipelines.io.pulse import begin_data_task
from pipelines.io.redact import redact_text
from pipelines.recovery.watchdog import watch_tasks
from pipelines.registry.folder import weights_digest
from pipelines.registry.open import device_for, open_model
from pipelines.registry.versions import PinnedModel, pin_model, training_manifest
from pipelines.tracking.server import require_tracking


def calibrate(settings: CalibrateSettings, uri: str) -> Calibration:
    """Measure, compare, solve, file, and say what was found.

    Args:
        settings: what is measured on what; `gpus` decides where.
        uri: of the MLflow server; empty where a folder's calibration is filed nowhere.

    Raises:
        ValueError: of several kinds, naming the model, dataset or setting that is wrong.
    """
    subject = pin_model(settings.model, uri)
    address = settings.manifest or training_manifest(subject)
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
        _masking(settings, subject, manifest),
        settings_of(settings),
        git_commit(Path(__file__).resolve().parents[2]),
        now(),
    )
    say(calibration_text(calibration))
    _file(settings, subject, calibration, uri)
    return calibration


def _workers(settings: CalibrateSettings) -> MeasureSettings:
    return MeasureSettings(settings.actors, settings.cpus, settings.gpus, settings.batch, settings.bad_shards)


def _measure(settings: CalibrateSettings, subject: PinnedModel, manifest: shards.Manifest, split: str) -> RankReport:
    return calibrate_ranks(
        subject,
        manifest,
        split,
        settings.samples,
        _workers(settings),
        seed=settings.seed,
        tolerance=settings.tolerance,
    )


def _drift(
    settings: CalibrateSettings, subject: PinnedModel, config: MeteorConfig, report: RankReport, digest: str
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
        return compare_ranks(config, report, other, redact_text(settings.against))
    url, split = split_address(settings.against)
    manifest, split = load_manifest(url), split or settings.split
    other = _measure(settings, subject, manifest, split)
    return compare_ranks(config, report, other, Dataset(manifest.url, manifest.sha256, split).name)


def _lambda(
    settings: CalibrateSettings,
    subject: PinnedModel,
    config: MeteorConfig,
    manifest: shards.Manifest,
    ranks: Ranks | None,
) -> LambdaReport | None:
    decode = config.pruning.decode
    target = decode.target_mean if settings.target_per_image is None else settings.target_per_image
    acts = decode.enabled and decode.needs_lambda
    if not settings.decode_samples or target is None or (settings.target_per_image is None and not acts):
        return None
    solved: LambdaReport = _in_a_task(settings, _solve, settings, subject, manifest, target, ranks)
    return solved


def _in_a_task(settings: CalibrateSettings, run: Callable[..., Any], *arguments: Any) -> Any:
    """What `run` returns in a Ray task, where its GPU is; its last argument is the watchdog's mailbox."""
    task = ray.remote(num_cpus=settings.cpus, num_gpus=settings.gpus)(run)
    try:
        with watch_tasks() as mailbox:
            return ray.get(task.remote(*arguments, mailbox))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise


def _masking(settings: CalibrateSettings, subject: PinnedModel, manifest: shards.Manifest) -> MaskingReport | None:
    if not settings.masking:
        return None
    found: MaskingReport = _in_a_task(settings, _mask, settings, subject, manifest)
    return found


def _mask(settings: CalibrateSettings, subject: PinnedModel, manifest: shards.Manifest, mailbox: str) -> MaskingReport:
    """A task, as `_solve`."""
    begin_data_task(mailbox)
    with open_model(subject) as folder:
        device = device_for(settings.gpus)
        return measure_masking(folder, manifest, settings.decode_split, settings.masking, device)


def _solve(
    settings: CalibrateSettings,
    subject: PinnedModel,
    manifest: shards.Manifest,
    target: float,
    ranks: Ranks | None,
    mailbox: str,
) -> LambdaReport:
    """A task: where its GPU is, if it has one."""
    begin_data_task(mailbox)
    device = device_for(settings.gpus)
    with open_model(subject) as folder:
        return solve_on_split(folder, manifest, settings.decode_split, settings.decode_samples, target, ranks, device)


def _file(settings: CalibrateSettings, subject: PinnedModel, calibration: Calibration, uri: str) -> None:
    chart = calibration.chart()
    output = settings.output or ("" if subject.registry else f"{subject.address}-calibration")
    if output:
        say(f"  written   {store(calibration, chart, output)}")
    if subject.registry is not None:
        path = file_with_version(calibration, chart, subject.registry, subject.version)
        say(f"  filed     with version {subject.version} of {subject.registry.name}: {path}")
    elif uri:
        require_tracking(uri)
        run_id = file_with_run(calibration, chart, uri, settings.experiment)
        say(f"  filed     as run {run_id}")
