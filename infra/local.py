"""The local stack on loopback: `python -m infra.local up | status | down | env | run -- COMMAND...`.

See infra/README.md. The functions behind the commands: up, down, status, running_stack, stack_env.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from infra.processes import StackError
from infra.services import (
    DEFAULT_NUM_CPUS,
    DEFAULT_OBJECT_STORE_BYTES,
    NAMES,
    Stack,
    full_env,
    overridden,
    stack_env,
)
from infra.stack import START_TIMEOUT_S, ServiceStatus, default_state_dir, down, running_stack, status, up

__all__ = ["ServiceStatus", "Stack", "StackError", "down", "main", "running_stack", "stack_env", "status", "up"]


def _say(line: str) -> None:
    print(line, flush=True)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def table(rows: list[ServiceStatus]) -> str:
    """The rows of `status` as aligned text."""
    cells = [("service", "address", "pid", "uptime", "health")]
    for row in rows:
        cells.append((row.title, row.address, str(row.pid or "-"), _duration(row.uptime_s), row.health))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m infra.local", description="Object store, MLflow and Ray on loopback."
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=default_state_dir(),
        help="data, logs, key pair (METEOR_STATE_DIR; %(default)s)",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    start = commands.add_parser("up", help="start what is missing, wait until all answers")
    start.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="start just these (default: all)")
    start.add_argument("--s3-port", type=int, help="S3 address (default: any free port, kept from then on)")
    start.add_argument("--mlflow-port", type=int, help="MLflow address (likewise)")
    start.add_argument("--dashboard-port", type=int, help="Ray dashboard and job address (likewise)")
    start.add_argument("--num-cpus", type=int, help=f"logical CPUs of the Ray head (default {DEFAULT_NUM_CPUS})")
    start.add_argument(
        "--object-store-bytes", type=int, help=f"shared memory of the Ray head (default {DEFAULT_OBJECT_STORE_BYTES})"
    )
    start.add_argument("--timeout", type=float, default=START_TIMEOUT_S, help="seconds to wait (%(default)s)")
    commands.add_parser("status", help="show the services; exit status 1 if one is missing")
    stop = commands.add_parser("down", help="stop all services; data stays")
    stop.add_argument("--purge", action="store_true", help="remove data, logs and credentials too")
    commands.add_parser("env", help="print the shell lines that point a program at the stack")
    run = commands.add_parser("run", help="run a command with that environment: run -- COMMAND...")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    return parser


def _up(arguments: argparse.Namespace) -> int:
    given = {"s3": arguments.s3_port, "mlflow": arguments.mlflow_port, "ray": arguments.dashboard_port}
    stack = up(
        arguments.state_dir,
        only=arguments.only,
        ports={name: port for name, port in given.items() if port is not None},
        num_cpus=arguments.num_cpus,
        object_store_bytes=arguments.object_store_bytes,
        timeout_s=arguments.timeout,
        say=_say,
    )
    _say(f"up. Logs: {stack.state_dir / 'logs'}. Run a program against it: python -m infra.local run -- COMMAND")
    return 0


def _env(stack: Stack) -> str:
    lines = [f"unset {name}" for name in overridden(stack)]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in stack_env(stack).items()]
    return "\n".join(lines)


def _run(arguments: argparse.Namespace) -> int:
    argv = arguments.argv[1:] if arguments.argv[:1] == ["--"] else arguments.argv
    if not argv:
        raise StackError("run: no command given; write `run -- COMMAND...`")
    env = full_env(running_stack(arguments.state_dir))
    try:
        os.execvpe(argv[0], argv, env)
    except OSError as error:
        raise StackError(f"run: cannot start {argv[0]}: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "up":
            return _up(arguments)
        if arguments.command == "status":
            rows = status(arguments.state_dir)
            _say(table(rows))
            return 0 if all(row.ok for row in rows) else 1
        if arguments.command == "down":
            down(arguments.state_dir, purge=arguments.purge, say=_say)
            return 0
        if arguments.command == "env":
            _say(_env(running_stack(arguments.state_dir)))
            return 0
        return _run(arguments)
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was starting has been stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
