"""Before a sweep's first trial: the model and its ranks, the data and the suite, the name, MLflow."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
from mlflow.exceptions import MlflowException

from meteor_model.configuration_meteor import MeteorConfig
from meteor_model.processing_meteor import MeteorProcessor
from pipelines.checkpoint.local import local_copy
from pipelines.config.settings import SettingsError
from pipelines.data import shards
from pipelines.data.build import differences
from pipelines.evaluation.questions import read_prompts
from pipelines.evaluation.suite import Suite
from pipelines.io import codec, storage
from pipelines.io.console import say
from pipelines.io.fingerprint import sha256_of_json
from pipelines.io.git import git_commit
from pipelines.io.storage_check import require_access
from pipelines.io.upload import upload_folder
from pipelines.job.datasets import ensure_shards
from pipelines.job.names import last_number, numbered
from pipelines.registry.publish import pull_model
from pipelines.registry.versions import PinnedModel, Registry, pin_model, training_manifest
from pipelines.tracking.server import TrackingAwayError, TrackingError, require_tracking
from tune.folder import SweepFolder, list_sweeps, sweep_folder
from tune.records import Records, TrialRecord
from tune.resources import bundles_of_trial, concurrent_trials
from tune.settings import SEARCH, SweepSettings
from tune.space import Ranks, ranks_of_config, ranks_of_report
from tune.sweep_tracker import SweepTracker
from tune.trial import TrialContext


@dataclass(frozen=True)
class SweepFacts:
    """What a sweep was begun with, and how far it is: `sweep.json`.

    Attributes:
        settings: `SweepSettings.identity`.
        model: models:/NAME/VERSION.
        suite: the questions of the search.
        final: those of the finalists.
        mlflow_run_id: of its run; None until it is opened.
        finished: whether its results are complete.
    """

    settings: dict[str, Any]
    model: str
    suite: dict[str, Any]
    final: dict[str, Any]
    mlflow_run_id: str | None = None
    finished: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the results: two starts of one sweep must agree in it."""
        return {"settings": self.settings, "model": self.model, "suite": self.suite, "final": self.final}


@dataclass(frozen=True)
class Prepared:
    """What all studies of a sweep share.

    Attributes:
        name: of the sweep.
        folder: in storage.
        facts: what is stored of it.
        model: models:/NAME/VERSION: an alias may move while the sweep runs.
        config: of the model.
        ranks: by estimator.
        context: of its trials.
        records: of its trials.
        earlier: completed trials of earlier sweeps, named SWEEP/TRIAL.
        tracker: its runs in MLflow.
        concurrent: trials at a time.
        trained: data of finetune trials.
    """

    name: str
    folder: SweepFolder
    facts: SweepFacts
    model: str
    config: MeteorConfig
    ranks: Ranks
    context: TrialContext
    records: Records
    earlier: tuple[TrialRecord, ...]
    tracker: SweepTracker
    concurrent: int
    trained: tuple[shards.Manifest, ...]


@dataclass(frozen=True)
class _Subject:
    """The model that is pruned, and the data that it is asked about."""

    model: PinnedModel
    rank_report: dict[str, Any] | None
    manifest: shards.Manifest


def prepare(settings: SweepSettings) -> Prepared:
    """A new sweep, or the one of these settings that was not finished.

    Raises:
        ValueError: naming the setting, model or address that is wrong, and what to do.
    """
    if not settings.storage:
        raise SettingsError("storage is not set: give --storage s3://BUCKET/PREFIX or set METEOR_STORAGE")
    require_access(settings.storage)
    require_tracking(settings.tracking.uri)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    concurrent = concurrent_trials(bundles_of_trial(settings), nodes, settings.max_concurrent)
    subject = _find_subject(settings)
    model = subject.model.address
    # Made once, before trials that begin together would each make them.
    trained = ensure_shards(settings.trial_recipe) if settings.kind == "finetune" else ()
    manifest, split = subject.manifest, settings.heldout_split
    suite = Suite.of(manifest, split, settings.questions, part="search").fitted(manifest)
    final = Suite.of(manifest, split, settings.final_questions, part="final", scorer=settings.scorer).fitted(manifest)
    begun = SweepFacts(settings.identity(), model, asdict(suite), asdict(final))
    name, facts, continued = choose_sweep(settings, begun)
    folder = sweep_folder(settings.storage, name)
    if not continued:
        with tempfile.TemporaryDirectory(prefix="meteor-sweep-") as scratch:
            upload_folder(pull_model(subject.model, Path(scratch) / "model"), folder.base)
        store_facts(folder, facts)
    config = _require_questions(settings, subject, suite, folder.base)
    report = subject.rank_report
    earlier = earlier_records(settings, facts)
    records = Records(folder)
    tracker = SweepTracker(
        settings,
        name,
        folder,
        records,
        run_id=facts.mlflow_run_id,
        tags={
            "base": model,
            "suite": suite.digest,
            "final_suite": final.digest,
            "manifest_sha256": suite.sha256,
            "git_commit": git_commit(Path.cwd()),
        },
    )
    facts = replace(facts, mlflow_run_id=tracker.run_id, finished=False)
    store_facts(folder, facts)
    ranks = ranks_of_report(report) if report is not None else ranks_of_config(config)
    say(
        f"sweep {name} ({'continued' if continued else 'new'}) on {model}, {suite.questions} questions of suite "
        f"{suite.digest}, for finalists {final.questions} of {final.digest}, {len(earlier)} trials of earlier sweeps, "
        f"ranks by {', '.join(sorted(ranks)) or 'none'}, {concurrent} trials at a time, MLflow run {tracker.run_id}",
    )
    context = TrialContext(name, folder, suite, final, subject.manifest.url, settings)
    return Prepared(name, folder, facts, model, config, ranks, context, records, earlier, tracker, concurrent, trained)


def _find_subject(settings: SweepSettings) -> _Subject:
    try:
        pinned = pin_model(settings.model, settings.tracking.uri)
    except TrackingAwayError:
        raise
    except TrackingError as error:
        raise SettingsError(
            f"{error}. Train and register one first (`make pretrain`), or name another --model"
        ) from None
    if pinned.registry is None:
        raise SettingsError(f"--model is {settings.model!r}; a sweep wants a registered model: models:/NAME@ALIAS")
    report = _rank_report(pinned.registry, pinned.version)
    address = settings.manifest or training_manifest(pinned)
    if not address:
        raise SettingsError(
            f"the run of {pinned.address} does not say which data it was trained on: give --manifest ADDRESS"
        )
    return _Subject(pinned, report, shards.load_manifest(address))


def _require_questions(settings: SweepSettings, subject: _Subject, suite: Suite, base: str) -> MeteorConfig:
    """The configuration of the base model.

    Raises:
        ValueError: for what is lacking and would fail every trial: questions that can be asked, or prompts for lambda.
    """
    with local_copy(base, weights=False) as folder:
        config = MeteorConfig.from_pretrained(folder)
        processor = MeteorProcessor.from_pretrained(folder)
    positions = config.text_config.max_position_embeddings
    suite.load(processor, positions)
    manifest, split = subject.manifest, settings.train_split
    if not read_prompts(manifest, split, processor, 1, positions=positions).asked:
        raise SettingsError(f"split {split!r} of {manifest.url} has no prompt with images for lambda")
    return config


def earlier_records(settings: SweepSettings, facts: SweepFacts) -> tuple[TrialRecord, ...]:
    """Completed trials of the sweeps that this one begins with, named SWEEP/TRIAL.

    Raises:
        SettingsError: a sweep that is not there, or of another model, other questions or another kind.
    """
    found: list[TrialRecord] = []
    for name in settings.warm_start:
        folder = sweep_folder(settings.storage, name)
        stored = load_facts(folder)
        if stored is None:
            known = ", ".join(list_sweeps(settings.storage)) or "none"
            raise SettingsError(f"there is no sweep {name!r} to begin with in {settings.storage}; there are: {known}")
        kinds = (stored.settings.get("kind"), stored.settings.get("train"))
        wanted = (facts.settings["kind"], facts.settings["train"])
        if (stored.model, stored.suite, kinds) != (facts.model, facts.suite, wanted):
            changed = differences(
                {"model": stored.model, "suite": stored.suite, "kind": kinds[0], "train": kinds[1]},
                {"model": facts.model, "suite": facts.suite, "kind": wanted[0], "train": wanted[1]},
            )
            raise SettingsError(
                f"sweep {name!r} cannot be begun with: its trials are of another model, other questions or another "
                "training:\n  " + "\n  ".join(changed)
            )
        records = [record for record in Records(folder).of(SEARCH) if record.status == "completed"]
        found += [replace(record, id=f"{name}/{record.id}") for record in records]
    return tuple(found)


def _rank_report(registry: Registry, version: int) -> dict[str, Any] | None:
    """`ranks.json` of the run that made a version.

    None where it has none (then only the ranks that the model itself holds can be searched).
    """
    run_id = registry.version(version).run_id
    if not run_id:
        return None
    with tempfile.TemporaryDirectory(prefix="meteor-ranks-") as scratch:
        try:
            path = registry.client.download_artifacts(run_id, "ranks.json", scratch)
        except (MlflowException, OSError):
            return None
        report: dict[str, Any] = json.loads(Path(path).read_text())
    return report


# ------------------------------------------------------------------------------------------------------ name and facts


def choose_sweep(settings: SweepSettings, begun: SweepFacts) -> tuple[str, SweepFacts, bool]:
    """Name of the sweep to begin or to go on with, what is stored of it, and whether an earlier start has begun it.

    Without `name` that is the last sweep of the same settings, model and suite where it is unfinished, or the next
    number.

    Raises:
        SettingsError: where the sweep of the given name is of other settings, another model or another suite.
    """
    if settings.name is None:
        stem = f"sweep-{sha256_of_json(begun.identity)[:6]}"
        last = last_number(list_sweeps(settings.storage), stem)
        name = numbered(stem, last)
        stored = load_facts(sweep_folder(settings.storage, name)) if last else None
        if stored is None or stored.finished:
            return numbered(stem, last + 1), begun, False
    else:
        name = settings.name
        stored = load_facts(sweep_folder(settings.storage, name))
        if stored is None:
            return name, begun, False
    if changed := differences(stored.identity, begun.identity):
        raise SettingsError(
            f"sweep {name!r} was begun with other settings; use them, or another --name:\n  " + "\n  ".join(changed)
        )
    return name, stored, True


def load_facts(folder: SweepFolder) -> SweepFacts | None:
    """What is stored of a sweep; None where nothing is.

    Raises:
        SettingsError: a file of another kind.
        StorageError: where it cannot be read.
    """
    try:
        data = storage.read_bytes(folder.facts)
    except storage.ObjectMissingError:
        return None
    try:
        return codec.decode(SweepFacts, data, folder.facts, SettingsError)
    except SettingsError as error:
        raise SettingsError(
            f"{error}. A sweep that earlier code made neither goes on nor is begun with: take another --name"
        ) from None


def store_facts(folder: SweepFolder, facts: SweepFacts) -> None:
    """Write `sweep.json`. Raises StorageError."""
    storage.write_json(folder.facts, asdict(facts))
