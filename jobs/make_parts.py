"""Make the pretrained parts of the recipe `small`: `python jobs/make_parts.py [NAME ...] [--out DIR]`.

Three are converted from packages, one is trained here (about ten minutes on two quiet CPU cores). What is there and
whole is left alone; `--help` lists the names.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers.utils import logging as transformers_logging

from pipelines.parts import PARTS, Part, PartError, default_parts_dir, make_part


def _say(line: str) -> None:
    print(f"  {line}", flush=True)


def summary(part: Part) -> str:
    """What was made, for people: size, time, place and how it was verified."""
    size = sum(path.stat().st_size for path in part.folder.iterdir()) / 1e6
    state = "whole, left as it is" if part.reused else "made"
    return (
        f"{part.name}: {state} in {part.seconds:.0f} s, {size:.0f} MB in {part.folder}\n  {part.metadata['verified']}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    listed = "\n".join(f"  {name:22s} {maker.what} ({maker.licence})" for name, maker in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python jobs/make_parts.py",
        description=f"{__doc__}\n\nparts:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which parts (default: all)")
    parser.add_argument(
        "--out", type=Path, default=default_parts_dir(), help="the cache (METEOR_PARTS_DIR; %(default)s)"
    )
    chosen = parser.parse_args(arguments)
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        for name in chosen.names or PARTS:
            print(summary(make_part(name, chosen.out, _say)), flush=True)
    except PartError as error:
        print(f"make_parts: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
