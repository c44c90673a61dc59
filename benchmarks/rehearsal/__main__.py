"""`python -m benchmarks.rehearsal`: whole jobs on the local stack at sizes that a laptop bears, and what they take.

Writes benchmarks/results/rehearsal.json and rehearsal.png. With --only, the other rows of these files stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import end_on_sigterm
from benchmarks.rehearsal.expected import compared, expected
from benchmarks.rehearsal.plays import BY_NAME, PLAYS, Play
from benchmarks.rehearsal.report import draw, line_of
from benchmarks.rehearsal.stage import RehearsalError, machine, open_stage
from benchmarks.results_file import RESULTS, write_results


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 when every command ended well, 1 when one failed, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rehearsal", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], choices=sorted(BY_NAME), help="play these")
    parser.add_argument("--output", type=Path, default=RESULTS / "rehearsal.json", help="the results (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep logs and temporary files, and say where they are")
    arguments = parser.parse_args(argv)
    end_on_sigterm()
    plays = [BY_NAME[name] for name in arguments.only] or list(PLAYS)
    rows: dict[str, Any] = {}
    failed = False
    for play in plays:
        folder = Path(tempfile.mkdtemp(prefix="meteor-rehearsal-"))
        try:
            rows[play.name] = _played(play, folder)
        except RehearsalError as error:
            print(f"{play.name} FAILED: {error}", file=sys.stderr)
            failed = True
        except KeyboardInterrupt:
            print("interrupted: what was started has been stopped", file=sys.stderr)
            return 130
        finally:
            if arguments.keep:
                print(f"kept: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
    if rows:
        before = json.loads(arguments.output.read_text())["rehearsals"] if arguments.output.exists() else {}
        merged = {play.name: found for play in PLAYS if (found := rows.get(play.name, before.get(play.name)))}
        write_results(arguments.output, {"rehearsals": merged})
        draw(arguments.output.with_suffix(".png"), merged)
    return 1 if failed else 0


def _played(play: Play, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"what": play.what, "machine": machine(), "commands": {}}
    with open_stage(play, folder) as stage:
        for command in play.commands:
            taken = stage.run(command)
            phases = {name: phase.to_dict() for name, phase in taken.items()}
            estimate = expected(command)
            found["commands"][command.name] = {
                "command": " ".join(("python", *command.words)),
                "phases": phases,
                "estimate": estimate,
                "measured_over_estimate": compared(phases, estimate),
            }
            for name, phase in taken.items():
                print(line_of(play.name, command.name, name, phase), flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
