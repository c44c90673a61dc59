"""Shared by all tests: one thread per process (two cores are shared by servers and workers), and the local stack."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from infra.services import Stack
from tests.stack_fixture import applied, start_stack, stop_stack


def pytest_configure() -> None:
    """SIGTERM ends the session as an interrupt does: fixtures stop the servers that they started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """SeaweedFS, MLflow and Ray for one module; programs under test get `full_env(stack)`."""
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
