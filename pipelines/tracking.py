"""The tracking run of a training: opened and closed on the driver, its metrics logged by `pipelines.metric_log`.

1. `require_tracking`  at the start of a job: the server answers, or an error that says what to do
2. `open_run`          one run per training; a resumed training opens its own run again
3. `log_documents`, `log_files`  recipe, ranks, pictures: kept with the run
4. `finish_run`

Calls on the driver wait out a short absence of the server (`PATIENCE_S`) and then fail with a TrackingError. No value
of a setting whose name looks like a credential leaves the process: everything passes `redact`.
"""

import itertools
import json
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

T = TypeVar("T")

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
"""Seconds for which a call on the driver outlasts an absent server."""
MAX_VALUE = 500
"""Characters of a parameter value: what every server version accepts; the whole value is in recipe.json."""
MAX_KEY = 250
ENTRIES_PER_BATCH = 50
COMMIT_VARIABLE = "METEOR_GIT_COMMIT"
REDACTED = "(redacted)"

# MLflow's own defaults wait for minutes on a server that is gone: 7 retries with doubling pauses, 120 s a request.
_HTTP_LIMITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}

_SECRET_WORDS = {"secret", "secrets", "password", "passwd", "pwd", "passphrase", "credential", "credentials", "apikey"}
_SECRET_PAIRS = {("api", "key"), ("access", "key"), ("private", "key"), ("account", "key"), ("auth", "header")}
# A setting named `..._token` is a credential, unless it is one of a tokenizer's tokens.
_TEXT_TOKENS = {"image", "pad", "bos", "eos", "unk", "mask", "cls", "sep", "special", "start", "end", "stop"}
_URL_PASSWORD = re.compile(r"(?<=://)[^/\s@]*:[^/\s@]*(?=@)")
_SIGNATURE = re.compile(r"(?i)((?:x-amz-(?:signature|credential|security-token)|sig|signature)=)[^&\s]+")


class TrackingError(ValueError):
    """The tracking server, a run or a registered model cannot be used; the message says what to do."""


def limit_http_waits() -> None:
    """Bound MLflow's HTTP retries in this process. What the user's environment sets is left as it is."""
    for name, value in _HTTP_LIMITS.items():
        os.environ.setdefault(name, value)


def use_tracking(uri: str) -> None:
    """Make this server the process's own, for the parts of MLflow that take it from there (registry, downloads)."""
    limit_http_waits()
    mlflow.set_tracking_uri(uri)


# ------------------------------------------------------------------------------------------------------------ secrets


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name (words joined by `_`, `-`, `.`, `/` or capitals) looks like a credential."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.rsplit(".", 1)[-1].rsplit("/", 1)[-1])
    words = [word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word]
    if _SECRET_WORDS & set(words) or any(pair in _SECRET_PAIRS for pair in itertools.pairwise(words)):
        return True
    return bool(words) and words[-1] == "token" and (len(words) == 1 or words[-2] not in _TEXT_TOKENS)


def hide_passwords(text: str) -> str:
    """The text without user:password parts and signatures in its URLs."""
    return _SIGNATURE.sub(rf"\1{REDACTED}", _URL_PASSWORD.sub(REDACTED, text))


def redact(value: Any, name: str = "") -> Any:
    """A copy of plain data (mappings, sequences, dataclasses) whose credentials read `(redacted)`.

    What is judged is the name of a setting, and passwords inside URLs. Numbers, None and empty strings stay.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if is_secret_name(name) and not (value is None or isinstance(value, bool | int | float) or value == ""):
        return REDACTED
    if isinstance(value, Mapping):
        return {str(key): redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return hide_passwords(value) if isinstance(value, str) else value


def flatten(settings: Any) -> dict[str, str]:
    """Nested settings -> redacted parameters under dotted names, long values cut with a note of how much is missing.

    Lists of plain values stay one value in JSON; lists that hold mappings are numbered.
    """
    flat = {_entry_name(name): _shorten(text) for name, text in _leaves("", redact(settings))}
    return dict(sorted(flat.items()))


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(f"{prefix}.{index}", item)
    elif prefix:
        yield prefix, json.dumps(value) if isinstance(value, list | Mapping) else str(value)


def _entry_name(name: str) -> str:
    """The name with only the characters that MLflow takes; over-long ones keep their (telling) end."""
    return re.sub(r"[^\w\-. /:]", "_", name, flags=re.ASCII)[-MAX_KEY:]


def _shorten(text: str) -> str:
    if len(text) <= MAX_VALUE:
        return text
    note = f"... ({len(text)} characters, all in recipe.json)"
    return text[: MAX_VALUE - len(note)] + note


# ------------------------------------------------------------------------------------------------------- reachability


def require_tracking(uri: str, timeout_s: float = 10.0) -> None:
    """Check at the start of a job that the tracking server answers, database included, within `timeout_s`.

    Raises:
        TrackingError: that names the address, what happened, and what to do.
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
    problem = _probe(uri, timeout_s)
    if problem is not None:
        raise TrackingError(
            f"the MLflow tracking server at {shown} cannot be used: {problem}. Start it (`make up` here, `make status` "
            "shows what runs), or set MLFLOW_TRACKING_URI to one that runs"
        )


def _probe(uri: str, timeout_s: float) -> str | None:
    """What is wrong with the server, or None. The search goes to its database, which /health does not."""
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
        return hide_passwords(_short_cause(error, timeout_s))
    if response.status_code in (401, 403):
        return (
            f"it refused our login (HTTP {response.status_code}); "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    if response.status_code != 200:
        return f"it answered HTTP {response.status_code} to {endpoint}: {response.text[:200].strip()}"
    try:
        answer = response.json()
    except requests.JSONDecodeError:
        answer = None
    return None if isinstance(answer, dict) else "what answers there is not MLflow"


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
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(error, requests.RequestException | ConnectionError | TimeoutError)


def patiently(what: str, action: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """The action's result; tried again with growing pauses while the server is away.

    Raises:
        TrackingError: naming `what`, after `patience_s` or at once where trying again cannot help.
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
                raise TrackingError(f"MLflow did not take {what} within {patience_s:g} s: {shown}") from error
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


def open_run(
    uri: str,
    *,
    experiment: str,
    run_name: str,
    settings: Any,
    tags: Mapping[str, str],
    documents: Mapping[str, Any],
    run_id: str | None = None,
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

    Returns:
        The run id.

    Raises:
        TrackingError: an unreachable server, a deleted experiment or run.
    """
    client = MlflowClient(uri)
    known: dict[str, str] = {}
    if run_id is None:
        experiment_id = patiently(f"experiment {experiment!r}", lambda: _experiment_id(client, experiment))
        opened = patiently(f"the new run {run_name!r}", lambda: client.create_run(experiment_id, run_name=run_name))
        run_id = str(opened.info.run_id)
    else:
        resumed = run_id
        known = patiently(f"the resumed run {resumed}", lambda: _reopen(client, resumed))
    params = flatten(settings)
    changed = {f"resumed.{name}": text for name, text in params.items() if known.get(name, text) != text}
    all_tags = {**redact(tags), "run_name": run_name, **changed}
    log_params(uri, run_id, {name: text for name, text in params.items() if name not in known})
    set_tags(uri, run_id, all_tags)
    log_documents(uri, run_id, documents)
    return run_id


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


def log_params(uri: str, run_id: str, params: Mapping[str, str]) -> None:
    """Parameters that the run does not have yet, in batches that MLflow accepts."""
    client = MlflowClient(uri)
    for batch in _batches([Param(name, text) for name, text in params.items()]):
        patiently(f"parameters of run {run_id}", lambda batch=batch: client.log_batch(run_id, params=batch))  # type: ignore[misc]


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Tags of the run; those it has already are replaced."""
    client = MlflowClient(uri)
    for batch in _batches([RunTag(_entry_name(name), str(text)) for name, text in tags.items()]):
        patiently(f"tags of run {run_id}", lambda batch=batch: client.log_batch(run_id, tags=batch))  # type: ignore[misc]


def _batches(entries: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(entries), ENTRIES_PER_BATCH):
        yield entries[start : start + ENTRIES_PER_BATCH]


def log_documents(uri: str, run_id: str, documents: Mapping[str, Any]) -> None:
    """Plain data as JSON artifacts: file name -> mapping, sequence or dataclass; credentials are redacted."""
    with tempfile.TemporaryDirectory(prefix="meteor-documents-") as folder:
        for name, content in documents.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(redact(content), indent=2, sort_keys=True) + "\n")
        if documents:
            log_files(uri, run_id, Path(folder))


def log_files(uri: str, run_id: str, path: Path, artifact_path: str | None = None) -> None:
    """A file, or everything in a folder, as artifacts of the run under `artifact_path`.

    Raises:
        TrackingError: a missing file, or a server that is away for longer than PATIENCE_S.
    """
    if not path.exists():
        raise TrackingError(f"{path} does not exist and cannot be logged to run {run_id}")
    client = MlflowClient(uri)
    log = client.log_artifacts if path.is_dir() else client.log_artifact
    patiently(f"{path.name} as an artifact of run {run_id}", lambda: log(run_id, str(path), artifact_path))


def finish_run(uri: str, run_id: str, status: str = "FINISHED") -> None:
    """Close the run as FINISHED, FAILED or KILLED."""
    if status not in ("FINISHED", "FAILED", "KILLED"):
        raise ValueError(f"a run ends as FINISHED, FAILED or KILLED, not {status!r}")
    patiently(f"the end of run {run_id}", lambda: MlflowClient(uri).set_terminated(run_id, status))
