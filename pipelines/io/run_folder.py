"""The folder of a run in storage: one property for every path in it, so that no other module spells a name.

`docs/run-folder.md` says who writes each, when, and who reads it; a test holds the two together. Imports no more than
storage and names: controllers and data tasks use it.
"""

from pipelines.io import storage
from pipelines.io.names import is_name, require_name
from pipelines.io.stored_folder import StoredFolder

RUNS_FOLDER = "runs"
TRAIN_NAME = "train"
"""Name under which Ray Train knows the training of a run; its folder is called like it."""


class RunFolder(StoredFolder):
    """The paths of one run."""

    @property
    def record(self) -> str:
        """What the run belongs to (job, settings, data, MLflow run once that is open), and whether it is finished."""
        return self._path("run.json")

    @property
    def lease(self) -> str:
        """Which job works on the run, and its last sign of life."""
        return self._path("lease.json")

    @property
    def recipe(self) -> str:
        """Every setting of the last start."""
        return self._path("recipe.json")

    @property
    def starts(self) -> str:
        """A file for every start: its commit, settings, libraries, workers and time."""
        return self._path("starts")

    @property
    def init(self) -> str:
        """The model before step 1: config, processor, weights."""
        return self._path("init")

    @property
    def init_config(self) -> str:
        """Configuration of that model; written again once ranks are measured."""
        return self._path("init", "config.json")

    @property
    def init_parts(self) -> str:
        """Source, size and checksum of every pretrained part that was loaded; not there without any."""
        return self._path("init", "parts.json")

    @property
    def init_weights(self) -> str:
        """SHA-256 of its weight files, by which checkpoints name what they leave to them."""
        return self._path("init", "weights.json")

    @property
    def init_ready(self) -> str:
        """Written last: `init`, `processor` and `ranks` are complete."""
        return self._path("init", "READY.json")

    @property
    def processor(self) -> str:
        """The processor alone: data tasks on every node need it without the weights."""
        return self._path("processor")

    @property
    def ranks(self) -> str:
        """Measured ranks of the feature maps, and the budgets that follow from them."""
        return self._path("ranks.json")

    @property
    def train(self) -> str:
        """What Ray Train keeps: a folder for each checkpoint."""
        return self._path(TRAIN_NAME)

    @property
    def snapshot(self) -> str:
        """Ray's list of committed checkpoints: what it does not name does not count."""
        return self._path(TRAIN_NAME, "checkpoint_manager_snapshot.json")

    def checkpoint(self, name: str) -> str:
        """The folder of the checkpoint `name`."""
        return self._path(TRAIN_NAME, name)

    @property
    def set_aside(self) -> str:
        """Committed checkpoints that are not resumed from any more, and why."""
        return self._path("set-aside.json")

    @property
    def losses(self) -> str:
        """The loss of every step, a file for each checkpoint; not deleted with old checkpoints."""
        return self._path("step-losses")

    @property
    def best(self) -> str:
        """A copy of the checkpoint with the lowest validated loss."""
        return self._path("best")

    @property
    def best_record(self) -> str:
        """Which checkpoint that is; the copy counts once this names it."""
        return self._path("best", "best.json")

    @property
    def export(self) -> str:
        """The trained model as a folder of transformers."""
        return self._path("export")

    @property
    def exported(self) -> str:
        """Written last: the checkpoint that `export` is complete for, and its parity."""
        return self._path("exported.json")

    @property
    def pictures(self) -> str:
        """Pictures of the loss, the ranks and the kept tokens."""
        return self._path("pictures")

    @property
    def answers(self) -> str:
        """Written last: held-out answers and score of a checkpoint, for which `pictures` is complete."""
        return self._path("answers.json")

    @property
    def summary(self) -> str:
        """What the run came to."""
        return self._path("summary.json")

    @property
    def logs(self) -> str:
        """What each start printed, its libraries and workers included."""
        return self._path("logs")

    @property
    def stuck(self) -> str:
        """What the watchdog saw of processes that it ended: a file each time."""
        return self._path("stuck")

    @property
    def outbox(self) -> str:
        """What MLflow has not taken yet."""
        return self._path("outbox")

    @property
    def outbox_points(self) -> str:
        """Metric points that wait for MLflow."""
        return self._path("outbox", "points")

    @property
    def outbox_refused(self) -> str:
        """Metric points that MLflow refused for what they are."""
        return self._path("outbox", "refused-points")

    @property
    def outbox_artifacts(self) -> str:
        """Files that wait for MLflow."""
        return self._path("outbox", "artifacts")


def run_folder(root: str, name: str) -> RunFolder:
    """The folder of run `name` of the storage `root`. Raises NamingError for what is no name."""
    return RunFolder(storage.join(root, RUNS_FOLDER, require_name(name, "run")))


def split_run_url(url: str) -> tuple[str, str]:
    """Address of a run's folder -> (root of the storage, name of the run).

    Raises:
        StorageError: if it is no such address.
    """
    root, separator, name = url.rstrip("/").rpartition(f"/{RUNS_FOLDER}/")
    if not separator or not root or not is_name(name):
        raise storage.StorageError(f"{url!r} is no run's folder; those are STORAGE/{RUNS_FOLDER}/NAME")
    return root, name


def list_runs(root: str, prefix: str = "") -> list[str]:
    """Names of the runs of the storage `root` that begin with `prefix`, sorted, by one listing of storage.

    Raises:
        StorageError: if storage cannot be read.
    """
    return [name for name in storage.list_folders(storage.join(root, RUNS_FOLDER)) if name.startswith(prefix)]
