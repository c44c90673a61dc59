"""One run from shards to a registered model: what jobs/pretrain.py and jobs/finetune.py do on the driver.

1. prepare    storage and MLflow answer; the shards are there or are made; the run has a name and an MLflow run
2. calibrate  the start model is stored, ranks are measured, budgets derived
3. train      Ray Data -> Ray Train -> ZeRO-3, from the last checkpoint if there is one; held-out loss at the end
4. export     shards consolidated, lambda solved, reloaded, logits compared with the training model's
5. look       held-out answers, pictures of the kept tokens
6. register   a new version in MLflow's registry, with an alias
7. report     summary.json

Killed anywhere and started again under the same name, a run goes on with the first phase that is not complete.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient

from meteor_model.configuration_meteor import MeteorConfig
from pipelines import shards, storage
from pipelines.assemble import assemble_training
from pipelines.checkpoint import run_url
from pipelines.finish import export, look, register
from pipelines.making import differences, make_shards
from pipelines.metric_log import MetricLogger, SystemMetrics
from pipelines.recipe import Recipe
from pipelines.report import build_summary, load_summary, readable, store_summary
from pipelines.settings import SettingsError
from pipelines.sources.openmoji import OpenMoji
from pipelines.start import loaded_parts, prepare_start
from pipelines.tracking import finish_run, git_commit, log_documents, open_run, require_tracking
from pipelines.training import fit

JobName = Literal["pretrain", "finetune"]
RUN_FILE = "run.json"


@dataclass
class Phases:
    """Wall-clock seconds of each phase, printed as they begin and end."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        print(f"[{name}] {what}", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)
        print(f"[{name}] done in {self.seconds[name]:.1f} s", flush=True)


@dataclass(frozen=True)
class RunHandle:
    """Where a run lives and what it belongs to."""

    name: str
    url: str
    mlflow_run_id: str
    mlflow_start_ms: int
    commit: str


def run_job(recipe: Recipe, job: JobName) -> dict[str, Any]:
    """Run, or continue, one job; returns the summary. Ray must be reachable.

    Raises:
        ValueError: naming the setting, file, address or sample that is wrong, and what to do.
    """
    phases = Phases()
    with phases("prepare", "storage, MLflow, shards"):
        check_places(recipe)
        manifest = ensure_shards(recipe)
        name, finished = choose_run(recipe, job)
        url = run_url(recipe.run.storage, name)
        if finished:
            print(f"run {name} is finished; choose another --run.name to train again", flush=True)
            return load_summary(recipe, url)
        run = _open(recipe, job, name, manifest)
    logger = MetricLogger(run.mlflow_run_id, recipe.tracking.uri)
    system = SystemMetrics(logger, run.mlflow_start_ms)
    system.start()
    try:
        summary = _phases(recipe, job, run, manifest, phases)
    except BaseException:
        finish_run(recipe.tracking.uri, run.mlflow_run_id, "FAILED")
        raise
    finally:
        system.stop()
        logger.close()
    finish_run(recipe.tracking.uri, run.mlflow_run_id)
    return summary


def _phases(recipe: Recipe, job: JobName, run: RunHandle, manifest: shards.Manifest, phases: Phases) -> dict[str, Any]:
    with phases("calibrate", "start model, ranks of the feature maps, budgets"):
        ranks = prepare_start(recipe, manifest, run.url)
        if parts := loaded_parts(run.url):
            log_documents(recipe.tracking.uri, run.mlflow_run_id, {"parts.json": parts})
        for part in parts:
            print(f"  {part['name']}: {part['source']}, sha256 {part['sha256'][:12]}", flush=True)
        for name, budget in ranks["budgets"].items():
            print(f"  {name}: keeps {' -> '.join(map(str, budget))} tokens", flush=True)
    with phases("train", f"{recipe.training.workers} workers, ZeRO-3"):
        training = assemble_training(recipe, manifest, run.name, run.url, run.mlflow_run_id)
        checkpoint = fit(training).checkpoint
    state = checkpoint.state
    with tempfile.TemporaryDirectory(prefix="meteor-export-") as name:
        folder, pictures = Path(name) / "model", Path(name) / "pictures"
        with phases("export", "consolidate, solve lambda, reload, compare logits"):
            parity = export(recipe, run.url, manifest, checkpoint, folder)
        with phases("look", "held-out answers and pictures of the kept tokens"):
            answers = look(recipe, run.mlflow_run_id, manifest, state, ranks, folder, pictures)
        with phases("register", f"{recipe.tracking.registered_model} in MLflow"):
            version = register(recipe, job, run.mlflow_run_id, state, parity, run.commit, run.name, folder)
        summary = build_summary(
            run_name=run.name,
            mlflow_run_id=run.mlflow_run_id,
            expected=training.expected_samples,
            state=state,
            ranks=ranks,
            config=MeteorConfig.from_pretrained(folder),
            parity=parity,
            answers=answers,
            version=version,
            samples_per_s=state.samples_seen / state.step_seconds,
            wall_s=phases.seconds,
        )
        store_summary(recipe, run.url, summary, pictures)
    storage.write_json(storage.join(run.url, RUN_FILE), {**_identity(recipe, job, run), "finished": True})
    print("\n" + readable(summary, answers), flush=True)
    return summary


# ------------------------------------------------------------------------------------------------------------- prepare


def check_places(recipe: Recipe) -> None:
    """Storage, its bucket and MLflow answer, before anything is started.

    Raises:
        SettingsError: for an address that is not set.
        StorageError, TrackingError: naming the address and what to do.
    """
    if not recipe.run.storage:
        raise SettingsError(
            "run.storage is not set: give --run.storage s3://BUCKET/PREFIX or set METEOR_STORAGE "
            "(`make up` and `python -m infra.local run -- ...` do it for the local stack)"
        )
    storage.require_bucket(recipe.run.storage)
    require_tracking(recipe.tracking.uri)


def ensure_shards(recipe: Recipe) -> shards.Manifest:
    """The manifest of `data.manifest`; where that is empty, of the drawings, which are made if they are not there.

    Raises:
        ShardError: a prefix without a manifest, or a damaged one.
        ValueError: a split that is missing or empty.
    """
    url = recipe.data.manifest
    if url:
        manifest = shards.load_manifest(url)
    else:
        source = OpenMoji(recipe.source)
        url = storage.join(recipe.run.storage, "data", f"openmoji-{_digest(source.spec())}")
        made = make_shards(source, url)
        manifest = made.manifest
        print(f"  shards: {url} ({'already there' if made.reused else f'made in {made.seconds:.1f} s'})", flush=True)
    for split in (recipe.data.train_split, recipe.data.heldout_split):
        if not sum(info.samples for info in manifest.split(split)):
            raise SettingsError(f"{manifest.url} has no sample in the split {split!r}")
    return manifest


def _digest(value: Any) -> str:
    return hashlib.sha256(shards.canonical_json(value).encode()).hexdigest()[:8]


def choose_run(recipe: Recipe, job: JobName) -> tuple[str, bool]:
    """Name of the run to begin or to continue, and whether it is finished already.

    Without `run.name` that is the last unfinished run of this job and these settings, or the next number.

    Raises:
        SettingsError: where a run of the given name was begun with other settings; it lists them.
    """
    if recipe.run.name is not None:
        stored = _stored(recipe, recipe.run.name)
        if stored is None:
            return recipe.run.name, False
        changed = differences(stored["settings"], recipe.identity())
        if stored["job"] != job:
            changed.insert(0, f"job: {stored['job']!r} -> {job!r}")
        if changed:
            raise SettingsError(
                f"run {recipe.run.name!r} was begun with other settings; use them, or another --run.name:\n  "
                + "\n  ".join(changed)
            )
        return recipe.run.name, bool(stored["finished"])
    number = 1
    while True:
        name = f"{job}-{recipe.name}-{recipe.digest()[:6]}-{number:03d}"
        stored = _stored(recipe, name)
        if stored is None or not stored["finished"]:
            return name, False
        number += 1


def _stored(recipe: Recipe, name: str) -> dict[str, Any] | None:
    url = storage.join(run_url(recipe.run.storage, name), RUN_FILE)
    if not storage.exists(url):
        return None
    stored: dict[str, Any] = storage.read_json(url)
    return stored


def _identity(recipe: Recipe, job: JobName, run: RunHandle) -> dict[str, Any]:
    return {"job": job, "settings": recipe.identity(), "mlflow_run_id": run.mlflow_run_id, "commit": run.commit}


def _open(recipe: Recipe, job: JobName, name: str, manifest: shards.Manifest) -> RunHandle:
    """The run's file in storage and its MLflow run, new or opened again."""
    stored = _stored(recipe, name)
    commit = git_commit(Path.cwd())
    run_id = open_run(
        recipe.tracking.uri,
        experiment=recipe.tracking.experiment,
        run_name=name,
        settings=recipe.to_dict(),
        tags={
            "job": job,
            "recipe": recipe.name,
            "git_commit": commit,
            "manifest": manifest.url,
            "manifest_sha256": manifest.sha256,
        },
        documents={"recipe.json": recipe.to_dict()},
        run_id=stored["mlflow_run_id"] if stored else None,
    )
    started_ms = MlflowClient(recipe.tracking.uri).get_run(run_id).info.start_time
    run = RunHandle(name, run_url(recipe.run.storage, name), run_id, started_ms, commit)
    storage.write_json(storage.join(run.url, RUN_FILE), {**_identity(recipe, job, run), "finished": False})
    storage.write_json(storage.join(run.url, "recipe.json"), recipe.to_dict())
    print(f"  run {name} ({'continued' if stored else 'new'}), MLflow run {run_id}", flush=True)
    return run
