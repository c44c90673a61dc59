"""One job at a time for a run, whatever cluster it comes from: a lease in the run's folder.

`lease.json` names its owner and a count that the owner raises every `beat_s` seconds. Whoever wants the run

- takes it at once where there is no lease, where it was given back, or where its owner is a process of this machine
  that is gone;
- else watches: a count that moves is a living owner, and the job is refused by name; a lease that stays as it is
  for `silence_s` seconds, by the watcher's own clock, is taken over. No clocks are compared.

Every write is made over the content that was read (`pipelines.io.conditional`), so of two who take over one succeeds.
An owner whose lease was taken over learns it with its next beat, and stops; workers ask before they store a checkpoint.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from pipelines.io import codec, conditional, storage
from pipelines.io.console import say
from pipelines.io.run_folder import RunFolder

BEAT_S = 10.0
SILENCE_S = 60.0
LEASE_VERSION = 1


class RunInUseError(ValueError):
    """Another job works on the run; the message names it and says what to do."""


class LeaseLostError(ValueError):
    """Another job has taken this run over; this one must not write any more."""


@dataclass(frozen=True)
class LeaseRecord:
    """What `lease.json` says."""

    version: int
    owner: str
    """Made anew for every claim."""
    host: str
    process: str
    """Which process of which boot of the host (`this_process`)."""
    since: str
    """When it was claimed, by the owner's clock; for people."""
    beat: int = 0
    """Raised by every sign of life."""
    released: bool = False
    """Whether the owner has given it back."""

    @property
    def who(self) -> str:
        """For people."""
        return f"the job of process {self.process.split()[0]} on {self.host}, which works on it since {self.since}"


def this_process() -> str:
    """This process, told apart from one of the same number in another container or after a restart."""
    return _process(os.getpid())


def _process(pid: int) -> str:
    created = psutil.Process(pid).create_time()
    return f"{pid} {created:.2f} {_machine()}"


def _machine() -> str:
    """This boot of this machine and, in a container, its own numbers of processes; "" where that cannot be told."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def is_gone(record: LeaseRecord) -> bool:
    """Whether the owner was a process of this machine that has ended: then nobody needs to wait for its silence."""
    pid, _, rest = record.process.partition(" ")
    machine = rest.partition(" ")[2]
    if not machine or machine != _machine():
        return False
    try:
        return _process(int(pid)) != record.process
    except psutil.NoSuchProcess:
        return True


@dataclass
class Lease:
    """One job's claim on a run.

    Args:
        url: address of `lease.json`.
        subject: names the run in errors.
        beat_s: seconds between two signs of life.
        silence_s: seconds without one after which another job may take over.
        clock: this process's own; never compared with another's.
    """

    url: str
    subject: str
    beat_s: float = BEAT_S
    silence_s: float = SILENCE_S
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    gone: Callable[[LeaseRecord], bool] = is_gone
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)
    lost: LeaseLostError | None = None
    _stored: conditional.Content | None = None
    _record: LeaseRecord | None = None

    @property
    def token(self) -> LeaseToken:
        """What other processes of this job ask with."""
        return LeaseToken(self.url, self.owner, self.subject)

    def take(self) -> None:
        """Make the run this job's.

        Raises:
            RunInUseError: naming the job that has it.
            StorageError: if storage fails.
        """
        seen, watched_since = conditional.read(self.url), self.clock()
        while not self._may_take(seen, watched_since):
            self.sleep(min(1.0, self.beat_s / 4))
            now = conditional.read(self.url)
            if now != seen:
                self._refuse_if_alive(seen, now)
                seen, watched_since = now, self.clock()
        mine = LeaseRecord(
            LEASE_VERSION, self.owner, socket.gethostname(), this_process(), time.strftime("%Y-%m-%d %H:%M:%S %Z")
        )
        self._stored = conditional.replace(self.url, _encode(mine), seen, sleep=self.sleep)
        if self._stored is None:
            other = _decode(self.url, conditional.read(self.url))
            raise self._in_use(other)
        self._record = mine

    def _may_take(self, seen: conditional.Content | None, watched_since: float) -> bool:
        record = _decode(self.url, seen)
        if record is None or record.released or self.gone(record):
            return True
        silent = self.clock() - watched_since >= self.silence_s
        if silent:
            say(f"  {self.subject}: no sign of life for {self.silence_s:.0f} s of {record.who}: taken over")
        return silent

    def _refuse_if_alive(self, before: conditional.Content | None, after: conditional.Content | None) -> None:
        old, new = _decode(self.url, before), _decode(self.url, after)
        if old is not None and new is not None and not new.released and not self.gone(new):
            raise self._in_use(new)

    def _in_use(self, other: LeaseRecord | None) -> RunInUseError:
        who = "another job, which has claimed it just now" if other is None else other.who
        return RunInUseError(
            f"{self.subject} is being trained by another job: {who} ({self.url}). Wait for it, stop it (`ray job "
            "list`, `ray job stop` on its cluster), or use another --run.name. If it is dead, this command takes over "
            f"{self.silence_s:.0f} s after its last sign of life"
        )

    def beat(self) -> None:
        """Give a sign of life.

        Raises:
            LeaseLostError: another job has taken over.
            StorageError: storage fails; the lease may still be this job's.
        """
        if self.lost is not None:
            raise self.lost
        assert self._record is not None
        self._write(replace(self._record, beat=self._record.beat + 1))

    def release(self) -> None:
        """Give it back, unless it is lost. Raises as `beat`."""
        if self.lost is None and self._record is not None:
            self._write(replace(self._record, released=True))

    def _write(self, record: LeaseRecord) -> None:
        stored = conditional.replace(self.url, _encode(record), self._stored, sleep=self.sleep)
        if stored is None:
            now = conditional.read(self.url)
            found = _decode(self.url, now)
            if found is not None and found.owner == self.owner:  # a write whose answer was lost
                self._stored, self._record = now, found
                return
            self.lost = _lost(self.subject, self.url, found)
            raise self.lost
        self._stored, self._record = stored, record


@dataclass(frozen=True)
class LeaseToken:
    """A claim, as the workers of the job know it."""

    url: str
    owner: str
    subject: str

    def require(self) -> None:
        """Asked right before something is stored.

        Raises:
            LeaseLostError: the run is no longer this job's.
            StorageError: if storage cannot be read.
        """
        found = _decode(self.url, conditional.read(self.url))
        if found is None or found.owner != self.owner:
            raise _lost(self.subject, self.url, found)


def _lost(subject: str, url: str, found: LeaseRecord | None) -> LeaseLostError:
    who = "nobody: the file is gone" if found is None else found.who
    return LeaseLostError(
        f"{subject} is no longer this job's: {url} names {who}. This job gave no sign of life for too long, or the "
        "file was changed by hand; it stops, and stores nothing more"
    )


def _encode(record: LeaseRecord) -> bytes:
    return (codec.encode(record, indent=1) + "\n").encode()


def _decode(url: str, content: conditional.Content | None) -> LeaseRecord | None:
    """What is stored; what cannot be read (another version, damage) is an owner that nobody knows: it is watched."""
    if content is None:
        return None
    try:
        return codec.decode(LeaseRecord, content.data, url)
    except ValueError:
        return LeaseRecord(0, "", "an unknown host", "?", "an unknown time")


@contextmanager
def hold_run(run_url: str, subject: str, beat_s: float = BEAT_S, silence_s: float = SILENCE_S) -> Iterator[Lease]:
    """Hold the run at `run_url` for this job inside the block, and give signs of life from a thread.

    Once the lease is lost, the block is interrupted, where it runs in the main thread.

    Raises:
        RunInUseError: another job works on the run.
        LeaseLostError: instead of whatever the block raised, where another job has taken over.
        StorageError: if storage fails at the start.
    """
    lease = Lease(RunFolder(run_url).lease, subject, beat_s, silence_s)
    lease.take()
    ended = threading.Event()
    main = threading.current_thread() is threading.main_thread()
    beating = threading.Thread(target=_beat_until, args=(lease, ended, main), name="lease", daemon=True)
    beating.start()
    try:
        yield lease
        if lease.lost is not None:
            raise lease.lost
    except BaseException as error:
        if lease.lost is not None and error is not lease.lost:
            raise lease.lost from error
        raise
    finally:
        ended.set()
        beating.join()
        _give_back(lease)


def _beat_until(lease: Lease, ended: threading.Event, interrupt: bool) -> None:
    while not ended.wait(lease.beat_s):
        try:
            lease.beat()
        except LeaseLostError:
            main = threading.main_thread().ident
            if interrupt and not ended.is_set() and main is not None:
                signal.pthread_kill(main, signal.SIGINT)
            return
        except storage.StorageError:
            continue  # nobody else can read it either; workers store nothing now


def _give_back(lease: Lease) -> None:
    try:
        lease.release()
    except (LeaseLostError, storage.StorageError) as error:
        say(f"  {lease.url} was not given back ({error}); the next job waits for {lease.silence_s:.0f} s of silence")
