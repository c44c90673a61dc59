"""Run every command that README.md and docs/ show, shortened: `make docs-check`.

1. Each command of a page must be in a row of docs/tools/commands.py, each row on a page.
2. The tree is copied to a scratch folder, a stack of its own is started there, and small data are made up.
3. The rows run in their order, as a person would type them. The output of those that fail is shown at the end.

`ARGS="--only TEXT"` runs rows that contain a text, `--quick` those that need no server, `--list` shows the table.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from docs.tools.commands import ROWS, Row
from docs.tools.shown import Shown, commands_of
from infra.processes import choose_port

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900
_OUTPUT_SHOWN = 6000  # characters
# Set-up was done by `make docs-check` itself; the copy shares its .venv.
_PREAMBLE = """
make() { command make --old-file=.venv/.installed --old-file=.venv/.installed-parts "$@"; }
source .venv/bin/activate
"""


class DocsError(Exception):
    """A command fails; the message is what it printed."""


def pages() -> list[Path]:
    """README and all pages of docs/, but for the log: it is a diary."""
    return [ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "LOG.md")]


def shown_commands() -> list[Shown]:
    """Every command of every page."""
    return [shown for page in pages() for shown in commands_of(ROOT, page)]


def row_of(shown: Shown) -> Row | None:
    """The row of a command."""
    key = shown.text.splitlines()[0] if shown.python else shown.text
    return next((row for row in ROWS if row.shown == key), None)


def faults() -> list[str]:
    """Commands without a row, rows without a command, and rows whose test does not exist."""
    commands = shown_commands()
    found = [
        f"{item.page}:{item.line} shows `{item.text.splitlines()[0]}`" for item in commands if row_of(item) is None
    ]
    used = {id(row_of(item)) for item in commands}
    stale = [f"no page shows `{row.shown}`" for row in ROWS if id(row) not in used]
    gone = [
        f"{row.by}, which runs `{row.shown}`, does not exist"
        for row in ROWS
        if row.by and not (ROOT / row.by).is_file()
    ]
    return found + stale + gone


def typed(row: Row, python: str = "") -> str:
    """What is run for a row; `python` is the block of a row that is one."""
    text = python or row.shown
    for placeholder, real in row.replace.items():
        text = text.replace(placeholder, real)
    if python:
        return f"python - <<'END_OF_BLOCK'\n{row.before}\n{text}\nEND_OF_BLOCK"
    if row.also and text.startswith("make "):
        text = f'{text[:-1]} {row.also}"' if text.endswith('"') else f'{text} ARGS="{row.also}"'
    elif row.also:
        text = f"{text} {row.also}"
    return f"{row.before}\n{text}" if row.before else text


class Bench:
    """A copy of the tree with a stack of its own.

    Attributes:
        root: scratch folder, with `tree`, the stack's `state`, and made-up data in `work`.
        port: a free one, for servers.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.tree, self.port = root, root / "tree", str(choose_port(set()))
        outside = ("METEOR_", "RAY_", "MLFLOW_", "AWS_")
        self._env = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
        self._env |= {"METEOR_STATE_DIR": str(root / "state"), "WORK": str(root / "work"), "PORT": self.port}

    def copy(self) -> None:
        """Copy what git knows or would know, and link the environment."""
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        )  # fmt: skip
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                target = self.tree / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        (self.tree / ".venv").symlink_to((ROOT / ".venv").resolve())
        (self.root / "work").mkdir()

    def run(self, command: str, needs_stack: bool) -> None:
        """Run a command as a person would type it.

        Raises:
            DocsError: if it fails, or does not end.
        """
        log = self.root / "command.log"  # a file: servers that stay would keep a pipe open
        with log.open("w") as stream:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", self._script(command, needs_stack)],
                cwd=self.tree, env=self._env, timeout=TIMEOUT_S, stdout=stream, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if done.returncode:
            raise DocsError(f"exit status {done.returncode}\n{log.read_text()[-_OUTPUT_SHOWN:]}")

    def serve(self, command: str, address: str) -> None:
        """Start a server, wait until its address answers, stop what was started."""
        address = address.replace("$PORT", self.port)
        log = self.root / "server.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", self._script(command, True)],
                cwd=self.tree, env=self._env, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not _answers(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise DocsError(f"{address} does not answer\n{log.read_text()[-_OUTPUT_SHOWN:]}")
                time.sleep(1)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)

    def _script(self, command: str, needs_stack: bool) -> str:
        addresses = 'eval "$(python -m infra.local env)"\n' if needs_stack and not command.startswith("make ") else ""
        return f"{_PREAMBLE}{addresses}{command}"

    def start(self) -> None:
        """Start the stack, and make the data that the rows ask for."""
        self.run("make up", False)
        self.run("python -m docs.tools.data", True)

    def stop(self) -> None:
        """Stop the stack and forget its data."""
        self.run("python -m infra.local down --purge", False)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def check(rows: Sequence[Row]) -> list[str]:
    """Run rows, each whether or not the ones before it worked; what is wrong with those that failed."""
    blocks = {shown.text.splitlines()[0]: shown.text for shown in shown_commands() if shown.python}
    failed = []
    with tempfile.TemporaryDirectory(prefix="meteor-docs-") as folder:
        bench = Bench(Path(folder))
        bench.copy()
        served = any(not row.quick for row in rows)
        try:
            if served:
                bench.start()
            for row in rows:
                failed += _run(bench, row, typed(row, blocks.get(row.shown, "")))
        finally:
            if served:
                bench.stop()
    return failed


def _run(bench: Bench, row: Row, command: str) -> list[str]:
    print(f"$ {row.shown}", flush=True)
    began = time.monotonic()
    try:
        if row.until:
            bench.serve(command, row.until)
        else:
            bench.run(command, not row.quick)
    except (DocsError, subprocess.TimeoutExpired) as error:
        print(f"  failed: {str(error).splitlines()[-1]}", flush=True)
        return [f"`{row.shown}` failed, run as\n{command}\n{error}"]
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 every command works, 1 one does not, or is in no row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="rows that contain one of these texts")
    parser.add_argument("--quick", action="store_true", help="rows that need no server")
    parser.add_argument("--all", action="store_true", help="also rows that take a quarter of an hour and more")
    parser.add_argument("--list", action="store_true", help="show what would run")
    options = parser.parse_args(arguments)
    if found := faults():
        print("\n".join(["error: docs/tools/commands.py and the pages disagree:", *found]), file=sys.stderr)
        return 1
    rows = [row for row in ROWS if not row.by and (row.quick or not options.quick) and (options.all or not row.slow)]
    rows = [
        row for row in rows if not options.only or any(re.search(re.escape(text), row.shown) for text in options.only)
    ]
    if options.list:
        print("\n".join(f"{row.shown}\n    {row.by or typed(row).splitlines()[-1]}" for row in rows))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the stack is stopped then, too
    if failed := check(rows):
        print("\n\n".join([*failed, f"error: {len(failed)} of {len(rows)} commands failed"]), file=sys.stderr)
        return 1
    print(f"{len(rows)} commands of the pages ran", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
