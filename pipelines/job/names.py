"""The name of a run, and what storage knows of it: `run.json` in the run's folder.

Without a name of its own a run is called STEM-NUMBER, the stem made of what is to be computed. Runs of one stem are the
same work, so the last of them is continued where it is unfinished; else the next number begins. One listing tells.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipelines.config.recipe import Recipe
from pipelines.config.settings import SettingsError
from pipelines.data import shards
from pipelines.data.build import differences
from pipelines.io import codec, storage
from pipelines.io.git import git_commit
from pipelines.io.run_folder import list_runs, run_folder
from pipelines.job.datasets import manifest_hashes

JobName = Literal["pretrain", "finetune"]


def last_number(names: Iterable[str], stem: str) -> int:
    """The highest number of the names STEM-NUMBER; 0 where there is none."""
    matches = [re.fullmatch(rf"{re.escape(stem)}-(\d+)", name) for name in names]
    return max((int(match[1]) for match in matches if match), default=0)


def numbered(stem: str, number: int) -> str:
    """STEM-NUMBER."""
    return f"{stem}-{number:03d}"


@dataclass(frozen=True)
class RunFacts:
    """What a run was begun with, and how far it is.

    Attributes:
        job: pretrain or finetune.
        settings: `Recipe.identity`: what decides the result.
        manifests: SHA-256 of the manifest at each address.
        commit: of the code that worked on it last.
        training_id: made before the MLflow run, which carries it as a tag: so the run of a start that died in between
            is found.
        started_ms: milliseconds since the epoch of the first start, which is also the start of the MLflow run.
        mlflow_run_id: None until MLflow has the run.
        finished: whether every phase is complete.
        export: `run.export` of the start that finished it.
        export_precision: `run.export_precision` of that start.
        started_from: what `model.start` named when the run was begun: models:/NAME/VERSION, since an alias moves, or a
            folder; None without a start model, and for runs from before it was kept.
    """

    job: str
    settings: dict[str, Any]
    manifests: dict[str, str]
    commit: str
    training_id: str
    started_ms: int
    mlflow_run_id: str | None = None
    finished: bool = False
    export: str = "last"
    export_precision: str = "as_trained"
    started_from: str | None = None

    def has_made(self, recipe: Recipe) -> bool:
        """Whether the run is finished with the export that the recipe asks for."""
        asked = (recipe.run.export, recipe.run.export_precision)
        return self.finished and (self.export, self.export_precision) == asked

    @classmethod
    def begun(cls, recipe: Recipe, job: JobName, manifests: Sequence[shards.Manifest]) -> RunFacts:
        """Of a run that begins now."""
        return cls(
            job,
            recipe.identity(),
            manifest_hashes(manifests),
            git_commit(Path.cwd()),
            uuid.uuid4().hex,
            time.time_ns() // 1_000_000,
        )


def load_facts(root: str, name: str) -> RunFacts | None:
    """What is stored of a run; None where nothing is.

    Raises:
        SettingsError: a file of another kind.
        StorageError: where it cannot be read.
    """
    url = run_folder(root, name).record
    try:
        data = storage.read_bytes(url)
    except storage.ObjectMissingError:
        return None
    return codec.decode(RunFacts, data, url, SettingsError)


def store_facts(root: str, name: str, facts: RunFacts) -> None:
    """Write `run.json`. Raises StorageError."""
    storage.write_json(run_folder(root, name).record, asdict(facts))


@dataclass(frozen=True)
class ChosenRun:
    """The run to work on.

    Attributes:
        name: of the run.
        facts: stored, or of a run that begins.
        continued: whether an earlier start has begun it.
    """

    name: str
    facts: RunFacts
    continued: bool


def choose_run(recipe: Recipe, job: JobName, manifests: Sequence[shards.Manifest]) -> ChosenRun:
    """The run to begin or to go on with.

    That of `run.name`; without one, the last of this job and these settings where it is unfinished, or the next number.

    Raises:
        SettingsError: where that run was begun with other settings or other data; it lists them.
        StorageError: where storage cannot be read.
    """
    begun, root = RunFacts.begun(recipe, job, manifests), recipe.run.storage
    if recipe.run.name is None:
        stem = f"{job}-{recipe.name}-{recipe.digest()[:6]}"
        last = last_number(list_runs(root, stem), stem)
        name = numbered(stem, last)
        stored = load_facts(root, name) if last else None
        if stored is None or stored.finished:
            return ChosenRun(numbered(stem, last + 1), begun, continued=False)
    else:
        name = recipe.run.name
        stored = load_facts(root, name)
        if stored is None:
            return ChosenRun(name, begun, continued=False)
    _require_same(name, stored, begun)
    return ChosenRun(name, replace(stored, commit=begun.commit), continued=True)


def _require_same(name: str, stored: RunFacts, now: RunFacts) -> None:
    changed = differences(stored.settings, now.settings)
    if stored.job != now.job:
        changed.insert(0, f"job: {stored.job!r} -> {now.job!r}")
    if changed:
        raise SettingsError(
            f"run {name!r} was begun with other settings; use them, or another --run.name:\n  " + "\n  ".join(changed)
        )
    if changed := differences(stored.manifests, now.manifests):
        raise SettingsError(
            f"run {name!r} was begun with other data (SHA-256 of the manifests below); restore it, or train on this "
            "data under another --run.name:\n  " + "\n  ".join(changed)
        )
