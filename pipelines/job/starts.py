"""Every start of a run, kept: which code, settings, libraries and workers worked on it, and when.

A start adds one file and changes none, so what an earlier one said is never lost. MLflow gets the list as an artifact,
the registered version as a tag, from which its card has it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.config.recipe import Recipe
from pipelines.config.settings import SettingsError
from pipelines.data.build import differences
from pipelines.io import codec, storage
from pipelines.io.console import say
from pipelines.io.git import COMMIT_VARIABLE, UNKNOWN_COMMIT, git_commit
from pipelines.io.run_folder import RunFolder
from pipelines.registry.tags import LIBRARIES_TAG, STARTS_TAG

LIBRARIES = ("torch", "transformers", "timm", "ray", "deepspeed", "mlflow", "pyarrow", "numpy")
"""Whose releases can change what a run computes or stores."""
DIRTY = "-dirty"
TAG_ENDS = 15
"""Groups of starts that the tag shows at each end, of about a hundred characters."""
TAG_LENGTH = 4000
"""Characters of the tag; MLflow's databases hold 5,000."""


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        when: UTC, ISO 8601.
        commit: of the code; `unknown` where there is none to ask.
        dirty: whether files were changed and not committed.
        workers: asked for.
        recipe_digest: of the settings that decide what is trained.
        recipe: every setting, without secrets.
        versions: of Python and LIBRARIES.
    """

    when: str
    commit: str
    dirty: bool
    workers: int
    recipe_digest: str
    recipe: dict[str, Any]
    versions: dict[str, str]

    @classmethod
    def now(cls, recipe: Recipe) -> Start:
        """Of the job that asks."""
        commit = git_commit(Path.cwd())
        return cls(
            time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            commit.removesuffix(DIRTY),
            commit.endswith(DIRTY),
            recipe.training.workers,
            recipe.digest(),
            recipe.to_dict(),
            {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
        )

    @property
    def code(self) -> str:
        """The commit, marked where files were changed."""
        return self.commit + (DIRTY if self.dirty else "")

    def changes(self, before: Start) -> list[str]:
        """What differs from the start before, a line each."""
        code = [f"commit: {before.code} -> {self.code}"] if self.code != before.code else []
        return code + differences(before.recipe, self.recipe) + differences(before.versions, self.versions)


def add_start(run: RunFolder, start: Start) -> tuple[Start, ...]:
    """Keep a start of a run that this job has claimed; all starts, oldest first, this one last.

    Raises:
        SettingsError: an earlier start's file that is none.
        StorageError: where storage cannot be read or written.
    """
    if start.commit == UNKNOWN_COMMIT:
        say(
            "  warning: the commit of this code is not known here, and is not kept with the run: submit with "
            f"python jobs/submit.py, which takes it along, or set {COMMIT_VARIABLE}"
        )
    earlier = list_starts(run)
    storage.write_json(storage.join(run.starts, f"{len(earlier) + 1:04d}.json"), asdict(start))
    return (*earlier, start)


def list_starts(run: RunFolder) -> tuple[Start, ...]:
    """All starts of a run, oldest first; none of a run from before they were kept. Raises as `add_start`."""
    urls = [storage.join(run.starts, name) for name in storage.list_files(run.starts)]
    return tuple(codec.decode(Start, storage.read_bytes(url), url, SettingsError) for url in urls)


def shown_starts(starts: Sequence[Start]) -> list[dict[str, Any]]:
    """The list for MLflow: each start with what it changed, its settings only where they are the first."""
    shown = []
    for before, start in zip([None, *starts], starts, strict=False):
        plain = asdict(start)
        if before is not None:
            plain |= {"changed": start.changes(before)}
            plain.pop("recipe")
        shown.append(plain)
    return shown


def start_tags(starts: Sequence[Start]) -> dict[str, str]:
    """Tags of an MLflow run and of a version; none of a run from before starts were kept."""
    return {STARTS_TAG: starts_tag(starts), LIBRARIES_TAG: versions_tag(starts)} if starts else {}


def starts_tag(starts: Sequence[Start]) -> str:
    """All starts on one line, for a tag; where there are too many the first and the last of them.

    Starts in a row that differ in nothing but the time are counted together.
    """
    groups: list[tuple[Start, int]] = []
    for start in starts:
        if groups and not replace(start, when=groups[-1][0].when).changes(groups[-1][0]):
            groups[-1] = (groups[-1][0], groups[-1][1] + 1)
        else:
            groups.append((start, 1))
    texts = [
        f"{start.when} {start.code}, {start.workers} workers" + (f" ({count} starts)" if count > 1 else "")
        for start, count in groups
    ]
    if len(texts) > 2 * TAG_ENDS:
        texts = [*texts[:TAG_ENDS], f"... {len(texts) - 2 * TAG_ENDS} more ...", *texts[-TAG_ENDS:]]
    return "; ".join(texts)[:TAG_LENGTH]


def versions_tag(starts: Sequence[Start]) -> str:
    """Releases of the libraries, each with all that were used one after the other."""
    used: dict[str, list[str]] = {}
    for start in starts:
        for name, version in start.versions.items():
            seen = used.setdefault(name, [])
            if not seen or seen[-1] != version:
                seen.append(version)
    return ", ".join(f"{name} {' -> '.join(versions)}" for name, versions in used.items())[:TAG_LENGTH]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
