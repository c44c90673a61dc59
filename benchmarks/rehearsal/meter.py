"""What a job takes while it runs, phase by phase: seconds, memory, temporary files, bytes on the network.

Memory is anonymous memory (RssAnon): what the kernel cannot drop. Mapped files, those of libraries and of weights, are
left out, since they are given back where memory is short; so is the object store, whose size is a setting of Ray.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

EVERY_S = 0.5
MIB = 2**20
_RAY_TITLE = re.compile(r"ray::(\w+)")
_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")


@dataclass
class Taken:
    """What one phase took.

    Attributes:
        seconds: wall-clock time.
        memory: peak of the sum over all processes, bytes.
        by_process: peak of a single process by its role, bytes.
        temp: peak of the temporary folder, bytes.
        network: bytes sent and received by server, as "store up" and "store down".
    """

    seconds: float = 0.0
    memory: int = 0
    by_process: dict[str, int] = field(default_factory=dict)
    temp: int = 0
    network: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """With MiB in place of bytes."""

        def mib(number: int) -> float:
            return round(number / MIB, 1)

        return {
            "seconds": round(self.seconds, 1),
            "peak_memory_mib": mib(self.memory),
            "peak_memory_of_a_process_mib": {role: mib(size) for role, size in sorted(self.by_process.items())},
            "peak_temp_mib": mib(self.temp),
            "network_mib": {way: mib(size) for way, size in self.network.items()},
        }


class Meter(threading.Thread):
    """Looks at the processes of a folder of temporary files until it is stopped.

    Args:
        temp: TMPDIR of every process that belongs to the rehearsal is this folder, or one in it.
        traffic: bytes sent and received so far, by server.
    """

    def __init__(self, temp: Path, traffic: Mapping[str, Callable[[], tuple[int, int]]]) -> None:
        super().__init__(name="meter", daemon=True)
        self.phases: dict[str, Taken] = {}
        self._temp, self._traffic = temp, traffic
        self._mine: dict[tuple[int, float], bool] = {}
        self._name, self._began, self._before = "start", time.monotonic(), self._sent()
        self._lock, self._ended = threading.Lock(), threading.Event()

    def run(self) -> None:
        """Look every half second."""
        while not self._ended.wait(EVERY_S):
            self._look()

    def phase(self, name: str) -> None:
        """A phase begins, and the one before ends."""
        self._look()
        with self._lock:
            self._close()
            self._name, self._began, self._before = name, time.monotonic(), self._sent()

    def stop(self) -> dict[str, Taken]:
        """What every phase took."""
        self._ended.set()
        self.join()
        with self._lock:
            self._close()
        return self.phases

    def _close(self) -> None:
        taken = self.phases.setdefault(self._name, Taken())
        taken.seconds += time.monotonic() - self._began
        sent = self._sent()
        for way, total in sent.items():
            taken.network[way] = taken.network.get(way, 0) + total - self._before[way]

    def _sent(self) -> dict[str, int]:
        found = {}
        for server, counts in self._traffic.items():
            found[f"{server} up"], found[f"{server} down"] = counts()
        return found

    def _look(self) -> None:
        sizes = Counter[str]()
        largest: dict[str, int] = {}
        for process in self._members():
            try:
                size, role = anonymous_bytes(process.pid), role_of(process)
            except (OSError, psutil.Error):
                continue  # it has ended
            sizes[role] += size
            largest[role] = max(largest.get(role, 0), size)
        temp = folder_bytes(self._temp)
        with self._lock:
            taken = self.phases.setdefault(self._name, Taken())
            taken.memory = max(taken.memory, sizes.total())
            taken.temp = max(taken.temp, temp)
            for role, size in largest.items():
                taken.by_process[role] = max(taken.by_process.get(role, 0), size)

    def _members(self) -> Iterator[psutil.Process]:
        for process in psutil.process_iter():
            try:
                key = (process.pid, process.create_time())
                if key not in self._mine:
                    self._mine[key] = Path(process.environ().get("TMPDIR", "/")).is_relative_to(self._temp)
            except (psutil.Error, OSError):
                continue
            if self._mine[key]:
                yield process


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process. Raises OSError where it has ended."""
    found = _ANONYMOUS.search(Path(f"/proc/{pid}/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def role_of(process: psutil.Process) -> str:
    """The job, the name of a Ray task or actor, or the program of any other process."""
    line = process.cmdline()
    if line and (title := _RAY_TITLE.match(line[0])):
        return f"ray::{title.group(1)}"
    for word in line[1:3]:
        if "jobs/" in word:
            return Path(word).stem
    return process.name()


def folder_bytes(folder: Path) -> int:
    """Bytes on disk of all files in a folder; sparse files count what they hold."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
            except OSError:
                continue  # it was removed
    return total
