"""The tracking run of a training, opened and closed on the driver; `metric_logger` logs its metrics.

1. `require_tracking`  at the start of a job: the server answers, or an error that says what to do
2. `open_run`          one run per training; a resumed training opens its own run again
3. `log_documents`, `log_files`  recipe, ranks, pictures: kept with the run
4. `finish_run`

Calls on the driver wait out a short absence of the server (`patience_s`) and then fail with a TrackingAwayError; what a
job does meanwhile is in `pipelines.tracking.run_tracker`. No value of a setting whose name looks like a credential
leaves the process: everything passes `pipelines.tracking.redact`.
"""

import json
import logging
import os
import posixpath
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request, verify_rest_response

from pipelines.tracking.redact import hide_passwords, redact

T = TypeVar("T")

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Seconds for which a call on the driver outlasts an absent server, where nothing else is said."""
TRAINING_TAG = "training_id"
"""Tag of an MLflow run with the id that its training had before the run was made."""
MAX_VALUE = 500
"""Characters of a parameter value: what every server version accepts; the whole value is in recipe.json."""
MAX_KEY = 250
ENTRIES_PER_BATCH = 50
COMMIT_VARIABLE = "METEOR_GIT_COMMIT"

# MLflow's own defaults wait for minutes on a server that is gone: 7 retries with doubling pauses, 120 s a request.
_HTTP_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

_SETTING_NAME = re.compile(r"[a-z_][\w.-]*", re.ASCII | re.IGNORECASE)


class TrackingError(ValueError):
    """The tracking server, a run or a registered model cannot be used; the message says what to do."""


class TrackingAwayError(TrackingError):
    """The tracking server, its database or its artifact store does not answer; later it may."""


def limit_http_waits() -> None:
    """Bound MLflow's HTTP retries in this process. What the user's environment sets is left as it is."""
    for name, value in _HTTP_LIMITS.items():
        os.environ.setdefault(name, value)


def use_tracking(uri: str) -> None:
    """Make this server the process's own, for the parts of MLflow that take it from there (registry, downloads)."""
    limit_http_waits()
    mlflow.set_tracking_uri(uri)


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


# ------------------------------------------------------------------------------------------------------- reachability


def require_tracking(uri: str, timeout_s: float = 10.0) -> None:
    """Check at the start of a job that the tracking server answers, database included, within `timeout_s`.

    Raises:
        TrackingAwayError: a server that does not answer, or with an error of its own.
        TrackingError: an address that cannot be right, a refused login. Both say what happened and what to do.
    """
    limit_http_waits()
    if not uri:
        raise TrackingError(
            "no MLflow tracking server is given: set MLFLOW_TRACKING_URI (`make up` starts one and prints its address)"
        )
    shown = hide_passwords(uri)
    if urlsplit(uri).scheme not in ("http", "https"):
        raise TrackingError(
            f"the MLflow tracking URI {shown} is not an http(s) address: workers on other machines could not reach it; "
            "start a server (`mlflow server`, or `make up` here) and give its address"
        )
    problem, away = _probe(uri, timeout_s)
    if problem is not None:
        kind = TrackingAwayError if away else TrackingError
        raise kind(
            f"the MLflow tracking server at {shown} cannot be used: {problem}. Start it (`make up` here, `make status` "
            "shows what runs), or set MLFLOW_TRACKING_URI to one that runs"
        )


def _probe(uri: str, timeout_s: float) -> tuple[str | None, bool]:
    """What is wrong with the server, or None, and whether that may pass.

    The search goes to its database, which /health does not.
    """
    endpoint = "/api/2.0/mlflow/experiments/search"
    try:
        response = http_request(
            get_default_host_creds(uri),
            endpoint,
            "POST",
            json={"max_results": 1},
            max_retries=0,
            timeout=timeout_s,
            raise_on_status=False,
        )
    except (MlflowException, requests.RequestException) as error:
        return hide_passwords(_short_cause(error, timeout_s)), True
    if response.status_code in (401, 403):
        login = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"it refused our login (HTTP {response.status_code}); {login}", False
    if response.status_code != 200:
        answered = f"it answered HTTP {response.status_code} to {endpoint}: {response.text[:200].strip()}"
        return answered, response.status_code >= 500 or response.status_code == 429
    try:
        answer = response.json()
    except requests.JSONDecodeError:
        answer = None
    return None if isinstance(answer, dict) else "what answers there is not MLflow", False


def _short_cause(error: Exception, timeout_s: float) -> str:
    text = str(error)
    if "timed out" in text:
        return f"no answer within {timeout_s:g} s"
    for words in ("Connection refused", "Name or service not known", "Failed to resolve", "Connection reset"):
        if words in text:
            return words[0].lower() + words[1:]
    return text[:300]


def is_passing(error: Exception) -> bool:
    """Whether an error of MLflow may go away by itself (server gone, overloaded, its store away)."""
    if isinstance(error, MlflowException):  # a request that got no answer counts as INTERNAL_ERROR
        # Some faults of the server's database (no free connection, a connection cut) come as BAD_REQUEST.
        if error.error_code == "BAD_REQUEST" and "sqlalche.me" in str(error):
            return True
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(error, requests.RequestException | ConnectionError | TimeoutError)


def patiently(what: str, action: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """The action's result; tried again with growing pauses while the server is away.

    Raises:
        TrackingAwayError: naming `what`, after `patience_s`.
        TrackingError: at once, where trying again cannot help.
    """
    deadline, pause = time.monotonic() + patience_s, 0.5
    while True:
        try:
            return action()
        except (MlflowException, requests.RequestException, ConnectionError, TimeoutError) as error:
            shown = hide_passwords(str(error))[:500]
            if not is_passing(error):
                raise TrackingError(f"MLflow refused {what}: {shown}") from error
            if time.monotonic() + pause > deadline:
                raise TrackingAwayError(f"MLflow did not take {what} within {patience_s:g} s: {shown}") from error
            logger.warning("MLflow does not take %s; trying again in %.1f s", what, pause)
        time.sleep(pause)
        pause = min(2 * pause, 8.0)


# --------------------------------------------------------------------------------------------------------------- runs


def git_commit(root: Path) -> str:
    """The commit of the code: METEOR_GIT_COMMIT (a Ray working directory holds no .git), else git's, else `unknown`.

    A checkout with changes that are not committed ends in `-dirty`.
    """
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def open_run(  # noqa: PLR0913 - what an MLflow run is opened with, by name
    uri: str,
    *,
    experiment: str,
    run_name: str,
    settings: Any,
    tags: Mapping[str, str],
    documents: Mapping[str, Any],
    run_id: str | None = None,
    training_id: str | None = None,
    started_ms: int | None = None,
    patience_s: float = PATIENCE_S,
) -> str:
    """Open the run of a training, a new one or, to resume, the one of `run_id`.

    Args:
        uri: of the tracking server.
        experiment: made if there is none of this name.
        run_name: shown name; also the tag `run_name`.
        settings: the resolved recipe (nested mappings or a dataclass); becomes parameters.
        tags: e.g. git_commit, recipe, manifest_sha256.
        documents: file name -> plain data, stored as JSON artifacts (recipe.json, ranks.json).
        run_id: of the run to open again. Parameters never change in MLflow: those that differ now become tags
            `resumed.NAME`; documents are replaced.
        training_id: becomes the tag TRAINING_TAG of a new run. A run that has it already is opened again: it was made
            by a driver that died before it could store the run's id.
        started_ms: start of a new run, milliseconds since the epoch; now by default.
        patience_s: for each call.

    Returns:
        The run id.

    Raises:
        TrackingAwayError: an unreachable server.
        TrackingError: a deleted experiment or run.
    """
    client = MlflowClient(uri)
    known: dict[str, str] = {}
    if run_id is None:
        experiment_id = patiently(f"experiment {experiment!r}", lambda: _experiment_id(client, experiment), patience_s)

        def find_or_create() -> tuple[str, bool]:
            found = _find_run(client, experiment_id, training_id) if training_id else None
            return (
                (found, True) if found else (_create_run(uri, experiment_id, run_name, training_id, started_ms), False)
            )

        run_id, adopted = patiently(f"the new run {run_name!r}", find_or_create, patience_s)
    else:
        adopted = True
    if adopted:
        resumed = run_id
        known = patiently(f"the resumed run {resumed}", lambda: _reopen(client, resumed), patience_s)
    params = flatten(settings)
    changed = {f"resumed.{name}": text for name, text in params.items() if known.get(name, text) != text}
    all_tags = {**redact(tags), "run_name": run_name, **changed}
    log_params(uri, run_id, {name: text for name, text in params.items() if name not in known}, patience_s)
    set_tags(uri, run_id, all_tags, patience_s)
    log_documents(uri, run_id, documents, patience_s)
    return run_id


def _find_run(client: MlflowClient, experiment_id: str, training_id: str) -> str | None:
    found = client.search_runs([experiment_id], f"tags.{TRAINING_TAG} = '{training_id}'", max_results=2)
    if len(found) > 1:
        raise TrackingError(
            f"MLflow has two runs of training {training_id} in experiment {experiment_id}: delete the one without "
            "metrics"
        )
    return str(found[0].info.run_id) if found else None


def _create_run(uri: str, experiment_id: str, run_name: str, training_id: str | None, started_ms: int | None) -> str:
    """Asks once: MLflow's client repeats a request whose answer was lost, and a second run would come of it."""
    endpoint = "/api/2.0/mlflow/runs/create"
    body = {
        "experiment_id": experiment_id,
        "run_name": run_name,
        "start_time": started_ms if started_ms is not None else time.time_ns() // 1_000_000,
        "tags": [{"key": TRAINING_TAG, "value": training_id}] if training_id else [],
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


def log_params(uri: str, run_id: str, params: Mapping[str, str], patience_s: float = PATIENCE_S) -> None:
    """Parameters that the run does not have yet, in batches that MLflow accepts."""
    client = MlflowClient(uri)
    for batch in _batches([Param(name, text) for name, text in params.items()]):
        patiently(f"parameters of run {run_id}", partial(client.log_batch, run_id, params=batch), patience_s)


def set_tags(uri: str, run_id: str, tags: Mapping[str, str], patience_s: float = PATIENCE_S) -> None:
    """Tags of the run; those it has already are replaced."""
    client = MlflowClient(uri)
    for batch in _batches([RunTag(_entry_name(name), str(text)) for name, text in tags.items()]):
        patiently(f"tags of run {run_id}", partial(client.log_batch, run_id, tags=batch), patience_s)


def _batches(entries: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(entries), ENTRIES_PER_BATCH):
        yield entries[start : start + ENTRIES_PER_BATCH]


def document(content: Any) -> bytes:
    """Plain data (mapping, sequence or dataclass) as the bytes of a JSON file; credentials are redacted."""
    return (json.dumps(redact(content), indent=2, sort_keys=True) + "\n").encode()


def log_documents(uri: str, run_id: str, documents: Mapping[str, Any], patience_s: float = PATIENCE_S) -> None:
    """Plain data as JSON artifacts: file name -> what `document` takes."""
    with tempfile.TemporaryDirectory(prefix="meteor-documents-") as folder:
        for name, content in documents.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(document(content))
        if documents:
            log_files(uri, run_id, Path(folder), patience_s=patience_s)


def log_files(
    uri: str, run_id: str, path: Path, artifact_path: str | None = None, patience_s: float = PATIENCE_S
) -> None:
    """A file, or everything in a folder, as artifacts of the run under `artifact_path`.

    Raises:
        TrackingError: a missing file, or a server that is away for longer than `patience_s`.
    """
    if not path.exists():
        raise TrackingError(f"{path} does not exist and cannot be logged to run {run_id}")
    client = MlflowClient(uri)
    log = client.log_artifacts if path.is_dir() else client.log_artifact
    patiently(f"{path.name} as an artifact of run {run_id}", lambda: log(run_id, str(path), artifact_path), patience_s)


def finish_run(uri: str, run_id: str, status: str = "FINISHED", patience_s: float = PATIENCE_S) -> None:
    """Close the run as FINISHED, FAILED or KILLED."""
    if status not in ("FINISHED", "FAILED", "KILLED"):
        raise ValueError(f"a run ends as FINISHED, FAILED or KILLED, not {status!r}")
    patiently(f"the end of run {run_id}", lambda: MlflowClient(uri).set_terminated(run_id, status), patience_s)
