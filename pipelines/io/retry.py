"""The one loop that tries a call again, and the limit for a try that makes no progress.

Written by hand and not with tenacity: what is particular here (time counted from the first fault, a last try at the
very end, one line of log after some seconds) would be three callbacks around a loop of the same length.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from pipelines.io.errors import TransientError

RETRY_S = 120.0
"""Seconds for which reads and small writes are retried, from their first fault on."""
QUIET_S = 5.0  # a fault that lasts longer is logged

logger = logging.getLogger(__name__)
T = TypeVar("T")


class StalledError(OSError):
    """A try made no progress for too long."""


@dataclass(frozen=True)
class Backoff:
    """Pauses between tries: `first_s`, then twice as long each time, at most `longest_s`."""

    first_s: float = 0.25
    longest_s: float = 5.0

    def pause_s(self, failures: int) -> float:
        """Seconds to wait after that many failures in a row (at least 1)."""
        return min(self.first_s * 2.0 ** (failures - 1), self.longest_s)


BACKOFF = Backoff()


def is_transient(error: Exception) -> bool:
    """Whether it is a TransientError."""
    return isinstance(error, TransientError)


def retry(
    call: Callable[[], T],
    what: str,
    *,
    retry_s: float = RETRY_S,
    transient: Callable[[Exception], bool] = is_transient,
    backoff: Backoff | None = None,
    attempts: int | None = None,
) -> T:
    """The result of `call`, which is made again while it fails with a transient fault.

    Args:
        call: without arguments.
        what: names it in the log.
        retry_s: seconds from the first fault on; no pause goes beyond them, so the last try is at the very end.
        transient: whether a fault may pass; any other error is raised at once.
        backoff: pauses between tries; None: `BACKOFF`.
        attempts: tries at most; None: as many as fit.

    Raises:
        the last fault.
    """
    pauses = backoff or BACKOFF
    first_fault, failures, told = 0.0, 0, False
    while True:
        try:
            return call()
        except Exception as error:
            failures += 1
            first_fault = first_fault or time.monotonic()
            waited = time.monotonic() - first_fault
            if not transient(error) or waited >= retry_s or failures == attempts:
                raise
            if waited >= QUIET_S and not told:
                told = True
                logger.warning("%s fails for %.0f s, is tried for up to %.0f s: %s", what, waited, retry_s, error)
            time.sleep(min(pauses.pause_s(failures), retry_s - waited))


@dataclass
class Progress:
    """When a try last got on."""

    at: float = field(default_factory=time.monotonic)

    def note(self) -> None:
        """The try gets on."""
        self.at = time.monotonic()


def with_stall_limit(call: Callable[[Progress], T], stall_s: float) -> T:
    """The result of `call(progress)`. Raises StalledError once `stall_s` passed without `progress.note()`.

    The call runs in a thread of its own, which a stall leaves behind: clients have no limit for a body that trickles.
    """
    progress = Progress()
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def work() -> None:
        try:
            results.append(call(progress))
        except BaseException as error:  # it is raised in the caller's thread
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=work, name="storage", daemon=True).start()
    while not done.wait(max(0.01, progress.at + stall_s - time.monotonic())):
        if time.monotonic() >= progress.at + stall_s:
            raise StalledError(f"no progress for {stall_s:.0f} s")
    if errors:
        raise errors[0]
    return results[0]
