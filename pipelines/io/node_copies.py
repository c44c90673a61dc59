"""One copy a node of what lies in storage, for all processes of the machine and for the next start of a job.

1. open    the first process brings the content and checks it, the others wait and take what is there
2. keep    a copy stays when the last process has closed it; its stamp says that it was checked, and is compared with
           the sizes and times of its files at the next opening
3. remove  `remove_copies` at the end of a job; else the least recently used go, once copies take more than
           `MOST_SHARE` of what the disk would have free without them, once they were not used for `UNUSED_S`, or when
           something else is to be written (`make_room`)

What a process has open is never removed: it holds a lock that ends with it. Copies of the temp folder of another
machine are not touched (`pipelines.io.node_locks`).

    meteor-copies-UID-MACHINE/
        KEY         the files
        KEY.whole   the stamp, written last
        KEY.users   locked, shared, by each process that has it open
        KEY.gate    locked by the one process that brings or removes it
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event, Thread

from pipelines.io import codec
from pipelines.io.console import say_from_worker
from pipelines.io.errors import StorageError
from pipelines.io.node_locks import alone, alone_or_not, machine, own_disk, try_lock

MOST_SHARE = 0.5
UNUSED_S = 24 * 3600.0
JOIN_S = 5.0
TELL_S = 60.0
"""Seconds between two lines on a copy that is being brought."""
_PREFIX = "meteor-copies"

FileState = tuple[int, int, int]
"""Bytes, and when content and entry of a file changed last, in ns."""


class _StampError(ValueError):
    """A stamp that cannot be read."""


@dataclass(frozen=True)
class Content:
    """What a copy is of.

    Attributes:
        key: of the content: address and digests.
        what: its address, for people, and for `remove_copies`.
        files: their paths.
        need: bytes.
        fill: writes the content to a folder, or checks it where it lies, and raises what is wrong with it.
        place: where the files are; None: in the copy's own folder.
    """

    key: str
    what: str
    files: Sequence[str]
    need: int
    fill: Callable[[Path], None]
    place: Path | None = None


@dataclass(frozen=True)
class _Stamp:
    what: str
    bytes: int
    files: dict[str, FileState]


@dataclass(frozen=True)
class _Entry:
    """The files of one copy."""

    root: Path
    key: str

    @property
    def folder(self) -> Path:
        return self.root / self.key

    @property
    def whole(self) -> Path:
        return self.root / f"{self.key}.whole"

    @property
    def partial(self) -> Path:
        return self.root / f"{self.key}.partial"

    @property
    def users(self) -> Path:
        return self.root / f"{self.key}.users"

    @property
    def gate(self) -> Path:
        return self.root / f"{self.key}.gate"

    def stamp(self) -> _Stamp | None:
        with suppress(FileNotFoundError, _StampError):
            return codec.decode(_Stamp, self.whole.read_bytes(), self.whole.name, _StampError)
        return None

    def used_at(self) -> float:
        """Seconds since the epoch."""
        for path in (self.whole, self.users, self.gate):
            with suppress(FileNotFoundError):
                return path.stat().st_mtime
        return 0.0

    def clear(self) -> None:
        for path in (self.whole, self.partial):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def remove(self) -> bool:
        """Remove it, unless a process has it open or works on it."""
        with alone_or_not(self.gate) as mine:
            if not mine:
                return False
            with self.users.open("w") as users:
                if not try_lock(users):
                    return False
                self.clear()
                self.users.unlink(missing_ok=True)
                self.gate.unlink(missing_ok=True)
                return True


@contextmanager
def open_copy(content: Content, keep: bool = True) -> Iterator[Path]:
    """A folder with this content, which all processes of this machine share.

    Args:
        content: what is in it.
        keep: whether it stays, while there is room, when the last process has closed it.

    Raises:
        StorageError: the temp folder knows no locks, or is not this user's.
        whatever `content.fill` raises.
    """
    root = _own_root()
    _sweep(root)
    entry = _Entry(root, content.key[:24])
    growth = _Growth(entry.folder, content)
    with alone(entry.gate, growth.look):
        using = entry.users.open("w")
        try:
            if not _is_whole(entry, content):
                _fill(entry, content, growth)
            locked = try_lock(using, shared=True)
            assert locked, "who wants it for itself must be inside the gate"
        except BaseException:
            using.close()
            raise
    try:
        yield content.place or entry.folder
    finally:
        with suppress(FileNotFoundError):
            os.utime(entry.whole)
        using.close()
        if not keep:
            entry.remove()
        _trim(root)


def remove_copies(address: str) -> int:
    """Remove this machine's copies of what lies below an address and no process has open; how many."""
    removed = 0
    for root in _roots():
        for entry in _entries(root):
            stamp = entry.stamp()
            below = stamp is not None and f"{stamp.what}/".startswith(f"{address.rstrip('/')}/")
            removed += below and entry.remove()
    return removed


def make_room(folder: Path, need: int) -> None:
    """Remove copies that no process has open, the least recently used first, until `need` bytes are free at `folder`.

    Nothing where copies lie on another disk.
    """
    for root in _roots():
        if root.stat().st_dev != folder.stat().st_dev:
            continue
        for entry in sorted(_entries(root), key=_Entry.used_at):
            if _free(folder) >= need:
                return
            entry.remove()


# ------------------------------------------------------------------------------------------------------------- helpers


def _is_whole(entry: _Entry, content: Content) -> bool:
    """Whether the copy was brought and checked, and none of its files has changed since."""
    stamp = entry.stamp()
    return stamp is not None and stamp.files == _states(content.place or entry.folder, content.files)


def _fill(entry: _Entry, content: Content, growth: _Growth) -> None:
    entry.clear()
    entry.folder.mkdir()
    try:
        with growth.told():
            content.fill(entry.folder)
    except BaseException:
        entry.clear()
        raise
    files = _states(content.place or entry.folder, content.files)
    size = 0 if content.place else sum(size for size, _, _ in files.values())
    entry.partial.write_text(json.dumps(asdict(_Stamp(content.what, size, files))))
    entry.partial.replace(entry.whole)


def _states(folder: Path, files: Sequence[str]) -> dict[str, FileState]:
    """Of the files that are there."""
    states: dict[str, FileState] = {}
    for name in files:
        with suppress(FileNotFoundError):
            status = (folder / name).stat()
            states[name] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return states


def _own_root() -> Path:
    """The folder of this machine's copies in its temp folder."""
    root = Path(tempfile.gettempdir()) / f"{_PREFIX}-{os.getuid()}-{machine()}"
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StorageError(f"{root} is another user's or no folder: remove it, or set TMPDIR to a folder of your own")
    return root


def _roots() -> list[Path]:
    """Folders of copies that this machine may remove something from: its own; all, where the disk is its alone.

    Those of others are of earlier boots, or of containers that have ended.
    """
    temp = Path(tempfile.gettempdir())
    mine = temp / f"{_PREFIX}-{os.getuid()}-{machine()}"
    if own_disk(temp):
        return [root for root in temp.glob(f"{_PREFIX}-{os.getuid()}-*") if root.is_dir() and not root.is_symlink()]
    return [mine] if mine.is_dir() else []


def _entries(root: Path) -> list[_Entry]:
    # Of a copy that is only just begun there is no more than its gate.
    return [_Entry(root, key) for key in sorted({path.name.partition(".")[0] for path in root.iterdir()})]


def _sweep(own: Path) -> None:
    """Remove what no process has used for long, and what killed ones left half brought."""
    for root in _roots():
        for entry in _entries(root):
            half = entry.stamp() is None
            if half or time.time() - entry.used_at() > UNUSED_S:
                entry.remove()
        if root != own:
            with suppress(OSError):  # not empty
                root.rmdir()


def _trim(root: Path) -> None:
    """Keep the copies within their share of the disk."""
    kept = {entry: found.bytes for entry in _entries(root) if (found := entry.stamp()) is not None}
    for entry in sorted(kept, key=_Entry.used_at):
        if sum(kept.values()) <= MOST_SHARE * (_free(root) + sum(kept.values())):
            return
        if entry.remove():
            kept.pop(entry)


def _free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


@dataclass
class _Growth:
    """How a copy grows that some process is bringing: a sign of life, and a line a minute."""

    folder: Path
    content: Content
    _seen: int = -1
    _told: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Note what has come since the last look."""
        from pipelines.io.pulse import pulse  # here: it loads Ray, which who only writes to the disk does not need

        now = self._bytes()
        if now != self._seen:
            self._seen = now
            pulse().gets_on()
        if time.monotonic() - self._told >= TELL_S:
            self._told = time.monotonic()
            say_from_worker(
                f"  {self.content.what} is brought to {machine()}: {max(0, now) / 1e9:.1f} of "
                f"{self.content.need / 1e9:.1f} GB"
            )

    @contextmanager
    def told(self) -> Iterator[None]:
        """Look every second while the block runs."""
        ended = Event()

        def follow() -> None:
            while not ended.wait(1.0):
                self.look()

        thread = Thread(target=follow, name="copy", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(JOIN_S)  # a look at a disk that hangs must not hold who has all it came for

    def _bytes(self) -> int:
        total = 0
        for path in self.folder.rglob("*"):
            with suppress(OSError):  # it is being renamed
                total += path.stat().st_size
        return total
