"""Processes, ports and private files of the local stack: everything that does not know which service it serves.

A service is one process tree whose leader this module started in a session of its own. A record file remembers the
leader by pid AND start time AND boot, so that a recycled pid is never taken for it; a tag in the environment
finds the members of a tree whose leader has died.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

TAG_VARIABLE = "METEOR_SERVICE"
# Below the kernel's range for outgoing connections (32768 up): a chosen port is not taken between choice and bind.
PORT_RANGE = range(20000, 30000)
START_TIME_TOLERANCE_S = 1.0
RENAMED_TITLES = ("ray::", "ray-dashboard-")
POLL_S = 0.1


class StackError(RuntimeError):
    """Something about the local stack that the user can act on: it names the service or file and what to do."""


class PortInUseError(StackError):
    """A port that was asked for explicitly is taken by another process."""


@dataclass(frozen=True)
class Record:
    """What is remembered of a started service: its leader process, and what it was started with.

    `create_time` is seconds since the epoch (psutil); `boot_id` identifies the boot of the machine; `settings` are the
    addresses and sizes it was given, to tell whether it still fits its neighbours. `pid` 0 means that no pid file was
    found: such a record matches processes by their tag alone.
    """

    service: str
    pid: int
    create_time: float
    boot_id: str
    tag: str
    ports: dict[str, int] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def has_leader(self) -> bool:
        """False for "no pid file". 0 and 1 are never ours: session 0 holds the kernel's threads and init's helpers."""
        return self.pid > 1


def boot_id() -> str:
    """Identifier of this boot of the machine; empty where the kernel gives none."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def write_private(path: Path, text: str) -> None:
    """Write `text` so that only the owner can ever read it (0600), in one step: readers see the old or the new file."""
    partial = path.with_name(path.name + ".partial")
    with contextlib.suppress(FileNotFoundError):
        partial.unlink()
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(text)
    partial.replace(path)


def write_record(path: Path, record: Record) -> None:
    """Store `record` as JSON at `path`, private to the owner."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(path, json.dumps(asdict(record), indent=1) + "\n")


def read_record(path: Path) -> Record | None:
    """The record at `path`, or None where there is none or an interrupted write left something unreadable."""
    try:
        record = Record(**json.loads(path.read_text()))
        return record if record.has_leader and record.tag else None
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return None


def lost_record(service: str, tag: str) -> Record:
    """The record of a service without a pid file: it finds what still carries `tag`, and nothing else."""
    return Record(service, 0, 0.0, boot_id(), tag)


def is_alive(process: psutil.Process) -> bool:
    """True while the process exists and is no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _tag_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(TAG_VARIABLE)
    except (psutil.Error, OSError):
        return None


def leader(record: Record) -> psutil.Process | None:
    """The live leader process of `record`, or None: gone, a zombie, or the pid now belongs to somebody else."""
    if record.boot_id != boot_id() or not record.has_leader:
        return None
    try:
        process = psutil.Process(record.pid)
        created = process.create_time()
    except psutil.NoSuchProcess:
        return None
    # A clock that was set shifts every start time; the tag in the environment is the second witness.
    same = abs(created - record.create_time) <= START_TIME_TOLERANCE_S or _tag_of(process) == record.tag
    return process if same and is_alive(process) else None


def members(record: Record) -> list[psutil.Process]:
    """Every live process of the service: leader, descendants, and orphans known by their tag.

    This process and its ancestors are never among them.
    """
    if record.boot_id != boot_id():
        return []
    spared = {0, 1, os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    head = leader(record)
    found: dict[int, psutil.Process] = {}
    if head is not None:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = {process.pid: process for process in [head, *head.children(recursive=True)]}
    # A live stranger under the leader's pid means that the number was recycled: its session is not ours.
    own_session = record.has_leader and (
        head is not None or not psutil.pid_exists(record.pid) or _is_zombie(record.pid)
    )
    for process in psutil.process_iter():
        if process.pid not in found and _belongs(process, record, own_session):
            found[process.pid] = process
    return [process for pid, process in found.items() if pid not in spared and is_alive(process)]


def _is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _belongs(process: psutil.Process, record: Record, own_session: bool) -> bool:
    tag = _tag_of(process)
    if tag is not None or not own_session:
        return tag is not None and tag == record.tag
    # Ray's helpers rename themselves over their environment, tag included: session, age and title together tell them.
    try:
        return (
            os.getsid(process.pid) == record.pid
            and process.create_time() >= record.create_time - START_TIME_TOLERANCE_S
            and "".join(process.cmdline()[:1]).startswith(RENAMED_TITLES)
        )
    except (psutil.Error, OSError):
        return False


def spawn(service: str, command: list[str], env: dict[str, str], log: Path, cwd: Path, tag: str) -> tuple[int, Record]:
    """Start `command` in its own session, output in `log` (the log before is kept as `.1`); returns pid and record."""
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
        child = subprocess.Popen(
            command,
            env={**env, TAG_VARIABLE: tag},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            start_new_session=True,
        )
    child.returncode = 0  # it outlives this process on purpose: no warning at garbage collection
    return child.pid, Record(service, child.pid, psutil.Process(child.pid).create_time(), boot_id(), tag)


def reap(pid: int) -> None:
    """Collect the exit status of a child of ours that has ended, so that it does not stay a zombie."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def stop(record: Record, grace_s: float, leader_first_s: float = 0.0) -> list[str]:
    """End every process of the service: SIGTERM, after `grace_s` seconds SIGKILL, then verify.

    `leader_first_s` > 0 gives the leader that long to bring its own children down before the others are told. Returns
    descriptions of the processes that were there. Raises StackError when something survives SIGKILL.
    """
    head = leader(record)
    present = members(record)
    described = [f"{process.pid} ({_name(process)})" for process in present]
    if head is not None and leader_first_s > 0:
        _signal([head], kill=False)
        _wait_gone(record, leader_first_s)
    remaining = members(record)
    _signal(remaining, kill=False)
    if not _wait_gone(record, grace_s):
        _signal(members(record), kill=True)
        if not _wait_gone(record, 10.0):
            left = ", ".join(f"{process.pid} ({_name(process)})" for process in members(record))
            raise StackError(f"{record.service}: processes {left} do not end even when killed; end them by hand")
    return described


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return "gone"


def _signal(processes: Iterable[psutil.Process], kill: bool) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if kill:
                process.kill()
            else:
                process.terminate()


def _wait_gone(record: Record, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        reap(record.pid)
        if not members(record):
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)


def port_free(port: int) -> bool:
    """True if a server could listen on this loopback port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def port_owner(port: int) -> str:
    """'pid 123 (name)' of the process that listens on `port`, or 'another process' where that cannot be told."""
    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return "another process"
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            with contextlib.suppress(psutil.NoSuchProcess):
                return f"pid {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"


def choose_port(taken: set[int], offset: int = 0) -> int:
    """A free port outside `taken`; with `offset`, port + offset is free too. Raises StackError if none is found."""
    for _ in range(200):
        port = random.choice(PORT_RANGE[: len(PORT_RANGE) // 4] if offset else PORT_RANGE)
        wanted = {port, port + offset}
        if not wanted & taken and all(port_free(candidate) for candidate in wanted):
            return port
    raise StackError(f"no free port found between {PORT_RANGE.start} and {PORT_RANGE.stop}; stop some servers")


@contextlib.contextmanager
def exclusive(path: Path, timeout_s: float, what: str) -> Iterator[None]:
    """Hold the lock file `path`; the kernel frees it when its holder dies. StackError after `timeout_s` of waiting."""
    deadline = time.monotonic() + timeout_s
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = stream.read().strip() or "unknown"
                    raise StackError(
                        f"{what} waited {timeout_s:.0f} s for another command on this stack (pid {holder}); "
                        "wait for it to end, or end it, then try again"
                    ) from None
                time.sleep(POLL_S)
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, indented for an error message; a placeholder where there is nothing."""
    try:
        text = path.read_bytes()[-20000:].decode(errors="replace")
    except FileNotFoundError:
        return "    (no log)"
    kept = [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
    return "\n".join(f"    {line}" for line in kept) or "    (the log is empty)"
