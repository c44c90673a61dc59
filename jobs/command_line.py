"""The command line of every job: one parser, one grammar, one way to say what is wrong.

Exit status: 0 it is done; 2 the input is wrong, found before Ray or a server is asked; 1 it failed; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from pipelines.io import console
from pipelines.io.redact import redact_text

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130
SHOWN_FRAMES = 3
"""Innermost calls that are shown of an error that nobody foresaw; the log has all."""

S = TypeVar("S")


@dataclass(frozen=True)
class _Line(Generic[S]):
    settings: Annotated[S, tyro.conf.arg(name="")]
    verbose: bool = False
    """Show everything that libraries and workers print, too, and write no log file."""


@dataclass(frozen=True)
class Job(Generic[S]):
    """A job of this folder.

    Attributes:
        name: of its file, without `.py`.
        settings: a dataclass, or a union of subcommands.
        run: what it does; a number that it returns is the exit status. ValueErrors are messages for the user.
        description: for `--help`; the first line says what the job does.
        check: what can be wrong with the settings before anything is started or asked; raises ValueError.
        needs_ray: Ray is connected to before `run`, and left after it.
        defaults: settings whose values are the defaults, chosen by the arguments.
        log: where the log file shall be, if not among the others.
        passes_on: what it prints is another program's: all of it is shown, and there is no log file.
    """

    name: str
    settings: Any
    run: Callable[[S], object]
    description: str
    check: Callable[[S], object] | None = None
    needs_ray: bool = False
    defaults: Callable[[Sequence[str]], S] | None = None
    log: Callable[[S], Path | None] | None = None
    passes_on: bool = False

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the job from its command line; the exit status."""
        try:
            line = self._parse(list(sys.argv[1:] if arguments is None else arguments))
            if self.check is not None:
                self.check(line.settings)
        except ValueError as error:
            return _say_error(str(error), WRONG_INPUT)
        except BrokenPipeError:  # `--help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return FAILED
        try:
            if line.verbose or self.passes_on:
                return self._work(line.settings)
            log = self.log(line.settings) if self.log is not None else None
            return self._work_quietly(line.settings, log or console.default_log(self.name))
        except KeyboardInterrupt:
            return _say_error("interrupted", INTERRUPTED)
        except Exception as error:
            return _say_error(_cause(error), FAILED)

    def parse(self, arguments: Sequence[str]) -> S:
        """The settings that a command line asks for.

        Raises:
            ValueError: what is wrong; an unknown setting comes with the nearest.
            SystemExit: help or a completion script was asked for and is printed.
        """
        return self._parse(arguments).settings

    def _parse(self, arguments: Sequence[str]) -> _Line[S]:
        given: dict[str, Any] = {}
        if self.defaults is not None:
            given["default"] = _Line(self.defaults(arguments))
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                line: _Line[S] = tyro.cli(
                    _Line[self.settings],  # type: ignore[name-defined]
                    args=list(arguments),
                    prog=f"{self.name}.py",
                    description=self.description,
                    config=(tyro.conf.AvoidSubcommands if self.defaults else tyro.conf.CascadeSubcommandArgs,),
                    **given,
                )
        except SystemExit as stop:
            if not stop.code:
                raise  # help, or a completion script
            raise ValueError(_without_frame(said.getvalue())) from None
        except AssertionError as error:  # of the parser, for a shell that it does not know
            raise ValueError(str(error)) from None
        return line

    def _work(self, settings: S) -> int:
        with _connected() if self.needs_ray else contextlib.nullcontext():
            status = self.run(settings)
        return status if isinstance(status, int) else DONE

    def _work_quietly(self, settings: S, log: Path) -> int:
        """Without `log` where it would only hold that a short job went well."""
        try:
            with console.quiet(log):
                try:
                    if self.needs_ray:
                        console.say(f"  {'log':<14} {log}")
                    status = self._work(settings)
                except BaseException:
                    sys.stderr.write(redact_text(traceback.format_exc()))
                    raise
        except Exception as error:
            return _say_error(f"{_cause(error)}\nlog: {log}", FAILED)
        if not self.needs_ray:
            log.unlink()
        return status


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    """Connected to Ray inside the block; a connection that was there stays."""
    import ray  # here: a second, which jobs on one machine and --help do not need

    if ray.is_initialized():
        yield
        return
    context = ray.init(logging_level="WARNING")
    try:
        if context.dashboard_url:
            console.say(f"  {'Ray dashboard':<14} http://{context.dashboard_url}")
        yield
    finally:
        ray.shutdown()  # here, inside the log: what is left of the workers' output comes now


def _say_error(message: str, status: int) -> int:
    print(f"error: {redact_text(message)}", file=sys.stderr, flush=True)
    return status


def _cause(error: Exception) -> str:
    """The message of an error that was foreseen; of any other its type, its message, and where it came from."""
    if isinstance(inner := getattr(error, "cause", None), Exception):
        return _cause(inner)  # of a task: Ray's own text is the other process's whole traceback
    if isinstance(error, ValueError) or type(error).__module__.startswith(("pipelines.", "tune.", "meteor_model.")):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)[-SHOWN_FRAMES:]
    where = "".join(f"\n  {frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
    return f"{type(error).__name__}: {error}{where}"


def _without_frame(text: str) -> str:
    """A message of the parser without the box that is drawn around it."""
    lines = [line.strip("│").rstrip() for line in text.splitlines()]
    kept = [line.removeprefix(" ") for line in lines if line and not line.startswith(("╭", "╰")) and "───" not in line]
    return "\n".join(kept).replace("settings.settings", "settings")


def chosen(arguments: Sequence[str], option: str, default: str) -> str:
    """Value of one option, told before the others can be parsed: it chooses their defaults."""
    for place, word in enumerate(arguments):
        if word == option and place + 1 < len(arguments):
            return arguments[place + 1]
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return default
