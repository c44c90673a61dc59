"""Patience: how long a call outlasts a storage that fails for a while, and how long one try of it may stall."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

PATIENCE_S = 120.0
"""Seconds for which reads and small writes are tried again after their first fault."""
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 5.0
QUIET_S = 5.0  # a fault that lasts longer is logged

logger = logging.getLogger(__name__)
T = TypeVar("T")


class StalledError(OSError):
    """A try made no progress for too long."""


def pause_before(attempt: int) -> float:
    """Seconds to wait before try number `attempt` (the first try is 0): 0.25, 0.5, ... up to 5."""
    return min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S) if attempt else 0.0


def patiently(call: Callable[[], T], transient: type[Exception], patience_s: float, what: str) -> T:
    """The result of `call`, which is made again as long as it raises `transient`.

    Until `patience_s` after its first fault; then that error is raised. A pause is never longer than what is left, so
    the last try is at the very end.

    `what` names the call for the log.
    """
    first_fault, attempt, told = 0.0, 0, False
    while True:
        try:
            return call()
        except transient as error:
            attempt += 1
            first_fault = first_fault or time.monotonic()
            waited = time.monotonic() - first_fault
            if waited >= patience_s:
                raise
            if waited >= QUIET_S and not told:
                told = True
                logger.warning("%s fails for %.0f s, is tried for up to %.0f s: %s", what, waited, patience_s, error)
            time.sleep(min(pause_before(attempt), patience_s - waited))


@dataclass
class Progress:
    """When a try last got on."""

    at: float = field(default_factory=time.monotonic)

    def note(self) -> None:
        """The try gets on."""
        self.at = time.monotonic()


def unless_stalled(call: Callable[[Progress], T], stall_s: float) -> T:
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
