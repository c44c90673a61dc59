"""The MLflow server: whether it answers, and calls that wait out its absence.

`require_tracking` asks at the start of a job. Every later call on the driver passes `call_mlflow`, which tries again
for `retry_s` and then raises TrackingAwayError; what a job does meanwhile is in `pipelines.tracking.run_tracker`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from pipelines.io.redact import redact_text
from pipelines.io.retry import Backoff, retry

T = TypeVar("T")

RETRY_S = 60.0
"""Seconds for which a call on the driver outlasts an absent server, where nothing else is said."""
_BACKOFF = Backoff(first_s=0.5, longest_s=8.0)
# MLflow's own defaults wait for minutes on a server that is gone: 7 retries with doubling pauses, 120 s a request.
_HABITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # of every run that ends, with the login of the server
}


class TrackingError(ValueError):
    """The tracking server, a run or a registered model cannot be used; the message says what to do, never a secret."""

    def __init__(self, message: str) -> None:
        super().__init__(redact_text(message))


class TrackingAwayError(TrackingError):
    """The tracking server, its database or its artifact store does not answer; later it may."""


def limit_http_waits() -> None:
    """Bound MLflow's HTTP retries in this process, and keep it from printing the addresses of runs.

    What the user's environment sets is left as it is.
    """
    for name, value in _HABITS.items():
        os.environ.setdefault(name, value)
    if region := os.environ.get(
        "AWS_REGION"
    ):  # boto3, with which MLflow reads artifacts from S3, knows the other alone
        os.environ.setdefault("AWS_DEFAULT_REGION", region)


def use_tracking(uri: str) -> None:
    """Make this server the process's own, for the parts of MLflow that take it from there (registry, downloads)."""
    limit_http_waits()
    mlflow.set_tracking_uri(uri)


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
    if urlsplit(uri).scheme not in ("http", "https"):
        raise TrackingError(
            f"the MLflow tracking URI {uri} is not an http(s) address: workers on other machines could not reach it; "
            "start a server (`mlflow server`, or `make up` here) and give its address"
        )
    problem, away = _probe(uri, timeout_s)
    if problem is not None:
        kind = TrackingAwayError if away else TrackingError
        raise kind(
            f"the MLflow tracking server at {uri} cannot be used: {problem}. Start it (`make up` here, `make status` "
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
        return _short_cause(error, timeout_s), True
    if response.status_code in (401, 403):
        login = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"it refused our login (HTTP {response.status_code}); {login}", False
    if response.status_code != 200:
        answered = f"it answered HTTP {response.status_code} to {endpoint}: {redact_text(response.text)[:200].strip()}"
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
    return redact_text(text)[:300]


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


def call_mlflow(what: str, action: Callable[[], T], retry_s: float = RETRY_S) -> T:
    """The action's result; tried again with growing pauses while the server is away.

    Raises:
        TrackingAwayError: naming `what`, `retry_s` after the first fault.
        TrackingError: at once, where trying again cannot help.
    """

    def attempt() -> T:  # the loop below logs and raises what this raises: without passwords
        try:
            return action()
        except (MlflowException, requests.RequestException, ConnectionError, TimeoutError) as error:
            shown = redact_text(str(error))[:500]  # before it is cut: half an address has no login to be seen
            if not is_passing(error):
                raise TrackingError(f"MLflow refused {what}: {shown}") from error
            raise TrackingAwayError(f"MLflow did not take {what} within {retry_s:g} s: {shown}") from error

    return retry(attempt, what, retry_s=retry_s, transient=_is_away, backoff=_BACKOFF)


def _is_away(error: Exception) -> bool:
    return isinstance(error, TrackingAwayError)
