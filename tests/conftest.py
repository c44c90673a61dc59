"""Shared by all tests: one thread per process, since servers and workers share two cores, and all are of equal rank."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from infra.services import OF_EVERY_NODE

os.environ.update(OF_EVERY_NODE)  # for tests that start a Ray of their own


def pytest_configure() -> None:
    """SIGTERM ends the session as an interrupt does: fixtures stop the servers that they started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
