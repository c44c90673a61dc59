"""The logged model that holds a version's files: begun once, taken up by the next try, never left half made.

MLflow knows a logged model as PENDING until all its files are there, then as READY. A try that ends because the server
went away leaves it PENDING, and the next one sends only what is missing; one that is refused marks it FAILED and
removes it with its files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from meteor_model.foreign import foreign
from pipelines.io.fingerprint import sha256_of_file, sha256_of_json
from pipelines.io.local_disk import writing
from pipelines.registry.folder import CARD_FILE, CHECKSUMS_FILE, ExportError, verify_checksums
from pipelines.registry.versions import PinnedModel, Registry
from pipelines.tracking.artifacts import download_file, list_files
from pipelines.tracking.server import TrackingError, call_mlflow

UPLOAD_TAG = "meteor.upload"
"""Tag of a logged model: the hash of the files that it is to hold, card apart."""
READS = 4
_DISCARD_RETRY_S = 10.0
_MARKER = ".meteor-pull"

logger = logging.getLogger(__name__)


# -------------------------------------------------------------------------------------------------------------- uploads


def content_of(folder: Path) -> str:
    """One hash of the files of a sealed folder, card apart, from its list: they are not read."""
    sums = _read_sums(folder / CHECKSUMS_FILE)
    return sha256_of_json({name: digest for name, digest in sums.items() if name != CARD_FILE})


def begin_model(registry: Registry, run_id: str, content: str, tags: Mapping[str, str]) -> LoggedModel:
    """The logged model that is to hold these files: what an earlier try of the run left, or a new one.

    What the run left of other files is removed.

    Raises:
        TrackingError, TrackingAwayError: as every call.
    """
    client, name = registry.client, registry.name
    experiment = call_mlflow(f"run {run_id}", lambda: client.get_run(run_id)).info.experiment_id
    found = call_mlflow(
        f"the models of run {run_id}",
        lambda: list(client.search_logged_models([experiment], f"source_run_id = '{run_id}'")),
    )
    mine = [model for model in found if model.name == name and UPLOAD_TAG in model.tags]
    taken = " ".join(f"{item.model_id} {item.source}" for item in registry.versions(run_id))
    for model in mine:
        pending = model.status == LoggedModelStatus.PENDING
        whole = model.status == LoggedModelStatus.READY and model.model_id not in taken
        if model.tags[UPLOAD_TAG] == content and (pending or whole):
            return model
        if pending:
            discard_model(registry, model)
    given = {**tags, UPLOAD_TAG: content}
    return call_mlflow(f"model {name}", lambda: client.create_logged_model(experiment, name, run_id, given))


def discard_model(registry: Registry, model: LoggedModel) -> None:
    """Mark a logged model FAILED and remove it with its files; what stays is said, no error raised."""
    client = registry.client
    steps = {
        "marked as FAILED": lambda: client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED),
        "removed with its files": lambda: get_artifact_repository(
            model.artifact_location, tracking_uri=registry.uri
        ).delete_artifacts(),
        "removed": lambda: client.delete_logged_model(model.model_id),
    }
    for done, step in steps.items():
        try:
            call_mlflow(f"the end of model {model.model_id}", step, _DISCARD_RETRY_S)
        except TrackingError as error:
            logger.warning("model %s at %s could not be %s: %s", model.model_id, model.artifact_location, done, error)


# ------------------------------------------------------------------------------------------------------------ downloads


def pull_files(model: PinnedModel, destination: Path) -> Path:
    """The exported folder of a registered version, file by file, each compared with the list; its path.

    A pull into the same folder goes on where an earlier one ended.

    Args:
        model: of a registry.
        destination: an empty or new folder, or what an earlier pull of this version left.

    Raises:
        ExportError: a folder that holds something else, or files that are not what the export wrote.
        TrackingError: the server is away or refuses.
        LocalDiskError: no room.
    """
    assert model.registry is not None
    marker, uri = destination / _MARKER, model.registry.uri
    entries = {path.name for path in destination.iterdir()} if destination.is_dir() else set()
    if entries and (_MARKER not in entries or marker.read_text() != model.address):
        raise ExportError(f"{destination} is not empty: pull into a new folder")
    files = {name: size for name, size in list_files(model.address, uri).items() if name.startswith("artifacts/")}
    lists = [name for name in files if name.rpartition("/")[2] == CHECKSUMS_FILE]
    if len(lists) != 1:
        raise ExportError(f"{model.address} holds no METEOR model: there is no {CHECKSUMS_FILE} among its files")
    root = lists[0].removesuffix(CHECKSUMS_FILE)
    with writing(destination, sum(files.values()), f"the download of {model.address}"):
        destination.mkdir(parents=True, exist_ok=True)
        marker.write_text(model.address)
        sums = _read_sums(download_file(model.address, lists[0], files[lists[0]], destination, uri))
        for name, size in files.items():
            if name != lists[0]:
                _pull_file(model, name, size, sums.get(name.removeprefix(root)), destination, uri)
    marker.unlink()
    verify_checksums(destination / root)
    return destination / root


def _read_sums(path: Path) -> dict[str, str]:
    with foreign(lambda what: ExportError(f"{path} is damaged: {what}")):
        return {str(name): str(digest) for name, digest in json.loads(path.read_bytes()).items()}


def _pull_file(model: PinnedModel, name: str, size: int, wanted: str | None, destination: Path, uri: str) -> None:
    path = destination / name
    for _ in range(READS):
        if wanted is not None and path.is_file() and sha256_of_file(path) == wanted:
            return
        download_file(model.address, name, size, destination, uri)
        if wanted is None:
            return
    if sha256_of_file(path) != wanted:
        raise ExportError(
            f"{model.address}: {name} was changed after the export (other sha256), however often it is read"
        )
