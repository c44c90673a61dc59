"""Files on their way to MLflow: limits by size, and an answer that says what to change, whoever gave it."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

from pipelines.tracking import server as tracking_server
from pipelines.tracking.artifacts import answer_limit_s, status_of, transfer
from pipelines.tracking.server import TrackingAwayError, TrackingError
from tests.pipelines.mlflow_fixture import answering

GB = 10**9
PATH = "/api/2.0/mlflow-artifacts/artifacts/1/models/m-1/artifacts/model.safetensors"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")


def put(uri: str, data: bytes = b"weights") -> None:
    """As MLflow's own client sends an artifact."""
    augmented_raise_for_status(http_request(get_default_host_creds(uri), PATH, "PUT", data=data))


REFUSED = {
    401: "MLFLOW_TRACKING_USERNAME",
    403: "allow PUT, GET and DELETE below /api/2.0/mlflow-artifacts",
    404: "--serve-artifacts",
    405: "let the proxy before the server pass PUT",
    413: "no body of 2000000000 bytes.*client_max_body_size.*MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD",
}
AWAY = {
    500: "cannot store or read the file",
    502: "A proxy before the server lost it",
    504: "proxy_read_timeout",
    507: "artifact store is full",
}


@pytest.mark.parametrize("status", REFUSED)
def test_what_is_refused_says_what_to_change_at_once(status: int) -> None:
    with answering(status, "<html>no</html>") as uri, pytest.raises(TrackingError, match=REFUSED[status]) as caught:
        transfer(uri, "model.safetensors", 2 * GB, lambda: put(uri), retry_s=60)
    assert not isinstance(caught.value, TrackingAwayError)
    assert "make up" not in str(caught.value)


@pytest.mark.parametrize("status", AWAY)
def test_what_may_pass_is_tried_again_and_says_what_to_change(status: int) -> None:
    tries = []
    with answering(status, "<html>no</html>") as uri:

        def one() -> None:
            tries.append(1)
            put(uri)

        with pytest.raises(TrackingAwayError, match=AWAY[status]) as caught:
            transfer(uri, "model.safetensors", 2 * GB, one, retry_s=1)
    assert len(tries) > 1
    assert "make up" not in str(caught.value)


@contextmanager
def closing_early() -> Iterator[str]:
    """A proxy that says 413 as soon as it has the head, and resets the connection in the middle of the body."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            head = b""
            while b"\r\n\r\n" not in head and (more := connection.recv(4096)):
                head += more
            connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            body_begun = head.partition(b"\r\n\r\n")[2] or b"Expect" in head
            if body_begun:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def test_a_proxy_that_cuts_the_body_off_is_asked_for_its_reason() -> None:
    with closing_early() as uri:

        def cut() -> None:
            raise MlflowException(
                f"API request to {uri} failed with exception ('Connection aborted.', "
                "ConnectionResetError(104, 'Connection reset by peer'))"
            )

        with pytest.raises(TrackingError, match="HTTP 413") as caught:
            transfer(uri, "model.safetensors", 2 * GB, cut, retry_s=60)
    assert not isinstance(caught.value, TrackingAwayError)


def test_the_limit_grows_with_the_file_and_only_while_it_moves() -> None:
    seen = []

    def look() -> None:
        seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])

    transfer("http://127.0.0.1:9", "a small file", 10, look)
    transfer("http://127.0.0.1:9", "a shard", 2 * GB, look)
    assert [int(value) for value in seen] == [60, answer_limit_s(2 * GB)]
    assert answer_limit_s(2 * GB) > 1800
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"


def test_a_longer_limit_of_the_user_s_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "9999")
    seen = []
    transfer("http://127.0.0.1:9", "x", 10, lambda: seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))
    assert seen == ["9999"]


def test_transfers_side_by_side_leave_the_usual_limit_behind() -> None:
    inside, go = threading.Barrier(2), threading.Event()

    def hold() -> None:
        inside.wait(10)
        go.wait(10)

    threads = [threading.Thread(target=transfer, args=("http://127.0.0.1:9", "x", size, hold)) for size in (10, 5 * GB)]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"


def test_no_answer_in_time_is_said_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def late() -> None:
        raise MlflowException("API request to http://x failed with timeout exception Read timed out. (read timeout=60)")

    with pytest.raises(TrackingAwayError, match=r"did not answer within 1967 s after 2000000000 bytes"):
        transfer("http://127.0.0.1:9", "x", 2 * GB, late, retry_s=0)


def test_a_file_that_is_gone_is_no_fault_of_the_server(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        transfer("http://127.0.0.1:9", "x", 10, lambda: (tmp_path / "none").read_bytes())


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("Max retries exceeded with url: / (Caused by ResponseError('too many 504 error responses'))", 504),
        ("API request to endpoint /x failed with error code 403 != 200. Response body: ''", 403),
        ("Connection refused", None),
    ],
)
def test_the_status_is_found_in_mlflow_s_words(text: str, status: int | None) -> None:
    assert status_of(MlflowException(text)) == status


def test_the_usual_limit_is_one_for_requests() -> None:
    assert tracking_server._HABITS["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"
