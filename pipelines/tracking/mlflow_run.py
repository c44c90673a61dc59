"""The MLflow run of a training, opened and closed on the driver; `metric_logger` logs its metrics.

`open_run` makes one run for each training; a resumed training opens its own run again. No value of a setting whose name
looks like a credential leaves the process: everything passes `pipelines.io.redact`.
"""

from __future__ import annotations

import json
import posixpath
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response

from pipelines.io.redact import redact
from pipelines.tracking.artifacts import transfer
from pipelines.tracking.server import RETRY_S, TrackingError, call_mlflow

T = TypeVar("T")

TRAINING_TAG = "training_id"
"""Tag of an MLflow run with the id that its training had before the run was made."""
MAX_VALUE = 500
"""Characters of a parameter value: what every server version accepts; the whole value is in recipe.json."""
MAX_KEY = 250
ENTRIES_PER_BATCH = 50

_SETTING_NAME = re.compile(r"[a-z_][\w.-]*", re.ASCII | re.IGNORECASE)


# ----------------------------------------------------------------------------------------------------------- settings


def flatten(settings: Any) -> dict[str, str]:
    """Nested settings -> redacted parameters under dotted names, long values cut with a note of how much is missing.

    Lists of plain values stay one value in JSON, and so do mappings whose keys are data (addresses of datasets) and not
    names of settings; lists that hold mappings are numbered.
    """
    flat = {_entry_name(name): _shorten(text) for name, text in _leaves("", redact(settings))}
    return dict(sorted(flat.items()))


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value and (not prefix or all(map(_SETTING_NAME.fullmatch, value))):
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(f"{prefix}.{index}", item)
    elif prefix:
        yield prefix, json.dumps(value) if isinstance(value, list | Mapping) else str(value)


def _entry_name(name: str) -> str:
    """The name as MLflow takes it.

    Only its characters, and, since it may become a file's path there, none that a path would resolve to another one.
    Over-long names keep their (telling) end.
    """
    name = re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)[-MAX_KEY:]
    if name.startswith(("/", "..")) or posixpath.normpath(name) != name or name == ".":
        name = re.sub(r"^\.+|/", "_", name)
    return name


def _shorten(text: str) -> str:
    if len(text) <= MAX_VALUE:
        return text
    note = f"... ({len(text)} characters, all in recipe.json)"
    return text[: MAX_VALUE - len(note)] + note


# --------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class RunRequest:
    """What the MLflow run of a training is opened with.

    Attributes:
        experiment: made if there is none of this name.
        run_name: shown name; also the tag `run_name`.
        settings: the resolved recipe (nested mappings or a dataclass); becomes parameters.
        tags: e.g. git_commit, recipe, manifest_sha256.
        documents: file name -> plain data, stored as JSON artifacts (recipe.json, ranks.json).
        training_id: becomes the tag TRAINING_TAG of a new run. A run that has it already is opened again: it was made
            by a driver that died before it could store the run's id.
        started_ms: start of a new run, milliseconds since the epoch; now by default.
    """

    experiment: str
    run_name: str
    settings: Any = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, Any] = field(default_factory=dict)
    training_id: str | None = None
    started_ms: int | None = None


@dataclass(frozen=True)
class MlflowRun:
    """A run on an MLflow server. Its methods raise TrackingError, or TrackingAwayError after `retry_s`.

    Attributes:
        uri: address of the server.
        run_id: of the run.
        retry_s: seconds for which each call outlasts an absent server.
    """

    uri: str
    run_id: str
    retry_s: float = RETRY_S

    def log_params(self, params: Mapping[str, str]) -> None:
        """Parameters that the run does not have yet, in batches that MLflow accepts."""
        client = MlflowClient(self.uri)
        for batch in _batches([Param(name, text) for name, text in params.items()]):
            self._call("parameters", partial(client.log_batch, self.run_id, params=batch))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run; those it has already are replaced."""
        client = MlflowClient(self.uri)
        for batch in _batches([RunTag(_entry_name(name), str(text)) for name, text in tags.items()]):
            self._call("tags", partial(client.log_batch, self.run_id, tags=batch))

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Numbers without steps, as of now."""
        now = time.time_ns() // 1_000_000
        entries = [Metric(name, float(value), now, 0) for name, value in metrics.items()]
        self._call("metrics", lambda: MlflowClient(self.uri).log_batch(self.run_id, metrics=entries))

    def log_documents(self, documents: Mapping[str, Any]) -> None:
        """Plain data as JSON artifacts: file name -> what `document` takes."""
        with tempfile.TemporaryDirectory(prefix="meteor-documents-") as folder:
            for name, content in documents.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(document(content))
            if documents:
                self.log_files(Path(folder))

    def log_files(self, path: Path, artifact_path: str | None = None) -> None:
        """A file, or everything in a folder, as artifacts under `artifact_path`. A missing file is a TrackingError."""
        if not path.exists():
            raise TrackingError(f"{path} does not exist and cannot be logged to run {self.run_id}")
        client = MlflowClient(self.uri)
        log = client.log_artifacts if path.is_dir() else client.log_artifact
        files = [file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
        largest = max((file.stat().st_size for file in files), default=0)
        what = f"{path.name} as an artifact of run {self.run_id}"
        transfer(self.uri, what, largest, lambda: log(self.run_id, str(path), artifact_path), self.retry_s)

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"a run ends as FINISHED, FAILED or KILLED, not {status!r}")
        self._call("the end", lambda: MlflowClient(self.uri).set_terminated(self.run_id, status))

    def _call(self, what: str, action: Callable[[], Any]) -> None:
        call_mlflow(f"{what} of run {self.run_id}", action, self.retry_s)


def _batches(entries: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(entries), ENTRIES_PER_BATCH):
        yield entries[start : start + ENTRIES_PER_BATCH]


def open_run(uri: str, request: RunRequest, *, run_id: str | None = None, retry_s: float = RETRY_S) -> MlflowRun:
    """Open the run of a training, a new one or, to resume, the one of `run_id`.

    Args:
        uri: of the tracking server.
        request: what it is opened with.
        run_id: of the run to open again. Parameters never change in MLflow: those that differ now become tags
            `resumed.NAME`; documents are replaced.
        retry_s: for each call.

    Raises:
        TrackingAwayError: an unreachable server.
        TrackingError: a deleted experiment or run.
    """
    client = MlflowClient(uri)
    name, known, adopted = request.run_name, {}, run_id is not None
    if run_id is None:
        experiment = request.experiment
        experiment_id = call_mlflow(f"experiment {experiment!r}", lambda: _experiment_id(client, experiment), retry_s)
        run_id, adopted = call_mlflow(
            f"the new run {name!r}", lambda: _find_or_create(client, uri, experiment_id, request), retry_s
        )
    run = MlflowRun(uri, run_id, retry_s)
    if adopted:
        known = call_mlflow(f"the resumed run {run_id}", lambda: _reopen(client, run.run_id), retry_s)
    params = flatten(request.settings)
    changed = {f"resumed.{key}": text for key, text in params.items() if known.get(key, text) != text}
    run.log_params({key: text for key, text in params.items() if key not in known})
    run.set_tags({**redact(request.tags), "run_name": name, **changed})
    run.log_documents(request.documents)
    return run


def _find_or_create(client: MlflowClient, uri: str, experiment_id: str, request: RunRequest) -> tuple[str, bool]:
    """The id of the run, and whether an earlier start made it."""
    found = _find_run(client, experiment_id, request.training_id) if request.training_id else None
    return (found, True) if found else (_create_run(uri, experiment_id, request), False)


def _find_run(client: MlflowClient, experiment_id: str, training_id: str) -> str | None:
    found = client.search_runs([experiment_id], f"tags.{TRAINING_TAG} = '{training_id}'", max_results=2)
    if len(found) > 1:
        raise TrackingError(
            f"MLflow has two runs of training {training_id} in experiment {experiment_id}: delete the one without "
            "metrics"
        )
    return str(found[0].info.run_id) if found else None


def _create_run(uri: str, experiment_id: str, request: RunRequest) -> str:
    """Asks once: MLflow's client repeats a request whose answer was lost, and a second run would come of it."""
    endpoint = "/api/2.0/mlflow/runs/create"
    body = {
        "experiment_id": experiment_id,
        "run_name": request.run_name,
        "start_time": request.started_ms if request.started_ms is not None else time.time_ns() // 1_000_000,
        "tags": [{"key": TRAINING_TAG, "value": request.training_id}] if request.training_id else [],
    }
    response = http_request(
        get_default_host_creds(uri), endpoint, "POST", json=body, max_retries=0, raise_on_status=False
    )
    created: dict[str, Any] = verify_rest_response(response, endpoint).json()
    return str(created["run"]["info"]["run_id"])


def _experiment_id(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another job made it just now
    if found is None or found.lifecycle_stage != "active":
        raise TrackingError(
            f"experiment {name!r} was deleted in MLflow: restore it (`mlflow experiments restore`) or choose another"
        )
    return str(found.experiment_id)


def _reopen(client: MlflowClient, run_id: str) -> dict[str, str]:
    """Set a run to RUNNING; its parameters."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise TrackingError(
            f"MLflow has no run {run_id}, which the training to resume belongs to: is MLFLOW_TRACKING_URI the server "
            "that it began on? Otherwise start under a new run name"
        ) from error
    if run.info.lifecycle_stage != "active":
        raise TrackingError(
            f"run {run_id} was deleted in MLflow: restore it (`mlflow runs restore --run-id {run_id}`) or start under "
            "a new run name"
        )
    client.update_run(run_id, status="RUNNING")
    return dict(run.data.params)


def document(content: Any) -> bytes:
    """Plain data (mapping, sequence or dataclass) as the bytes of a JSON file; credentials are redacted."""
    return (json.dumps(redact(content), indent=2, sort_keys=True) + "\n").encode()
