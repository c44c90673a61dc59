"""No web page makes the server work or reads its answers: other sites, files, frames, and names bound anew."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import Request

from pipelines.inference import serving
from pipelines.inference.browser import is_foreign_page

HOST = "127.0.0.1:8000"
PAGES: dict[str, dict[str, str]] = {
    "another site": {"origin": "https://evil.example", "host": HOST, "sec-fetch-site": "cross-site"},
    "a file or a frame in a sandbox": {"origin": "null", "host": HOST},
    "a name bound anew to loopback": {
        "origin": "http://evil.example:8000", "host": "evil.example:8000", "sec-fetch-site": "same-origin",
    },
    "another server on this machine": {"origin": "http://127.0.0.1:3000", "host": HOST, "sec-fetch-site": "same-site"},
    "an image tag": {"host": HOST, "sec-fetch-site": "cross-site"},
}  # fmt: skip
PROGRAMS: dict[str, dict[str, str]] = {
    "curl": {"host": HOST, "user-agent": "curl/8"},
    "a service name": {"host": "meteor.svc:8000", "user-agent": "python-requests/2"},
    "an address that is typed": {"host": HOST, "sec-fetch-site": "none"},
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_refused_before_anything_is_read(page: str) -> None:
    assert is_foreign_page(PAGES[page], ())
    replica = object.__new__(serving._Replica)
    replica._origins = ()

    async def receive() -> Any:
        raise AssertionError("the body was read")

    raw = [(name.encode(), value.encode()) for name, value in PAGES[page].items()]
    scope = {"type": "http", "method": "POST", "path": "/invocations", "query_string": b"", "headers": raw}
    answer = asyncio.run(replica(Request(scope, receive)))
    assert answer.status_code == 403
    assert json.loads(bytes(answer.body))["error_code"] == "PERMISSION_DENIED"
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_are_answered(program: str) -> None:
    assert not is_foreign_page(PROGRAMS[program], ())


def test_a_page_that_is_named_may_ask() -> None:
    allowed = ("https://app.example",)
    assert not is_foreign_page({"origin": "https://app.example", "sec-fetch-site": "cross-site"}, allowed)
    for origin in ("https://app.example.evil", "http://app.example", "https://app.example:444", "null"):
        assert is_foreign_page({"origin": origin}, allowed)
