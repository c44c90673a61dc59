"""The folder of a sweep in storage: one property for every path in it, so that no other module spells a name."""

from __future__ import annotations

from pipelines.io import storage
from pipelines.io.names import require_name
from pipelines.io.stored_folder import StoredFolder

SWEEPS_FOLDER = "sweeps"


class SweepFolder(StoredFolder):
    """The paths of one sweep."""

    @property
    def facts(self) -> str:
        """What the sweep was begun with, and whether it is finished."""
        return self._path("sweep.json")

    @property
    def base(self) -> str:
        """The model that is pruned."""
        return self._path("base")

    @property
    def trials(self) -> str:
        """A record of every trial, and a folder for what it made."""
        return self._path("trials")

    def record(self, trial: str) -> str:
        """What is known of a trial."""
        return self._path("trials", f"{trial}.json")

    def score(self, trial: str) -> str:
        """The score of a completed trial, with all questions."""
        return self._path("trials", trial, "score.json")

    def trial_pictures(self, trial: str) -> str:
        """Pictures of what a completed trial keeps."""
        return self._path("trials", trial, "pictures")

    def export(self, trial: str) -> str:
        """The model that a `finetune` trial trained."""
        return self._path("trials", trial, "export")

    @property
    def latency(self) -> str:
        """Milliseconds that all measured ones are a multiple of (`tune.timing`)."""
        return self._path("latency.json")

    @property
    def result(self) -> str:
        """What the sweep came to."""
        return self._path("result.json")

    @property
    def pictures(self) -> str:
        """Pictures of the whole sweep, and its front as a table."""
        return self._path("pictures")

    @property
    def tune(self) -> str:
        """What Ray Tune writes for itself; nothing is read from it."""
        return self._path("tune")


def sweep_folder(root: str, name: str) -> SweepFolder:
    """The folder of sweep `name` of the storage `root`. Raises NamingError for what is no name."""
    return SweepFolder(storage.join(root, SWEEPS_FOLDER, require_name(name, "sweep")))


def list_sweeps(root: str) -> list[str]:
    """Names of the sweeps of the storage `root`, sorted, by one listing. Raises StorageError."""
    return storage.list_folders(storage.join(root, SWEEPS_FOLDER))
