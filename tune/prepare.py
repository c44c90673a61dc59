"""Before a sweep's first trial: the model and its ranks, the data and the suite, the name, MLflow."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.checkpoint.local import local_copy
from pipelines.config.settings import SettingsError
from pipelines.data import shards
from pipelines.data.build import differences
from pipelines.evaluation.questions import readable_samples
from pipelines.evaluation.scoring import Suite
from pipelines.io import storage
from pipelines.io.upload import upload_folder
from pipelines.job.run import ensure_shards
from pipelines.registry.publish import pull_model
from pipelines.registry.versions import PinnedModel, get_version, pin_model, trained_on
from pipelines.tracking.mlflow_run import TrackingAwayError, TrackingError, git_commit, require_tracking
from tune.logbook import Logbook
from tune.records import Records
from tune.resources import bundles_of_trial, concurrent_trials
from tune.settings import SweepSettings
from tune.space import Ranks, ranks_of_config, ranks_of_report
from tune.trial import TrialContext

SWEEP_FILE = "sweep.json"
"""In a sweep's folder: its settings, the data, and whether it is finished."""
BASE_FOLDER = "base"


@dataclass(frozen=True)
class Prepared:
    """What all studies of a sweep share."""

    name: str
    url: str
    model: str
    """models:/NAME/VERSION: an alias may move while the sweep runs."""
    config: MeteorConfig
    ranks: Ranks
    context: TrialContext
    records: Records
    logbook: Logbook
    concurrent: int
    trained: tuple[shards.Manifest, ...]
    """Data of finetune trials."""


def prepare(settings: SweepSettings) -> Prepared:
    """A new sweep, or the one of these settings that was not finished.

    Raises:
        ValueError: naming the setting, model or address that is wrong, and what to do.
    """
    if not settings.storage:
        raise SettingsError("storage is not set: give --storage s3://BUCKET/PREFIX or set METEOR_STORAGE")
    storage.require_bucket(settings.storage)
    uri = settings.tracking.uri
    require_tracking(uri)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    concurrent = concurrent_trials(bundles_of_trial(settings), nodes, settings.max_concurrent)
    try:
        pinned = pin_model(settings.model, uri)
    except TrackingAwayError:
        raise
    except TrackingError as error:
        raise SettingsError(
            f"{error}. Train and register one first (`make pretrain`), or name another --model"
        ) from None
    if not pinned.name:
        raise SettingsError(f"--model is {settings.model!r}; a sweep wants a registered model: models:/NAME@ALIAS")
    model = pinned.address
    report = _rank_report(pinned, uri)
    address = settings.manifest or trained_on(pinned, uri)
    if not address:
        raise SettingsError(f"the run of {model} does not say which data it was trained on: give --manifest ADDRESS")
    manifest = shards.load_manifest(address)
    # Made once, before trials that begin together would each make them.
    trained = ensure_shards(settings.trial_recipe) if settings.kind == "finetune" else ()
    suite = Suite.of(manifest, settings.heldout_split, settings.questions)
    facts = {
        "settings": settings.identity(),
        "model": model,
        "suite": asdict(suite),
        "mlflow_run_id": None,
        "finished": False,
    }
    sweep, stored = _choose_name(settings, facts)
    url = storage.join(settings.storage, "sweeps", sweep)
    base = storage.join(url, BASE_FOLDER)
    if stored is None:
        with tempfile.TemporaryDirectory(prefix="meteor-sweep-") as scratch:
            upload_folder(pull_model(model, Path(scratch) / "model", uri), base)
        storage.write_json(storage.join(url, SWEEP_FILE), facts)
    with local_copy(base) as folder:
        config = MeteorConfig.from_pretrained(folder)
        processor = MeteorProcessor.from_pretrained(folder)
    suite.load(processor)  # what is lacking there would fail every trial
    if next(readable_samples(manifest, settings.train_split, processor), None) is None:
        raise SettingsError(f"split {settings.train_split!r} of {manifest.url} has no prompt with images for lambda")
    ranks = ranks_of_report(report) if report is not None else ranks_of_config(config)
    records = Records(url)
    commit = git_commit(Path.cwd())
    logbook = Logbook(
        settings,
        sweep,
        url,
        records,
        run_id=stored["mlflow_run_id"] if stored else None,
        tags={"base": model, "suite": suite.digest, "manifest_sha256": suite.sha256, "git_commit": commit},
    )
    context = TrialContext(sweep, url, base, suite, manifest.url, settings)
    prepared = Prepared(sweep, url, model, config, ranks, context, records, logbook, concurrent, trained)
    mark(settings, prepared, finished=False)
    print(
        f"sweep {sweep} ({'continued' if stored else 'new'}) on {model}, suite {suite.digest} of {suite.questions} "
        f"questions, ranks by {', '.join(sorted(ranks)) or 'none'}, {concurrent} trials at a time, MLflow run "
        f"{logbook.run_id}",
        flush=True,
    )
    return prepared


def _rank_report(model: PinnedModel, uri: str) -> dict[str, Any] | None:
    """`ranks.json` of the run that made a version.

    None where it has none (then only the ranks that the model itself holds can be searched).
    """
    run_id = get_version(model.name, model.version, uri).run_id
    if not run_id:
        return None
    with tempfile.TemporaryDirectory(prefix="meteor-ranks-") as scratch:
        try:
            path = MlflowClient(uri).download_artifacts(run_id, "ranks.json", scratch)
        except (MlflowException, OSError):
            return None
        report: dict[str, Any] = json.loads(Path(path).read_text())
    return report


def _choose_name(settings: SweepSettings, facts: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """Name of the sweep to begin or to continue, and what is stored of it.

    Raises:
        SettingsError: where a sweep of the given name is of other settings, another model or other data.
    """

    def stored(name: str) -> dict[str, Any] | None:
        url = storage.join(settings.storage, "sweeps", name, SWEEP_FILE)
        found: dict[str, Any] | None = storage.read_json(url) if storage.exists(url) else None
        return found

    alike = ("settings", "model", "suite")
    if settings.name is not None:
        found = stored(settings.name)
        if found and (changed := differences({k: found[k] for k in alike}, {k: facts[k] for k in alike})):
            raise SettingsError(
                f"sweep {settings.name!r} was begun with other settings; use them, or another --name:\n  "
                + "\n  ".join(changed)
            )
        return settings.name, found
    number = 1
    while True:
        name = f"sweep-{settings.digest()}-{number:03d}"
        found = stored(name)
        if found is None or (not found["finished"] and all(found[k] == facts[k] for k in alike)):
            return name, found
        number += 1


def mark(settings: SweepSettings, prepared: Prepared, *, finished: bool) -> None:
    """Keep in storage what the sweep belongs to, and whether it is finished."""
    facts = {
        "settings": settings.identity(),
        "model": prepared.model,
        "suite": asdict(prepared.context.suite),
        "mlflow_run_id": prepared.logbook.run_id,
        "finished": finished,
    }
    storage.write_json(storage.join(prepared.url, SWEEP_FILE), facts)
