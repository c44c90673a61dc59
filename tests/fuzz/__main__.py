"""Fuzz the readers of foreign bytes: `make fuzz ARGS="--seconds 600 --seed 7 --only tar image"`.

Each target runs in a process of its own, one after the other. Equal seeds give equal inputs. What is found is stored
under --found; when it is mended, its file moves to tests/fuzz/corpus/, which every test run reads.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from tests.fuzz.run import HANG_S, Outcome, cases, fuzz, keep
from tests.fuzz.targets import TARGETS


def _child(name: str, seed: int, seconds: float, current: Path, results: Connection) -> None:
    target = TARGETS[name]
    results.send(fuzz(target, cases(target, f"{name}/{seed}", seconds), current))


def run_target(name: str, seed: int, seconds: float) -> Outcome:
    """What became of a target's inputs; an input that ended the process is among those found."""
    context = multiprocessing.get_context("fork")  # no thread runs yet, and the libraries are loaded once
    with tempfile.TemporaryDirectory(prefix="meteor-fuzz-") as folder:
        current = Path(folder) / "current.bin"
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(name, seed, seconds, current, sender))
        child.start()
        sender.close()
        try:
            outcome: Outcome = receiver.recv()
        except EOFError:
            child.join(HANG_S)
            data = current.read_bytes() if current.exists() else b""
            return Outcome(found=[(data, f"the process ended with status {child.exitcode}: a hang, or killed")])
        child.join()
        return outcome


def main() -> int:
    """Run the targets and print what was found; the exit status is 1 where anything was."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--only", nargs="+", choices=sorted(TARGETS), default=list(TARGETS), help="targets")
    parser.add_argument("--found", type=Path, default=Path("runs/fuzz"), help="folder of what is found")
    options = parser.parse_args()
    found = 0
    print(f"{'target':16}{'inputs':>8}{'accepted':>10}{'slowest':>10}  refused")
    for name in options.only:
        outcome = run_target(name, options.seed, options.seconds / len(options.only))
        refused = ", ".join(f"{count} {kind}" for kind, count in outcome.refused.most_common())
        print(f"{name:16}{outcome.inputs:8}{outcome.accepted:10}{outcome.slowest_s:8.2f} s  {refused}", flush=True)
        for data, fault in outcome.found:
            found += 1
            text = fault.strip().replace("\n", "\n    ")
            print(f"  FOUND {keep(name, data, options.found)}\n    {text}", flush=True)
    print(f"seed {options.seed}: {found} found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
