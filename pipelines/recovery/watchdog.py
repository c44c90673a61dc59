"""The observer of a training: a thread of the driver that hears every process of it, and ends those that are stuck.

1. hear     take the beats from the mailbox (`pipelines.io.pulse`)
2. judge    who is stuck (`pipelines.recovery.stall`)
3. record   what everyone was doing and the stacks of all, in `runs/NAME/stuck/`; one line for people
4. end      the culprits, by tasks on their nodes: Ray makes a data task anew, a worker's end is a failure like others,
            which the restart policy counts
5. go on    where that does not end the attempt: all workers, then Ray's controller

It lives in none of the processes that it watches. Where it was stopped itself, nobody is blamed for that time.
"""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import ray

from pipelines.io import storage
from pipelines.io.console import say
from pipelines.io.pulse import Beat, Phase, mailbox_name, open_mailbox
from pipelines.io.run_folder import RunFolder
from pipelines.recovery.room import waiting_line
from pipelines.recovery.stall import Judge, Limits, Stuck
from pipelines.recovery.stuck_processes import end_all, stacks

POLL_S = 2.0
ANSWER_S = 30.0
"""Seconds that the mailbox has for an answer."""
LADDER_S = 30.0
"""Seconds between ending the culprits, all workers, and the controller, as long as the attempt goes on."""
ROOM_S = 60.0
"""Seconds without room in the cluster after which a person hears of it, and between two times."""

TASKS_SILENT_S = 120.0
"""Seconds without a sign of life after which a data task of a job that trains nothing is replaced."""

Tell = Callable[[str], None]
logger = logging.getLogger(__name__)


class Watchdog:
    """Watches the attempts of one training, one after the other.

    Args:
        mailbox: where the beats arrive (`open_mailbox`).
        limits: what counts as stuck.
        run: the run's folder, for what was seen; None: the log.
        needs: what the workers reserve, for people.
        tell: says a line to them.
    """

    def __init__(self, mailbox: Any, limits: Limits, run: RunFolder | None, needs: str, tell: Tell = say) -> None:
        self._mailbox = mailbox
        self._judge = Judge(limits)
        self._run = run
        self._needs = needs
        self._tell = tell
        self._lock = threading.Lock()
        self._found: Stuck | None = None
        self._ended_at = 0.0
        self._rung = 0
        self._room_since: float | None = None
        self._forgotten: list[str] = []
        self._polled = time.monotonic()

    def attempt_ended(self) -> Stuck | None:
        """What the watchdog ended this attempt for, None where it did not; what comes now belongs to the next one."""
        with self._lock:
            found, self._found = self._found, None
            self._rung, self._room_since = 0, None
            self._forgotten += self._judge.begin(time.monotonic())
        return found

    def run(self, ended: threading.Event) -> None:
        """Look every `POLL_S` until `ended`; for a thread."""
        while not ended.wait(POLL_S):
            try:
                with self._lock:
                    self._poll()
            except Exception as error:  # the mailbox restarts, Ray ends, or whatever: watching must not end with it
                logger.warning("the watchdog of the training could not look: %s: %s", type(error).__name__, error)

    def _poll(self) -> None:
        now = time.monotonic()
        if now - self._polled > 2 * POLL_S + ANSWER_S:
            self._judge.slept(now - self._polled, now)
        self._polled = now
        beats = ray.get(self._mailbox.take.remote(self._forgotten), timeout=ANSWER_S)
        self._forgotten = []
        now = time.monotonic()
        self._judge.see(beats, now)
        self._tell_of_room(now)
        if self._found is not None:
            self._climb(now)
            return
        stuck = self._judge.stuck(now)
        if stuck is not None:
            self._act(stuck)

    def _act(self, stuck: Stuck) -> None:
        """End the culprits, unless they are gone already: a process that ended is a failure that Ray notices itself."""
        seen = [*stuck.culprits, *stuck.others]
        texts = stacks([beat.process for beat in seen])
        idle = [beat.phase is Phase.IDLE for beat in stuck.culprits]
        fates = end_all([beat.process for beat in stuck.culprits], idle)
        gone = [beat for beat, fate in zip(stuck.culprits, fates, strict=True) if fate in ("gone", "left")]
        if len(gone) == len(stuck.culprits):
            self._forgotten += self._judge.forget(gone)
            return
        path = self._record(stuck, seen, texts, fates)
        if stuck.action == "replace":
            self._judge.replaced(stuck.culprits, time.monotonic())
            self._forgotten += [beat.member for beat in stuck.culprits]
            self._tell(f"  {stuck}; ended, Ray does its work anew in another process{path}")
            return
        self._found, self._ended_at = stuck, time.monotonic()
        self._tell(f"  {stuck}; ended{path}")

    def _climb(self, now: float) -> None:
        """The attempt still goes on: end more of it."""
        if now - self._ended_at < LADDER_S or self._rung == 2:
            return
        self._rung += 1
        self._ended_at = now
        controller = self._judge.controller
        more = self._judge.workers if self._rung == 1 else [controller] if controller else []
        fates = end_all([beat.process for beat in more], [False] * len(more))
        names = [f"{beat.member} ({beat.process}): {fate}" for beat, fate in zip(more, fates, strict=True)]
        self._tell(f"  {LADDER_S:.0f} s later the training has not ended yet; {'; '.join(names) or 'nobody is left'}")

    def _tell_of_room(self, now: float) -> None:
        controller = self._judge.controller
        if controller is None or controller.phase not in (Phase.ROOM, Phase.PLACE):
            self._room_since = None
        elif self._room_since is None:
            self._room_since = now
        elif now - self._room_since > ROOM_S:
            self._room_since = now
            self._tell(f"  {waiting_line(self._needs)}")

    def _record(self, stuck: Stuck, seen: Sequence[Beat], texts: Sequence[str], fates: Sequence[str]) -> str:
        """Store what was seen; where, as the end of a line."""
        parts = [f"{stuck}\nended: {', '.join(fates)}\n"]
        for beat, text in zip(seen, texts, strict=False):
            parts.append(f"== {beat.member} ({beat.process}): {beat.doing}\n{text}\n")
        if self._run is None:
            sys.stdout.write("\n".join(parts))
            return " (the stacks are in the log)"
        url = storage.join(self._run.stuck, time.strftime("%Y%m%dT%H%M%SZ.txt", time.gmtime()))
        try:
            storage.write_bytes(url, "\n".join(parts).encode(), retry_s=10)
        except storage.StorageError as error:
            sys.stdout.write("\n".join(parts))
            return f" (the stacks are in the log, and not with the run: {error})"
        return f" (stacks of all: {url})"


@contextmanager
def watch_tasks(silent_s: float = TASKS_SILENT_S) -> Iterator[str]:
    """Watch data tasks that no training waits for, inside the block: one that is stopped is replaced.

    Yields:
        the mailbox that they beat to (`pipelines.io.pulse.begin_data_task`).
    """
    name = mailbox_name(uuid4().hex)
    with open_mailbox(name) as mailbox, _watching(Watchdog(mailbox, Limits(silent_s, math.inf, 0.0), None, "")):
        yield name


@contextmanager
def watch(run: RunFolder, limits: Limits, needs: str) -> Iterator[Watchdog]:
    """Watch the training of a run inside the block."""
    with open_mailbox(mailbox_name(run.url)) as mailbox, _watching(Watchdog(mailbox, limits, run, needs)) as watchdog:
        yield watchdog


@contextmanager
def _watching(watchdog: Watchdog) -> Iterator[Watchdog]:
    ended = threading.Event()
    thread = threading.Thread(target=watchdog.run, args=(ended,), name="watchdog", daemon=True)
    thread.start()
    try:
        yield watchdog
    finally:
        ended.set()
        thread.join(ANSWER_S)
