"""What a person sees of a job: its own lines on the terminal, and everything that others print in a log file.

1. redirect   both standard streams of the driver process become a log file: what Python, native code and child
              processes write, and what Ray forwards from other processes, goes there
2. mark       lines for people begin with a mark: those of the driver (`say`), those of any other process of the job
              (`say_from_worker`), and warnings of this project's loggers; a process that does the driver's work
              elsewhere hands its lines over (`handing_over`), and the driver shows them (`show`)
3. follow     a thread reads the log as it grows and shows the marked lines on the terminal; a progress line is a bar
              there, and one line among others where the output is no terminal
4. redact     secrets are hidden in marked lines as they are written, and in the whole log when the job ends: what
              libraries and native code write reaches the file first

The log is a plain file, so nothing blocks on a reader, and a process that is killed leaves all it said. Until the job
ends its owner alone can read it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from pipelines.io.redact import redact_text

MARK = "[meteor]"
LOG_FOLDER_VARIABLE = "METEOR_LOG_DIR"
LOGGERS = ("pipelines", "tune", "meteor_model")
"""Loggers whose warnings concern the user."""
POLL_S = 0.1
CLOSE_S = 30.0
"""Seconds for the last lines to be shown: a terminal that takes none does not hold the job."""
PROGRESS_LINES = 12
"""Where the output is no terminal, about as many lines tell how far a job is; a slow one tells more."""
PROGRESS_EVERY_S = 60.0
"""A line is shown at the latest after so long."""
_MARKED = re.compile(r"\[meteor(?: (?P<done>\d+)/(?P<total>\d+))?\] ?(?P<text>.*)")

_ROOT = Path(__file__).resolve().parents[2]


class _Lines(Protocol):
    """What takes marked lines."""

    def write(self, text: str) -> None: ...


_open: _Lines | None = None


def say(text: str) -> None:
    """Show lines to the person who started the job; for the driver."""
    if _open is None:
        print(redact_text(text), flush=True)
    else:
        _open.write(_marked(text))


def progress(done: int, total: int, text: str) -> None:
    """Show how far the job is, in place of the progress line before where there is a terminal; for the driver."""
    if _open is None:
        print(redact_text(text), flush=True)
    else:
        _open.write(_marked(text, _progress_mark(done, total)))


def say_from_worker(text: str) -> None:
    """Show lines to the person who started the job; for any process of the job but its driver."""
    _write_to_stdout(_marked(text))


def progress_from_worker(done: int, total: int, text: str) -> None:
    """The same as `progress`, for any process of the job but its driver."""
    _write_to_stdout(_marked(text, _progress_mark(done, total)))


@dataclass(frozen=True)
class _Handed:
    """Gives marked lines to a function."""

    put: Callable[[str], None]

    def write(self, text: str) -> None:
        self.put(text)


@contextmanager
def handing_over(put: Callable[[str], None]) -> Iterator[None]:
    """Inside the block, in a process that does the driver's work elsewhere, `put` is given all that concerns people.

    Args:
        put: takes marked lines, for the driver to `show`.
    """
    global _open
    before, _open = _open, _Handed(put)
    handler = _show_warnings(say)
    try:
        with _python_warnings_shown():
            yield
    finally:
        _open = before
        _hide_warnings(handler)


def show(marked: str) -> None:
    """Show what another process handed over; for the driver."""
    if _open is None:
        sys.stdout.write(_MARKED.sub(lambda found: found["text"], marked))
        sys.stdout.flush()
    else:
        _open.write(marked)


def _progress_mark(done: int, total: int) -> str:
    return f"{MARK[:-1]} {done}/{total}]"


def _write_to_stdout(text: str) -> None:
    # Not print: Ray Train replaces it by one that shows every line twice.
    sys.stdout.write(text)
    sys.stdout.flush()


def _marked(text: str, mark: str = MARK) -> str:
    return "".join(f"{mark} {line}\n" for line in redact_text(text).split("\n"))


class _Warnings(logging.Handler):
    """Shows this project's own warnings."""

    def __init__(self, tell: Any) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(f"  {record.levelname.lower()}: {record.getMessage()}")


def warn_from_worker() -> None:
    """Let this project's warnings reach the terminal; for any process of the job but its driver."""
    _show_warnings(say_from_worker)


@contextmanager
def _python_warnings_shown() -> Iterator[None]:
    """Inside the block, what this project's code is warned of by `warnings.warn` is shown; the rest is logged."""
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning and Path(filename).is_relative_to(_ROOT):
            say(f"  warning: {message}")
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


def _show_warnings(tell: Any) -> logging.Handler:
    """The handler of this project's warnings, in place of an earlier one."""
    handler = _Warnings(tell)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [known for known in logger.handlers if not isinstance(known, _Warnings)] + [handler]
    return handler


def _hide_warnings(handler: logging.Handler) -> None:
    """Take back what `_show_warnings` gave."""
    for name in LOGGERS:
        logging.getLogger(name).removeHandler(handler)


@dataclass
class _Shown:
    """The progress line that was shown last.

    Attributes:
        share: twelfth of the whole that it told of.
        at: when it was shown.
    """

    share: int = -1
    at: float = 0.0

    def is_next(self, done: int, total: int, now: float) -> bool:
        """Whether to show a line now; it is then the last one shown. One that goes back is of another start."""
        share = done * PROGRESS_LINES // max(1, total)
        if share == self.share and now - self.at < PROGRESS_EVERY_S:
            return False
        self.share, self.at = share, now
        return True


class Console:
    """The terminal and the log file of a job.

    Attributes:
        log: path of the log file.
    """

    def __init__(self, log: Path, terminal: TextIO) -> None:
        self.log = log
        self._terminal = terminal
        self._began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        self._file = log.open("ab", buffering=0)
        self._copies: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="console", daemon=True)
        self._bar: Any = None
        self._shown = _Shown()
        self._thread.start()

    def fileno(self) -> int:
        """Descriptor of the log file."""
        return self._file.fileno()

    def write(self, text: str) -> None:
        """Append to the log file."""
        self._file.write(text.encode("utf-8", "replace"))

    def keep_at(self, url: str) -> None:
        """Have the log, without secrets, copied to a folder in storage when the job ends."""
        self._copies.append(url)

    def close(self) -> None:
        """Store the copies, show what is still to be shown, and leave a log without secrets."""
        for url in self._copies:
            self._store(url)
        self._ended.set()
        self._thread.join(CLOSE_S)
        self._close_bar()
        self._file.close()
        said = self.log.read_text("utf-8", "replace")
        if (shown := redact_text(said)) != said:
            partial = self.log.with_name(f".{self.log.name}.partial")
            partial.touch(0o600)
            partial.write_text(shown, "utf-8")
            partial.replace(self.log)

    def _store(self, folder: str) -> None:
        from pipelines.io import storage  # here: jobs that keep no log need no storage

        url = storage.join(folder, f"{self._began}-{self.log.name}")
        try:
            storage.write_bytes(url, redact_text(self.log.read_text("utf-8", "replace")).encode(), retry_s=10)
        except ValueError as error:
            self.write(_marked(f"  warning: the log is not kept with the run: {error}"))

    def _follow(self) -> None:
        rest = b""
        with self.log.open("rb") as log:
            while True:
                ended = self._ended.is_set()
                rest += log.read()
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    self._show(line.decode("utf-8", "replace"))
                if ended:
                    self._show(rest.decode("utf-8", "replace"))
                    return
                self._ended.wait(POLL_S)

    def _show(self, line: str) -> None:
        found = _MARKED.search(line)
        if found is None:
            return
        with suppress(OSError):  # the terminal is gone; the log goes on
            if found["done"]:
                done, total = int(found["done"]), int(found["total"])
                if self._terminal.isatty():
                    self._show_bar(done, total, found["text"])
                    return
                if not self._shown.is_next(done, total, time.monotonic()):
                    return
            self._close_bar()
            self._terminal.write(found["text"] + "\n")
            self._terminal.flush()

    def _show_bar(self, done: int, total: int, text: str) -> None:
        from tqdm import tqdm  # here: most jobs show none

        if self._bar is None:
            self._bar = tqdm(
                total=total,
                initial=done,
                file=self._terminal,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}  {desc}",
            )
        self._bar.n = done
        self._bar.set_description_str(text)
        if done == total:
            self._close_bar()

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def keep_log(url: str) -> None:
    """Have the job's log, where it has one, copied without secrets to a folder in storage when the job ends."""
    if isinstance(_open, Console):
        _open.keep_at(url)


def default_log(job: str) -> Path:
    """A new log file's path: in METEOR_LOG_DIR, or in a folder of the user's own among the temporary files."""
    folder = os.environ.get(LOG_FOLDER_VARIABLE) or Path(tempfile.gettempdir(), f"meteor-logs-{os.getuid()}")
    return Path(folder, f"{job}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log")


@contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Inside the block only marked lines reach the terminal; both standard streams are the log file, made anew.

    Args:
        log: path of the log file.

    Raises:
        OSError: the log file cannot be written.
    """
    global _open
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    log.write_bytes(b"")
    log.chmod(0o600)
    before, streams = _open, (sys.stdout, sys.stderr)
    _flush()
    kept = [os.dup(1), os.dup(2)]
    with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace", newline="\n") as terminal:
        _open = console = Console(log, terminal)
        handler = _show_warnings(say)
        for descriptor in (1, 2):
            os.dup2(console.fileno(), descriptor)
        # Where something else stands in for them, as a test's capture does, the descriptors are not enough.
        sys.stdout, sys.stderr = _line_by_line(1), _line_by_line(2)
        try:
            with _python_warnings_shown():
                yield console
        finally:
            _flush()
            sys.stdout, sys.stderr = streams
            _flush()
            console.close()
            for descriptor, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
            _open = before
            _hide_warnings(handler)


def _line_by_line(descriptor: int) -> TextIO:
    return open(descriptor, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError, OSError):
            stream.flush()
