"""A real S3 server (the local stack's SeaweedFS alone) for the data tests, on free ports of loopback."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from infra import services
from infra.local import Stack
from tests.stack_fixture import start_stack, stop_stack

BUCKET = services.BUCKETS[0]


@dataclass(frozen=True)
class S3Server:
    """Address and identity of the running store; its bucket is BUCKET."""

    endpoint: str
    access_key: str
    secret_key: str


@pytest.fixture(scope="session")
def s3_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The store of this test session."""
    stack = start_stack(tmp_path_factory.mktemp("s3"), only=["s3"])
    yield stack
    stop_stack(stack)


@pytest.fixture
def s3(s3_stack: Stack, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The store, with the environment of this test pointing at it (credentials by file, as in `make up`)."""
    for name in services.overridden(s3_stack):
        monkeypatch.delenv(name, raising=False)
    for name, value in services.stack_env(s3_stack).items():
        monkeypatch.setenv(name, value)
    return S3Server(s3_stack.s3_endpoint, *services.ensure_credentials(s3_stack.credentials_file))
