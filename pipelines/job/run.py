"""One run from shards to a registered model: what jobs/pretrain.py and jobs/finetune.py do on the driver.

1. prepare    storage and MLflow answer; the shards are there or are made; the run has a name and an MLflow run
2. calibrate  the start model is stored, ranks are measured, budgets derived
3. train      Ray Data -> Ray Train -> ZeRO-3, from the last checkpoint if there is one; held-out loss at the end
4. export     shards consolidated, lambda solved, reloaded, logits compared with the training model's
5. look       held-out answers, pictures of the kept tokens
6. register   a new version in MLflow's registry, with an alias
7. report     summary.json

Killed anywhere and started again under the same name, a run goes on with the first phase that is not complete. Where
MLflow is away in the middle, training goes on; at the end the run stops with an error, and the same command delivers
what was kept and registers the model.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from meteor_model.configuration_meteor import MeteorConfig
from pipelines.checkpoint.committed import latest_checkpoint
from pipelines.config.recipe import Recipe
from pipelines.config.settings import SettingsError
from pipelines.data import shards
from pipelines.data.build import differences, make_shards
from pipelines.data.sources.openmoji import OpenMoji
from pipelines.evaluation.questions import Answer
from pipelines.io import storage
from pipelines.io.run_folder import RunFolder, run_folder
from pipelines.job.assemble import assemble_training, manifest_hashes
from pipelines.job.finish import Trained, export, look, register, undelivered_points
from pipelines.job.start import loaded_parts, prepare_start
from pipelines.job.summary import build_summary, load_summary, readable, store_summary
from pipelines.tracking.metric_logger import MetricLogger, SystemMetrics
from pipelines.tracking.mlflow_run import TrackingAwayError, git_commit, require_tracking
from pipelines.tracking.run_tracker import RunRequest, Tracker
from pipelines.training.trainer import fit

JobName = Literal["pretrain", "finetune"]


@dataclass
class Phases:
    """Wall-clock seconds of each phase, printed as they begin and end."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        """Print what begins and count its time under `name`."""
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
    commit: str
    training_id: str
    """Made before the MLflow run, which carries it as a tag: so the run of a start that died in between is found."""
    started_ms: int
    """Milliseconds since the epoch: the first start, and the start of the MLflow run."""
    manifests: dict[str, str]
    """SHA-256 of the manifest at each address."""


def run_job(recipe: Recipe, job: JobName) -> dict[str, Any]:
    """Run, or continue, one job; returns the summary. Ray must be reachable.

    Raises:
        ValueError: naming the setting, file, address or sample that is wrong, and what to do.
    """
    phases = Phases()
    with phases("prepare", "storage, MLflow, shards"):
        check_places(recipe)
        manifests = ensure_shards(recipe)
        name, finished = choose_run(recipe, job)
        require_same_data(recipe, name, manifests)
        url = run_folder(recipe.run.storage, name).url
        if finished:
            print(f"run {name} is finished; choose another --run.name to train again", flush=True)
            return load_summary(recipe, url)
        run, tracker = _open(recipe, job, name, manifests)
    logger = MetricLogger(tracker.run_id, recipe.tracking.uri, run.url)
    system = SystemMetrics(logger, run.started_ms)
    system.start()
    try:
        try:
            summary, answers = _phases(recipe, job, run, tracker, manifests, phases)
        finally:
            system.stop()
            logger.close()
        tracker.finish()
    except BaseException as error:
        tracker.fail()
        print(f"\n  {what_is_kept(recipe.run.storage, run.name)}", flush=True)
        if isinstance(error, TrackingAwayError):
            raise TrackingAwayError(f"{error}. {_how_to_go_on(run, phases)}") from error
        raise
    _store_run(recipe, job, run, tracker.run_id, finished=True)
    print("\n" + readable(summary, answers), flush=True)
    return summary


def what_is_kept(root: str, name: str) -> str:
    """For the log of a job that failed: what is there, and the command that goes on."""
    try:
        checkpoint = latest_checkpoint(root, name)
    except ValueError as error:
        return f"kept: what run {name} has committed; it cannot be read just now ({error})"
    place = (
        f"the checkpoint of step {checkpoint.state.step} of {checkpoint.state.total_steps}" if checkpoint else "no step"
    )
    return (
        f"kept: run {name} with {place}, in {run_folder(root, name).url}; the same command goes on (--run.name {name})"
    )


def _how_to_go_on(run: RunHandle, phases: Phases) -> str:
    model = f"The trained model is in {RunFolder(run.url).export}. " if "export" in phases.seconds else ""
    return (
        f"{model}Start MLflow and give the same command again with --run.name {run.name}: it goes on with the first "
        "phase that is not complete"
    )


def _phases(
    recipe: Recipe, job: JobName, run: RunHandle, tracker: Tracker, manifests: Sequence[shards.Manifest], phases: Phases
) -> tuple[dict[str, Any], list[Answer]]:
    manifest = manifests[0]
    with phases("calibrate", "start model, ranks of the feature maps, budgets"):
        ranks = prepare_start(recipe, manifest, run.url)
        if parts := loaded_parts(run.url):
            tracker.log_documents({"parts.json": parts})
        for part in parts:
            print(f"  {part['name']}: {part['source']}, sha256 {part['sha256'][:12]}", flush=True)
        for name, budget in ranks["budgets"].items():
            print(f"  {name}: keeps {' -> '.join(map(str, budget))} tokens", flush=True)
    with phases("train", f"{recipe.training.workers} workers, ZeRO-3"):
        training = assemble_training(recipe, manifests, run.name, run.url, tracker.run_id)
        checkpoint = fit(training).checkpoint
    state = checkpoint.state
    with tempfile.TemporaryDirectory(prefix="meteor-export-") as name:
        folder, pictures = Path(name) / "model", Path(name) / "pictures"
        with phases("export", "consolidate, solve lambda, reload, compare logits"):
            parity = export(recipe, run.url, manifest, checkpoint, folder)
        with phases("look", "held-out answers and pictures of the kept tokens"):
            looked = look(recipe, run.url, tracker, manifest, checkpoint, ranks, folder, pictures)
        with phases("register", f"{recipe.tracking.registered_model} in MLflow"):
            tracker.log_points(undelivered_points(checkpoint))
            mlflow_run_id = tracker.settle()
            trained = Trained(recipe, job, run.name, mlflow_run_id, run.commit, state, parity, manifests)
            version = register(trained, folder, looked)
        summary = build_summary(
            run_name=run.name,
            mlflow_run_id=mlflow_run_id,
            expected=training.plan.total_samples,
            state=state,
            ranks=ranks,
            config=MeteorConfig.from_pretrained(folder),
            parity=parity,
            answers=looked.answers,
            version=version,
            samples_per_s=state.samples_seen / state.step_seconds,
            wall_s=phases.seconds,
        )
        store_summary(recipe, run.url, summary, pictures)
    return summary, list(looked.answers)


# ------------------------------------------------------------------------------------------------------------- prepare


def check_places(recipe: Recipe) -> None:
    """Storage, its bucket and MLflow answer, before anything is started.

    With `tracking.when_down` buffer, MLflow may be away, but not misnamed.

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
    try:
        require_tracking(recipe.tracking.uri)
    except TrackingAwayError as error:
        if recipe.tracking.when_down == "fail":
            raise TrackingAwayError(f"{error}; or train without it: --tracking.when-down buffer") from error
        print(f"  {error}\n  its records are kept with the run until it answers", flush=True)


def ensure_shards(recipe: Recipe) -> tuple[shards.Manifest, ...]:
    """The manifest of `data.manifest`, then those of `data.mixture` by address: the datasets in their order.

    Where the first is empty, that of the drawings, which are made if they are not there.

    Raises:
        ShardError: a prefix without a manifest, or a damaged one.
        ValueError: a split that is missing or empty; a manifest that is given twice.
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
    manifests = [manifest]
    for address, _ in recipe.data.others:
        other = shards.load_manifest(address)
        if other.url in [known.url for known in manifests]:
            raise SettingsError(
                f"data.mixture holds {address}, whose manifest is there already; raise its weight instead"
            )
        if not other.samples(recipe.data.train_split):
            raise SettingsError(f"{other.url} has no sample in the split {recipe.data.train_split!r}")
        manifests.append(other)
    return tuple(manifests)


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


def require_same_data(recipe: Recipe, name: str, manifests: Sequence[shards.Manifest]) -> None:
    """Raise SettingsError, naming every manifest that differs, where run `name` was begun with other data."""
    stored = _stored(recipe, name)
    if stored and (changed := differences(stored.get("manifests", {}), manifest_hashes(manifests))):
        raise SettingsError(
            f"run {name!r} was begun with other data (SHA-256 of the manifests below); restore it, or train on this "
            "data under another --run.name:\n  " + "\n  ".join(changed)
        )


def _stored(recipe: Recipe, name: str) -> dict[str, Any] | None:
    url = run_folder(recipe.run.storage, name).record
    if not storage.exists(url):
        return None
    stored: dict[str, Any] = storage.read_json(url)
    return stored


def _store_run(recipe: Recipe, job: JobName, run: RunHandle, mlflow_run_id: str | None, *, finished: bool) -> None:
    record = {
        "job": job,
        "settings": recipe.identity(),
        "manifests": run.manifests,
        "commit": run.commit,
        "training_id": run.training_id,
        "started_ms": run.started_ms,
        "mlflow_run_id": mlflow_run_id,
        "finished": finished,
    }
    storage.write_json(RunFolder(run.url).record, record)


def _open(recipe: Recipe, job: JobName, name: str, manifests: Sequence[shards.Manifest]) -> tuple[RunHandle, Tracker]:
    """The run's file in storage, and its MLflow run, new or opened again, or to be opened when MLflow is there.

    The file is written first: what a start that dies here has made, the next one finds.
    """
    stored = _stored(recipe, name)
    known = {"training_id": uuid.uuid4().hex, "started_ms": time.time_ns() // 1_000_000, **(stored or {})}
    run = RunHandle(
        name,
        run_folder(recipe.run.storage, name).url,
        git_commit(Path.cwd()),
        known["training_id"],
        known["started_ms"],
        manifest_hashes(manifests),
    )
    run_id = stored["mlflow_run_id"] if stored else None
    _store_run(recipe, job, run, run_id, finished=False)
    storage.write_json(RunFolder(run.url).recipe, recipe.to_dict())
    request = RunRequest(
        experiment=recipe.tracking.experiment,
        run_name=name,
        settings=recipe.to_dict(),
        tags={
            "job": job,
            "recipe": recipe.name,
            "git_commit": run.commit,
            "run_url": run.url,
            "manifest": manifests[0].url,
            "manifest_sha256": manifests[0].sha256,
        },
        documents={"recipe.json": recipe.to_dict(), "manifests.json": run.manifests},
        training_id=run.training_id,
        started_ms=run.started_ms,
    )
    tracker = Tracker(
        recipe.tracking.uri,
        run.url,
        request,
        run_id=run_id,
        store_run_id=lambda opened: _store_run(recipe, job, run, opened, finished=False),
        patience_s=recipe.tracking.patience_s,
    )
    if recipe.tracking.when_down == "fail":
        tracker.open()
    tracker.start()
    print(
        f"  run {name} ({'continued' if stored else 'new'}), MLflow run {tracker.run_id or '(when MLflow is there)'}",
        flush=True,
    )
    return run, tracker
