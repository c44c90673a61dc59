"""One local stack for all jobs that are tested on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra.services import Stack
from tests.stack_fixture import applied, start_stack, stop_stack


@pytest.fixture(scope="package")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """SeaweedFS, MLflow and Ray, shared under different names; programs under test get `full_env(stack)`."""
    started = start_stack(tmp_path_factory.mktemp("stack"))
    try:
        yield started
    finally:
        stop_stack(started)


@pytest.fixture
def in_stack(stack: Stack) -> Iterator[Stack]:
    """The same, with this process's own environment pointing at it for one test. Later tests must not meet it."""
    with applied(stack):
        yield stack
