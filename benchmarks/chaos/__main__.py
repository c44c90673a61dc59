"""`python -m benchmarks.chaos`: faults of every kind into trainings on the real stack; see benchmarks/README.md.

Writes benchmarks/results/chaos.json and chaos.png; with --only it prints alone, unless --out is given.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.chaos.bench import choose, line_of, open_bench, show
from benchmarks.chaos.report import draw, failed_in, replace_rows, write
from benchmarks.chaos.scenarios import SCENARIOS, UNDISTURBED
from benchmarks.environment import end_on_sigterm
from benchmarks.results_file import RESULTS


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when every scenario passes, 1 when one fails, 130 after an interrupt."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="play these (and the undisturbed one)")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice of a fault (%(default)s)")
    parser.add_argument("--out", type=Path, help=f"folder of the results ({RESULTS}; with --only: none)")
    parser.add_argument("--again", action="store_true", help="play those that failed in the results, and put them in")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:<24} {scenario.injects} (workers {scenario.workers})")
        return 0
    try:
        results = arguments.out or RESULTS
        chosen = choose(failed_in(results / "chaos.json") if arguments.again else arguments.only)
    except ValueError as error:
        parser.error(str(error))
    end_on_sigterm()
    started = time.monotonic()
    rows = []
    try:
        with open_bench(chosen, arguments.seed) as bench:
            for scenario in chosen:
                rows.append(bench.play(scenario))
                show(rows[-1])
                if bench.reference is None:
                    print("the undisturbed training failed: there is nothing to compare with", file=sys.stderr)
                    return 1
    except KeyboardInterrupt:
        print("interrupted: what was started has been stopped", file=sys.stderr)
        return 130
    seconds = time.monotonic() - started
    print(f"\n{len(rows)} scenarios in {seconds / 60:.1f} minutes, seed {arguments.seed}")
    for row in rows:
        print(line_of(row))
    folder = arguments.out or (None if arguments.only else RESULTS)
    if arguments.again:
        again = [row for row in rows if row["name"] != UNDISTURBED]
        draw(results / "chaos.png", replace_rows(results / "chaos.json", again, seconds))
    elif folder is not None:
        write(folder / "chaos.json", rows, arguments.seed, seconds)
        draw(folder / "chaos.png", rows)
        print(f"written: {folder / 'chaos.json'}, {folder / 'chaos.png'}")
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
