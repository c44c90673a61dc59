"""What a benchmark that starts servers needs: their environment, and an end that stops them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """This process's environment is `values` inside the block."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def end_on_sigterm() -> None:
    """From now on SIGTERM raises KeyboardInterrupt, as an interrupt does: what was started is stopped then, too."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
