"""The model's tests under other releases of the libraries that it stands on: `make test-versions`.

Each row of the table is an environment of its own, made with pip from pyproject.toml and removed afterwards:

    locked            every package as constraints.txt has it
    LIBRARY-lowest    that library at the lower bound of pyproject.toml, the others locked
    LIBRARY-newest    that library at the newest release that pyproject.toml allows, the others locked
    newest            everything at the newest allowed release: what `pip install .` gives today
    transformers-ahead  the newest release of all, past the upper bound: says whether the bound can move

It needs Python alone, not the project's environment.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = "tests/meteor_model"
#: What the tests need beside the model.
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "peft", "matplotlib")
TEST_SECONDS = 3600

#: Packages that go to a bound together, and those that they take along: prefixes of names.
LIBRARIES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "transformers": (("transformers",), ("huggingface-hub", "hf-xet", "tokenizers", "typer")),
    "torch": (("torch", "torchvision"), ("cuda-", "nvidia-", "setuptools", "sympy", "triton")),
    "timm": (("timm",), ()),
    "peft": (("peft",), ("accelerate",)),
}


@dataclass(frozen=True)
class Row:
    """One environment.

    Attributes:
        name: says which library stands where.
        pins: requirements beside the project's own.
        moved: prefixes of the packages that constraints.txt does not hold here; "" is all of them.
        ahead: packages that are upgraded past the project's upper bounds at the end.
    """

    name: str
    pins: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    ahead: tuple[str, ...] = ()


def declared() -> dict[str, str]:
    """Lower bound by package, of everything that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    found = (re.match(r"([\w.-]+)>=([\d.]+)", requirement) for requirement in wanted)
    return {match[1]: match[2] for match in found if match}


def rows() -> dict[str, Row]:
    """The table, by name."""
    lowest = declared()
    table = [Row("locked")]
    for library, (packages, company) in LIBRARIES.items():
        moved = (*packages, *company)
        table.append(Row(f"{library}-lowest", tuple(f"{name}=={lowest[name]}" for name in packages), moved))
        table.append(Row(f"{library}-newest", (), moved))
    table.append(Row("newest", moved=("",)))
    table.append(Row("transformers-ahead", moved=("",), ahead=("transformers",)))
    return {row.name: row for row in table}


def constraints(row: Row) -> str:
    """constraints.txt without what this row moves."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return "".join(f"{line}\n" for line in lines if not canonical(line).startswith(row.moved or ("\0",)))


def canonical(name: str) -> str:
    """A package's name as the index spells it."""
    return name.lower().replace("_", "-")


def build(row: Row, folder: Path) -> Path:
    """Make the row's environment. Returns its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    held = folder / "constraints.txt"
    held.write_text(constraints(row))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--constraint", str(held), str(ROOT), *TOOLS, *row.pins], check=True)
    if row.ahead:
        subprocess.run([*pip, "--upgrade", *row.ahead], check=True)
    return python


def describe(python: Path) -> str:
    """The versions of the libraries in an environment."""
    names = [name for packages, _ in LIBRARIES.values() for name in packages]
    code = f"from importlib.metadata import version; print(*(n + ' ' + version(n) for n in {names!r}), sep=', ')"
    return subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def run_tests(python: Path, arguments: Sequence[str]) -> bool:
    """Run the model's tests; conftest.py of the whole tree starts servers and is left out."""
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={TESTS}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([*command, TESTS, *arguments], cwd=ROOT, env=environment, timeout=TEST_SECONDS, check=False)
    return done.returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Build and test the rows that are asked for. Returns 1 where one failed."""
    table = rows()
    parser = argparse.ArgumentParser(prog="make test-versions", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=sorted(table), default=list(table), help="rows (default: all)")
    parser.add_argument("--list", action="store_true", help="show the table and stop")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="further arguments for pytest, last")
    given = parser.parse_args(arguments)
    if given.list:
        for row in table.values():
            print(f"{row.name:20} {' '.join((*row.pins, *row.ahead)) or '-'}")
        return 0
    results: dict[str, str] = {}
    for name in given.only:
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"meteor-{name}-") as folder:
            try:
                python = build(table[name], Path(folder))
                versions = describe(python)
                print(f"\n== {name}: {versions}", flush=True)
                verdict = "passed" if run_tests(python, given.pytest) else "FAILED"
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                versions, verdict = str(error), "FAILED"
        results[name] = f"{verdict} in {time.monotonic() - started:.0f} s  {versions}"
    print()
    for name, result in results.items():
        print(f"{name:20} {result}")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
