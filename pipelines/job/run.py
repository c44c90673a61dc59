"""One run from shards to a registered model: what jobs/pretrain.py and jobs/finetune.py do on the driver.

1. prepare    storage and MLflow answer; the shards are there or are made; the run has a name and an MLflow run
2. calibrate  the start model is stored, ranks are measured, budgets derived
3. train      Ray Data -> Ray Train -> ZeRO-3, from the last checkpoint if there is one; held-out loss at the end
4. export     the checkpoint consolidated, lambda solved, reloaded, logits compared with the training model's
5. answer     held-out questions, pictures of the kept tokens
6. register   a new version in MLflow's registry, with an alias; then summary.json

Killed anywhere and started again under the same name, a run goes on with the first phase that is not complete. Where
MLflow is away in the middle, training goes on; at the end the run stops with an error, and the same command delivers
what was kept and registers the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pipelines.checkpoint.committed import latest_checkpoint
from pipelines.checkpoint.local import local_copy
from pipelines.config.recipe import Recipe
from pipelines.config.settings import SettingsError
from pipelines.data import shards
from pipelines.io import storage
from pipelines.io.console import keep_log, say
from pipelines.io.run_folder import RunFolder, run_folder
from pipelines.io.storage_check import require_access
from pipelines.job.answers import HeldoutAnswers, answer_heldout, log_answers
from pipelines.job.assemble import MetricsRun
from pipelines.job.clean_up import remove_copies_everywhere
from pipelines.job.datasets import ensure_shards
from pipelines.job.export import export_run
from pipelines.job.names import ChosenRun, JobName, RunFacts, choose_run, load_facts, store_facts
from pipelines.job.phase_task import Reservation, on_device, reserve, run_task
from pipelines.job.register import TrainedRun, register_run, undelivered_points
from pipelines.job.start import loaded_parts, needs_local_files, prepare_start
from pipelines.job.starts import Start, add_start, shown_starts, start_tags
from pipelines.job.summary import build_summary, load_summary, store_summary, summary_text
from pipelines.job.train import train
from pipelines.recovery.lease import Lease, hold_run
from pipelines.registry.versions import pin_model
from pipelines.sizing.fit import check_fit
from pipelines.sizing.terms import Estimate, Phase
from pipelines.tracking.metric_logger import MetricLogger
from pipelines.tracking.mlflow_run import RunRequest
from pipelines.tracking.run_tracker import RunTracker
from pipelines.tracking.server import TrackingAwayError, require_tracking
from pipelines.tracking.system_metrics import SystemMetrics


@dataclass
class Phases:
    """Wall-clock seconds of each phase, which is said as it begins."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str, what: str) -> Iterator[None]:
        """Say what begins and count its time under `name`."""
        say(f"[{name}] {what}")
        start = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - start, 2)


@dataclass(frozen=True)
class Run:
    """A run that is being worked on.

    Attributes:
        recipe: its settings.
        job: pretrain or finetune.
        name: of the run.
        folder: in storage.
        facts: what it was begun with.
        manifests: of its datasets, in their order.
        tracker: of its MLflow run.
        starts: every start of it, this one last.
        estimate: of its size.
    """

    recipe: Recipe
    job: JobName
    name: str
    folder: RunFolder
    facts: RunFacts
    manifests: Sequence[shards.Manifest]
    tracker: RunTracker
    starts: Sequence[Start]
    estimate: Estimate

    def needs(self, *phases: Phase) -> Reservation:
        """What the task of these phases reserves."""
        return reserve(self.recipe, self.estimate, *phases)


def run_job(recipe: Recipe, job: JobName) -> dict[str, Any]:
    """Run, or continue, one job; returns the summary. Ray must be reachable.

    Raises:
        ValueError: naming the setting, file, address or sample that is wrong, and what to do.
    """
    phases = Phases()
    with phases("prepare", "storage, MLflow, shards"):
        check_places(recipe)
        manifests = ensure_shards(recipe)
        chosen = choose_run(recipe, job, manifests)
        if chosen.facts.has_made(recipe):
            say(f"run {chosen.name} is finished; choose another --run.name to train again")
            return load_summary(recipe, run_folder(recipe.run.storage, chosen.name))
        size = _check_fit(recipe, manifests)
    # Before anything of the run is written: the records of one that another job works on stay as they are.
    with hold_run(run_folder(recipe.run.storage, chosen.name).url, f"run {chosen.name!r}") as lease:
        return _work(_open(recipe, job, _as_claimed(recipe, chosen), manifests, size), lease, phases)


def _check_fit(recipe: Recipe, manifests: Sequence[shards.Manifest]) -> Estimate:
    """The size of the run; what the cluster has no room for is refused before anything is built, as SettingsError."""
    splits = [info for manifest in manifests for info in manifest.split(recipe.data.train_split)]
    return check_fit(recipe, sum(info.samples for info in splits), sum(info.bytes for info in splits))


def _as_claimed(recipe: Recipe, chosen: ChosenRun) -> ChosenRun:
    """The run as it is once it is held: another job may have begun it, or ended it, since it was chosen.

    Raises:
        SettingsError: it has ended meanwhile; the same command shows what it came to.
    """
    stored = load_facts(recipe.run.storage, chosen.name)
    if stored is None:
        return chosen
    if stored.has_made(recipe):
        raise SettingsError(
            f"run {chosen.name!r} was finished by another job just now: the same command with --run.name {chosen.name} "
            "shows what it came to"
        )
    return replace(chosen, facts=replace(stored, commit=chosen.facts.commit), continued=True)


def _work(run: Run, lease: Lease, phases: Phases) -> dict[str, Any]:
    """The phases of a run that this job holds, and its records, however they end."""
    recipe = run.recipe
    keep_log(run.folder.logs)
    tracker = run.tracker
    logger = MetricLogger(tracker.run_id, recipe.tracking.uri, run.folder.url)
    system = SystemMetrics(logger, run.facts.started_ms)
    system.start()
    try:
        try:
            summary, answers = _phases(run, lease, phases)
        finally:
            system.stop()
            logger.close()
        tracker.finish()
    except BaseException as error:
        tracker.fail()
        say(f"\n  {what_is_kept(recipe.run.storage, run.name)}")
        if isinstance(error, TrackingAwayError):
            raise TrackingAwayError(f"{error}. {_how_to_go_on(run, phases)}") from error
        raise
    done = replace(
        run.facts,
        mlflow_run_id=tracker.run_id,
        finished=True,
        export=recipe.run.export,
        export_precision=recipe.run.export_precision,
    )
    store_facts(recipe.run.storage, run.name, done)
    remove_copies_everywhere(run.folder)
    say("\n" + summary_text(summary, answers.answers))
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


def _how_to_go_on(run: Run, phases: Phases) -> str:
    model = f"The trained model is in {run.folder.export}. " if "export" in phases.seconds else ""
    return (
        f"{model}Start MLflow and give the same command again with --run.name {run.name}: it goes on with the first "
        "phase that is not complete"
    )


def _phases(run: Run, lease: Lease, phases: Phases) -> tuple[dict[str, Any], HeldoutAnswers]:
    """All phases after the first: the summary, and the held-out answers.

    What holds a whole model is a task on a node with room for it; the driver holds none.
    """
    recipe, tracker, folder, manifest = run.recipe, run.tracker, run.folder, run.manifests[0]
    with phases("calibrate", "start model, ranks of the feature maps, budgets"):
        with_room = partial(run_task, name="start model", needs=run.needs("calibrate"), here=needs_local_files(recipe))
        ranks = prepare_start(recipe, manifest, folder, run.facts.started_from, with_room)
        _tell_of_start(run, ranks)
    with phases("train", f"{recipe.training.workers} workers, ZeRO-3"):
        metrics_run = MetricsRun(recipe.tracking.uri, tracker.run_id)
        training = train(recipe, run.manifests, run.name, metrics_run, lease)
    with phases("export", "consolidate, solve lambda, reload, compare logits"):
        export = partial(on_device, export_run, recipe, folder, manifest, training.exported)
        exported = run_task(export, "export", run.needs("export", "parity"))
    with phases("answer", "held-out questions, pictures of the kept tokens"):
        answer = partial(on_device, answer_heldout, recipe, folder, manifest, training, ranks)
        answers = run_task(answer, "answer", run.needs("answer"))
    with local_copy(folder.pictures) as pictures:
        log_answers(tracker, training, ranks, answers, pictures)
        with phases("register", f"{recipe.tracking.registered_model} in MLflow"):
            tracker.log_points(undelivered_points(training.last))
            mlflow_run_id = tracker.deliver().run_id
            trained = TrainedRun(
                recipe,
                run.job,
                run.name,
                mlflow_run_id,
                run.facts.commit,
                training,
                exported.parity,
                run.manifests,
                run.starts,
                run.facts.started_from,
            )
            register = partial(register_run, trained, folder.export, answers)
            version = run_task(register, "register", run.needs("register"))
        summary = build_summary(trained, answers, version, ranks=ranks, config=exported.config, wall_s=phases.seconds)
        store_summary(recipe, folder, summary, pictures)
    return summary, answers


def _tell_of_start(run: Run, ranks: dict[str, Any]) -> None:
    """Parts and budgets of the start model, on the screen and in MLflow."""
    if parts := loaded_parts(run.folder):
        run.tracker.log_documents({"parts.json": parts})
    for part in parts:
        say(f"  {part['name']}: {part['source']}, sha256 {part['sha256'][:12]}")
    for name, budget in ranks["budgets"].items():
        say(f"  {name}: keeps {' -> '.join(map(str, budget))} tokens")


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
    require_access(recipe.run.storage)
    try:
        require_tracking(recipe.tracking.uri)
    except TrackingAwayError as error:
        if recipe.tracking.when_down == "fail":
            raise TrackingAwayError(f"{error}; or train without it: --tracking.when-down buffer") from error
        say(f"  {error}\n  its records are kept with the run until it answers")


def _open(recipe: Recipe, job: JobName, chosen: ChosenRun, manifests: Sequence[shards.Manifest], size: Estimate) -> Run:
    """The run's file in storage, and its MLflow run, new or opened again, or to be opened when MLflow is there.

    The file is written first: what a start that dies here has made, the next one finds.
    """
    root, name = recipe.run.storage, chosen.name
    folder = run_folder(root, name)
    facts = _pin_start(recipe, chosen, folder)
    store_facts(root, name, facts)
    storage.write_json(folder.recipe, recipe.to_dict())
    starts = add_start(folder, Start.now(recipe))
    if len(starts) > 1 and (changes := starts[-1].changes(starts[-2])):
        say("  other than at the start before:" + "".join(f"\n    {change}" for change in changes))
    request = RunRequest(
        experiment=recipe.tracking.experiment,
        run_name=name,
        settings=recipe.to_dict(),
        tags={
            "job": job,
            "recipe": recipe.name,
            "git_commit": facts.commit,
            "run_url": folder.url,
            "manifest": manifests[0].url,
            "manifest_sha256": manifests[0].sha256,
            **start_tags(starts),
        },
        documents={
            "recipe.json": recipe.to_dict(),
            "manifests.json": facts.manifests,
            "starts.json": shown_starts(starts),
        },
        training_id=facts.training_id,
        started_ms=facts.started_ms,
    )
    tracker = RunTracker(
        recipe.tracking.uri,
        folder.url,
        request,
        run_id=facts.mlflow_run_id,
        store_run_id=lambda opened: store_facts(root, name, replace(facts, mlflow_run_id=opened)),
        retry_s=recipe.tracking.patience_s,
    )
    if recipe.tracking.when_down == "fail":
        tracker.open()
    tracker.start()
    say(
        f"  run {name} ({'continued' if chosen.continued else 'new'}), "
        f"MLflow run {tracker.run_id or '(when MLflow is there)'}",
    )
    return Run(recipe, job, name, folder, facts, manifests, tracker, starts, size)


def _pin_start(recipe: Recipe, chosen: ChosenRun, folder: RunFolder) -> RunFacts:
    """The facts with what `model.start` names now, if this start is the one that will pull it.

    Raises:
        TrackingError: an unknown version or alias, or a server that is away.
    """
    start, facts = recipe.model.start, chosen.facts
    if start is None or facts.started_from is not None or (chosen.continued and storage.exists(folder.init_ready)):
        return facts
    return replace(facts, started_from=pin_model(start, recipe.tracking.uri).address)
