"""Signs of life: every process of a training says what it is doing, and an observer elsewhere hears when it stops.

1. mark   the work says where it is, as often as it likes: `mark(Phase.FORWARD, step=8)` writes a field
2. beat   a thread of the process sends that every `BEAT_S` to a mailbox, a Ray actor that reserves nothing
3. take   the observer (`pipelines.recovery.watchdog`) takes what came; who is stopped from outside has sent nothing

A process has one pulse, since it is stopped as a whole. Sending waits for nobody; a mailbox that is away costs a beat.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import ray
import ray.actor
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.io.fingerprint import sha256
from pipelines.io.retry import Backoff, retry

NAMESPACE = "meteor"
BEAT_S = 2.0
FIRST_BEAT_S = 5.0
MOST_MEMBERS = 20_000
MOST_CALLS = 64  # of one process that the mailbox has not taken; more are refused, so an outage costs no memory
RECENT_STEPS = 64
DETAIL_LENGTH = 300


class Phase(StrEnum):
    """What a process is doing, in the words of the messages."""

    ROOM = "waiting for room in the cluster"
    PLACE = "placing the workers"
    START = "starting"
    LOAD = "loading"
    DATA = "waiting for data"
    COLLECTIVE = "collective"
    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"
    CHECKPOINT = "checkpoint"
    UPLOAD = "upload"
    VALIDATION = "validation"
    RUNNING = "watching the workers"
    READING = "reading"
    ENCODING = "encoding"
    IDLE = "idle"
    ENDED = "ended"


@dataclass(frozen=True)
class Process:
    """A process of the cluster; `born` (clock ticks since boot) tells it from a later one of the same number."""

    pid: int
    born: int
    node: str
    """Ray's id of its node."""
    host: str

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, node {self.node[:12]}"


@dataclass(frozen=True)
class Beat:
    """One sign of life."""

    member: str
    """Who: "worker 1", "controller", "data task 4711 on HOST"."""
    process: Process
    number: int
    """Of the beat, from 1."""
    phase: Phase
    marks: int
    """How often it has said what it does: it gets on while this grows."""
    step: int
    """The optimizer step it is in, from 1; 0 outside of them."""
    detail: str
    """The last sample or the shard, for people."""
    slowest_step_s: float
    """Seconds of the slowest of its last steps; 0 before the first."""

    @property
    def doing(self) -> str:
        """What it does, for people."""
        step = f" of step {self.step}" if self.step else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.phase}{step}{detail}"


class Mailbox:
    """The newest beat of every member. An actor."""

    def __init__(self) -> None:
        self._beats: dict[str, Beat] = {}

    def put(self, beat: Beat) -> None:
        """Keep `beat` in place of the one before."""
        self._beats.pop(beat.member, None)
        self._beats[beat.member] = beat
        if len(self._beats) > MOST_MEMBERS:
            del self._beats[next(iter(self._beats))]  # the one that was silent for longest

    def take(self, forgotten: Sequence[str] = ()) -> list[Beat]:
        """All of them, without those of the members to forget."""
        for member in forgotten:
            self._beats.pop(member, None)
        return list(self._beats.values())


def mailbox_name(run_url: str) -> str:
    """Name of the mailbox of the run at `run_url`, for every process of the cluster."""
    return f"pulse-{sha256(run_url)[:16]}"


class Pulse:
    """What this process does, and the thread that says so.

    Args:
        mailbox: its name; "" sends nothing.
        member: who this process is.
    """

    def __init__(self, mailbox: str = "", member: str = "") -> None:
        self.mailbox = mailbox
        self.member = member
        self._phase, self._step, self._detail = Phase.START, 0, ""
        self._marks = 0
        self._number = 0
        self._recent = [0.0] * RECENT_STEPS
        self._steps = 0
        self._actor: ray.actor.ActorHandle | None = None
        self._lock = threading.Lock()
        self._process: Process | None = None

    def mark(self, phase: Phase, step: int | None = None, detail: str | None = None) -> None:
        """Say what is done from now on; `step` and `detail` stay as they are where they are not given."""
        self._phase = phase
        self._step = self._step if step is None else step
        self._detail = self._detail if detail is None else detail[:DETAIL_LENGTH]
        self._marks += 1

    def gets_on(self, phase: Phase | None = None) -> None:
        """What was said last gets on; where `phase` is given, only if that was it."""
        if phase is None or phase is self._phase:
            self._marks += 1

    def step_took(self, seconds: float) -> None:
        """Note the length of a step. That of the first, with the start of the stream in it, counts until the second."""
        self._recent[max(0, self._steps - 1) % RECENT_STEPS] = seconds
        self._steps += 1

    def beat(self) -> Beat:
        """The sign of life of this moment."""
        self._number += 1
        self._process = self._process or this_process()
        return Beat(
            self.member,
            self._process,
            self._number,
            self._phase,
            self._marks,
            self._step,
            self._detail,
            max(self._recent),
        )

    def send(self, wait_s: float = 0.0) -> None:
        """Send it, and wait at most `wait_s` seconds until it is there.

        A mailbox that is not there (yet, or any more) is looked for at the next beat.
        """
        if not self.mailbox:
            return
        with self._lock, suppress(ValueError, ray.exceptions.RayError):  # ValueError: no actor has that name
            try:
                self._actor = self._actor or ray.get_actor(self.mailbox, NAMESPACE)
                sent = self._actor.put.remote(self.beat())
                if wait_s:
                    ray.wait([sent], timeout=wait_s)
            except BaseException:
                self._actor = None
                raise


_pulse = Pulse()
_beginning = threading.Lock()


def begin(mailbox: str, member: str) -> None:
    """Let this process beat from now on; nothing where it does already for that mailbox."""
    global _pulse
    with _beginning:
        if not mailbox or (_pulse.mailbox, _pulse.member) == (mailbox, member):
            return
        before = _pulse
        if before.mailbox:  # a process of the pool that works for several runs: it has left the other one
            before.mark(Phase.ENDED)
            before.send()
        _pulse = Pulse(mailbox, member)
        _pulse.send(FIRST_BEAT_S)  # whoever is stopped from here on is known
        if not before.mailbox:
            threading.Thread(target=_beat_for_ever, name="pulse", daemon=True).start()


def _beat_for_ever() -> None:
    while True:
        _pulse.send()
        time.sleep(BEAT_S)


def pulse() -> Pulse:
    """This process's pulse; one that never began takes marks and sends nothing."""
    return _pulse


def mark(phase: Phase, step: int | None = None, detail: str | None = None) -> None:
    """The same as `pulse().mark`."""
    _pulse.mark(phase, step, detail)


def begin_data_task(mailbox: str) -> None:
    """Let this process beat as one that reads or encodes, from its first task on."""
    begin(mailbox, f"data task {os.getpid()} on {socket.gethostname()}")


@contextmanager
def doing(phase: Phase, detail: str = "") -> Iterator[None]:
    """This process does `phase` inside the block, and is idle, or waits for Ray, after it."""
    _pulse.mark(phase, detail=detail)
    if phase is Phase.READING:  # so rare that each is told at once
        _pulse.send()
    try:
        yield
    finally:
        _pulse.mark(Phase.IDLE)


# ---------------------------------------------------------------------------------------------------- the processes


def this_process() -> Process:
    """This process, of a Ray cluster."""
    node = ray.get_runtime_context().get_node_id()
    return Process(os.getpid(), born(os.getpid()) or 0, node, socket.gethostname())


def born(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since boot; None where there is none."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def state_of(pid: int) -> str:
    """What the kernel says that a process does: R, S, D, T (stopped), Z; "" where there is none."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


# -------------------------------------------------------------------------------------------------- the observer


@contextmanager
def open_mailbox(name: str, wait_s: float = 60.0) -> Iterator[Any]:
    """The mailbox `name` on this node, with a `take` for the observer; it ends with the block or with this process.

    Raises:
        ValueError: if another process holds one of that name for longer than `wait_s` seconds.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Mailbox)
    options = {"name": name, "namespace": NAMESPACE, "max_pending_calls": MOST_CALLS, "scheduling_strategy": here}
    # That of a driver that was killed lives on for some seconds.
    handle = retry(
        lambda: actor.options(**options).remote(),
        name,
        retry_s=wait_s,
        transient=lambda error: isinstance(error, ValueError),
        backoff=Backoff(1.0, 1.0),
    )
    try:
        yield handle
    finally:
        ray.kill(handle)
