"""A real local stack for integration tests: `start_stack(folder)` and `stop_stack(stack)`.

In a conftest:

    @pytest.fixture(scope="session")
    def stack(tmp_path_factory):
        stack = start_stack(tmp_path_factory.mktemp("stack"))
        yield stack
        stop_stack(stack)

Programs under test get `full_env(stack)`; the test process itself gets `applied(stack)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from infra import services
from infra.local import Stack, down, up


def start_stack(
    folder: Path,
    *,
    only: Iterable[str] = services.NAMES,
    num_cpus: int = services.DEFAULT_NUM_CPUS,
    object_store_bytes: int = 500_000_000,
) -> Stack:
    """Bring a stack of its own up under `folder`, on free ports; StackError with the end of the log when it fails."""
    return up(folder, only=only, num_cpus=num_cpus, object_store_bytes=object_store_bytes)


def stop_stack(stack: Stack) -> None:
    """Stop every process of the stack and remove its data; StackError when a process survives."""
    down(stack.state_dir, purge=True)


@contextmanager
def applied(stack: Stack) -> Iterator[Stack]:
    """This process's environment points at the stack inside the block, and is as before after it."""
    before = dict(os.environ)
    wanted = services.full_env(stack)
    try:
        os.environ.clear()
        os.environ.update(wanted)
        yield stack
    finally:
        os.environ.clear()
        os.environ.update(before)
