"""An S3 server in this process, small enough to be refused anything: what a real one of the stack never refuses."""

from __future__ import annotations

import hashlib
import re
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

BUCKET = "fake"


@dataclass
class FakeS3:
    """Objects of one bucket, and what the server refuses.

    Attributes:
        objects: by key.
        uploads: parts by number, of uploads that are not complete.
        denied: operations that are answered with `error`: PutObject, GetObject, ListObjectsV2, DeleteObject, ...
        error: status and code of that answer.
        seen: operation, path and headers of every request.
        demanded: headers that a write must carry, else it is denied.
    """

    endpoint: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    denied: set[str] = field(default_factory=set)
    error: tuple[int, str] = (403, "AccessDenied")
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    demanded: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def operations(self) -> list[str]:
        """What was asked, in its order."""
        return [operation for operation, _, _ in self.seen]


def operation_of(method: str, key: str, query: dict[str, list[str]]) -> str:
    """S3's name of a request."""
    if method == "GET":
        return "GetObject" if key else "ListObjectsV2"
    if method == "POST":
        if not key:
            return "AssumeRole"
        return "CreateMultipartUpload" if "uploads" in query else "CompleteMultipartUpload"
    if method == "DELETE":
        return "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
    return {"PUT": "UploadPart" if "partNumber" in query else "PutObject", "HEAD": "HeadObject"}[method]


class _Handler(BaseHTTPRequestHandler):
    store: FakeS3
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>so it is</Message></Error>".encode())

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        operation = operation_of(self.command, key, query)
        store = self.store
        with store.lock:
            headers = {name.lower(): value for name, value in self.headers.items()}
            store.seen.append((operation, self.path, headers))
            lacking = any(headers.get(name) != value for name, value in store.demanded.items())
            if operation in store.denied or (operation in ("PutObject", "CreateMultipartUpload") and lacking):
                self._error(*store.error)
            elif bucket != BUCKET and operation != "AssumeRole":
                self._error(404, "NoSuchBucket")
            else:
                getattr(self, f"_{operation}")(key, query, body)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _PutObject(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        if source := self.headers.get("x-amz-copy-source"):
            self.store.objects[key] = self.store.objects[unquote(source).lstrip("/").partition("/")[2]]
            self._answer(200, b"<CopyObjectResult></CopyObjectResult>")
            return
        self.store.objects[key] = body
        self._answer(200, ETag=tag(body))

    def _GetObject(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        data = self.store.objects.get(key)
        if data is None:
            self._error(404, "NoSuchKey")
        elif found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or ""):
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            if first >= len(data):
                self._error(416, "InvalidRange")
                return
            stated = f"bytes {first}-{last}/{len(data)}"
            self._answer(206, data[first : last + 1], ETag=tag(data), Content_Range=stated)
        else:
            self._answer(200, data, ETag=tag(data))

    def _HeadObject(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        data = self.store.objects.get(key)
        self._answer(*((404, b"") if data is None else (200, data)))

    def _DeleteObject(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        self.store.objects.pop(key, None)
        self._answer(204)

    def _ListObjectsV2(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        prefix, limit = query.get("prefix", [""])[0], int(query.get("max-keys", ["1000"])[0])
        found = sorted(name for name in self.store.objects if name.startswith(prefix))[:limit]
        entries = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(self.store.objects[name])}</Size></Contents>"
            for name in found
        )
        self._answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>".encode())

    def _CreateMultipartUpload(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        name = f"upload-{len(self.store.seen)}"
        self.store.uploads[name] = {}
        self._answer(
            200,
            f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>".encode(),
        )

    def _UploadPart(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        name = query["uploadId"][0]
        if name not in self.store.uploads:
            self._error(404, "NoSuchUpload")
            return
        self.store.uploads[name][int(query["partNumber"][0])] = body
        self._answer(200, ETag=tag(body))

    def _CompleteMultipartUpload(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        parts = self.store.uploads.pop(query["uploadId"][0], None)
        if parts is None:
            self._error(404, "NoSuchUpload")
            return
        numbers = [int(number) for number in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
        self.store.objects[key] = b"".join(parts[number] for number in numbers)
        self._answer(200, b"<CompleteMultipartUploadResult></CompleteMultipartUploadResult>")

    def _AbortMultipartUpload(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        self.store.uploads.pop(query["uploadId"][0], None)
        self._answer(204)

    def _AssumeRole(self, key: str, query: dict[str, list[str]], body: bytes) -> None:
        keys = {"AccessKeyId": "ROLEKEY", "SecretAccessKey": "s", "SessionToken": "TOKEN"}
        inner = "".join(f"<{name}>{value}</{name}>" for name, value in keys.items())
        text = f"<Credentials>{inner}<Expiration>2099-01-01T00:00:00Z</Expiration></Credentials>"
        self._answer(200, f"<R><AssumeRoleResult>{text}</AssumeRoleResult></R>".encode())

    def log_message(self, *arguments: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that a test resets are no news."""


def tag(data: bytes) -> str:
    """S3's tag of an object that was written in one request."""
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


@contextmanager
def running(certificate: tuple[str, str] | None = None) -> Iterator[FakeS3]:
    """A server with an empty bucket `fake`; over TLS with the files of a certificate and its key."""
    store = FakeS3()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store.endpoint = f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def fake_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    """A server, with the environment of this test pointing at it."""
    with running() as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield store
