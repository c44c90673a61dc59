"""Shared by all tests: one thread per process (two cores are shared by servers and workers)."""

from __future__ import annotations

import signal

import pytest
import torch


def pytest_configure() -> None:
    """SIGTERM ends the session as an interrupt does: fixtures stop the servers that they started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
