"""Files to and from MLflow's artifact store, one by one: limits that follow from their size, and what to change.

MLflow's server takes or reads a whole file before it answers, so the wait for an answer grows with the file; the limit
of other requests (`MLFLOW_HTTP_REQUEST_TIMEOUT`) is raised only while a file is on its way. Where the server offers it,
MLflow itself sends large files in parts past the server (`MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD` there).
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from pipelines.tracking.server import RETRY_S, TrackingAwayError, TrackingError, call_mlflow

T = TypeVar("T")

LEAST_BYTES_PER_S = 2**20
"""That the server and its store are counted on to move; a file of 2 GB may take half an hour."""
KEPT_FROM_BYTES = 16 * 2**20
"""Files of this size that a broken upload left are not sent again; smaller ones are, and may have changed."""
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_ENDPOINT = "/api/2.0/mlflow-artifacts/artifacts"
_PROBE = f"{_ENDPOINT}/.meteor-check"
_PROBE_S = 5.0

logger = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------------- limits


class _Waits:
    """MLflow reads the limit of its requests from the environment: raised while a transfer of this process runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: list[int] = []
        self._usual: str | None = None

    @contextmanager
    def at_least(self, seconds: int) -> Iterator[None]:
        with self._lock:
            if not self._active:
                self._usual = os.environ.get(_TIMEOUT)
            self._active.append(seconds)
            self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._active.remove(seconds)
                self._apply()

    def _apply(self) -> None:
        if self._active:
            os.environ[_TIMEOUT] = str(max(*self._active, int(self._usual or 0)))
        elif self._usual is None:
            os.environ.pop(_TIMEOUT, None)
        else:
            os.environ[_TIMEOUT] = self._usual


_WAITS = _Waits()


def answer_limit_s(size: int) -> int:
    """Seconds that the server may take to answer to a file of `size` bytes, beyond what any request may take."""
    return 60 + size // LEAST_BYTES_PER_S


def transfer(uri: str, what: str, size: int, action: Callable[[], T], retry_s: float = RETRY_S) -> T:
    """The result of moving files of `size` bytes, the largest at once; tried again while the server is away.

    Args:
        uri: of the tracking server.
        what: names the files for people.
        size: bytes of the largest file.
        action: moves them.
        retry_s: seconds from the first fault on.

    Raises:
        TrackingAwayError: the server, or a proxy before it, does not get it done; says what to change.
        TrackingError: it is refused; says what to change.
    """

    def attempt() -> T:
        try:
            with _WAITS.at_least(answer_limit_s(size)):
                return action()
        except (MlflowException, requests.RequestException) as error:
            status = status_of(error) or _status_of_reset(uri, error, size)
            if status in _REFUSALS:
                raise TrackingError(
                    f"MLflow at {uri} did not take {what}: {_REFUSALS[status].format(size=size)}"
                ) from error
            raise

    try:
        return call_mlflow(what, attempt, retry_s)
    except TrackingAwayError as error:
        advice = _advice(error.__cause__, size)
        raise TrackingAwayError(f"{error}. {advice}" if advice else str(error)) from error


# --------------------------------------------------------------------------------------------------- what went wrong

_REFUSALS = {
    401: "HTTP 401, the login is refused: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN",
    403: f"HTTP 403, the login may not write or read artifacts: allow PUT, GET and DELETE below {_ENDPOINT} on the "
    "server, or in the proxy before it",
    404: f"HTTP 404, there is nothing below {_ENDPOINT}: start the server with --serve-artifacts, and let the proxy "
    "before it pass that path on",
    405: f"HTTP 405, the method is refused: let the proxy before the server pass PUT, GET and DELETE below {_ENDPOINT}",
    413: "HTTP 413, a proxy before the server takes no body of {size} bytes: raise its limit (nginx: "
    "client_max_body_size, 0 for none), or set MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD=true on the server and here, which "
    "sends large files in parts past it",
}
_ADVICE = {
    502: "A proxy before the server lost it while the file was on its way (HTTP 502): look at the server's log, and "
    "give its workers memory and disk for a file of {size} bytes",
    504: "A proxy before the server gave up on its answer (HTTP 504): raise its limits to {limit} s (nginx: "
    "proxy_read_timeout, proxy_send_timeout)",
    500: "The server answers, and cannot store or read the file (HTTP 500): its log names its artifact store's fault",
    507: "The server's artifact store is full (HTTP 507)",
}
_NO_ANSWER = (
    "The server did not answer within {limit} s after {size} bytes: it, or its artifact store, moves less than "
    f"{LEAST_BYTES_PER_S // 2**20} MiB/s; MLFLOW_HTTP_REQUEST_TIMEOUT waits longer"
)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that an error of MLflow or requests tells of; None where there was no answer."""
    if isinstance(error, requests.RequestException) and error.response is not None:
        return int(error.response.status_code)
    found = re.search(r"too many (\d{3}) error responses|(?:error code|status code|HTTP) (\d{3})", str(error))
    return int(found[1] or found[2]) if found else None


def _status_of_reset(uri: str, error: Exception, size: int) -> int | None:
    """The status of a proxy that closes the connection while a body is sent, and whose answer is lost thereby.

    It is asked again with the head of such a request and nothing behind it.
    """
    if not any(
        words in str(error) for words in ("Connection aborted", "Broken pipe", "Connection reset", "EOF occurred")
    ):
        return None
    credentials = get_default_host_creds(uri)
    try:
        answer = http_request(
            credentials, _PROBE, "PUT", data=_Announced(size), timeout=_PROBE_S, max_retries=0, raise_on_status=False
        )
    except MlflowException:
        return None
    finally:
        try:  # a server that took the head for a file
            http_request(credentials, _PROBE, "DELETE", timeout=_PROBE_S, max_retries=0, raise_on_status=False)
        except MlflowException as failed:
            logger.debug("the probe may be left at %s: %s", _PROBE, failed)
    return int(answer.status_code)


class _Announced:
    """A body that promises `len` bytes and has none."""

    def __init__(self, size: int) -> None:
        self.len = size

    def read(self, size: int = -1) -> bytes:
        return b""


def _advice(error: BaseException | None, size: int) -> str:
    status = status_of(error)
    limit = max(answer_limit_s(size), int(os.environ.get(_TIMEOUT) or 0))
    if status in _ADVICE:
        return _ADVICE[status].format(size=size, limit=limit)
    if error is not None and "timed out" in str(error).lower():
        return _NO_ANSWER.format(size=size, limit=limit)
    return ""


# ---------------------------------------------------------------------------------------------------------------- files


def upload_model_files(client: MlflowClient, model_id: str, folder: Path, retry_s: float = RETRY_S) -> int:
    """Bring every file of a folder to a logged model, one by one; the bytes sent.

    Large files that are there already in their whole length are left as they are.

    Raises:
        TrackingError, TrackingAwayError: as `transfer`.
    """
    uri = client.tracking_uri
    listed = call_mlflow(
        f"the files of model {model_id}",
        lambda: dict(_walk(lambda path: client.list_logged_model_artifacts(model_id, path))),
        retry_s,
    )
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    total, sent = sum(path.stat().st_size for path in paths), 0
    for number, path in enumerate(paths, 1):
        name, size = path.relative_to(folder), path.stat().st_size
        if size >= KEPT_FROM_BYTES and listed.get(name.as_posix()) == size:
            continue
        parent = name.parent.as_posix() if name.parent != Path() else None

        def send(path: Path = path, parent: str | None = parent) -> None:
            client.log_model_artifact(model_id, str(path), parent)

        transfer(uri, f"{name} ({size} bytes) of model {model_id}", size, send, retry_s)
        sent += size
        if size >= KEPT_FROM_BYTES:
            logger.info("MLflow has file %d of %d (%.2f of %.2f GB)", number, len(paths), sent / 1e9, total / 1e9)
    return sent


def list_files(address: str, uri: str, retry_s: float = RETRY_S) -> dict[str, int]:
    """Bytes of all files behind `models:/NAME/VERSION`, by their path in it. Raises TrackingError."""

    def files() -> dict[str, int]:
        return dict(
            _walk(
                lambda path: mlflow.artifacts.list_artifacts(
                    artifact_uri=f"{address}/{path}" if path else address, tracking_uri=uri
                )
            )
        )

    return call_mlflow(f"the files of {address}", files, retry_s)


def download_file(address: str, name: str, size: int, target: Path, uri: str, retry_s: float = RETRY_S) -> Path:
    """One file behind `models:/NAME/VERSION`, below the folder `target`; its path. Raises as `transfer`."""

    def fetch() -> Path:
        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{address}/{name}", dst_path=str(target), tracking_uri=uri
            )
        )

    return transfer(uri, f"the download of {name} ({size} bytes) of {address}", size, fetch, retry_s)


def _walk(entries: Callable[[str | None], list[FileInfo]], path: str | None = None) -> Iterator[tuple[str, int]]:
    for entry in entries(path):
        if entry.is_dir:
            yield from _walk(entries, entry.path)
        else:
            yield entry.path, int(entry.file_size or 0)
