"""One target for a stated time, in a process of its own: its memory is bounded, and what hangs or kills it is known.

Before each input is read it is written to a file, so it is there whatever becomes of the process.
"""

from __future__ import annotations

import faulthandler
import hashlib
import resource
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.targets import Target

CORPUS = Path(__file__).with_name("corpus")
"""Inputs that were found: TARGET-DIGEST.bin. Every one is read by the tests for ever."""
MOST_CPU_S = 5.0
"""CPU seconds of one input; the inputs are small, so most take a thousandth of it."""
MOST_BYTES = 2**30
"""Memory that reading one input may take beyond what the process has."""
MOST_TEXT = 2000
"""Characters of an error."""
HANG_S = 60.0


@dataclass
class Outcome:
    """What became of the inputs of one target.

    Attributes:
        accepted: inputs that were read.
        refused: inputs by the error that they got.
        found: inputs that were handled wrongly, with what went wrong.
        slowest_s: most CPU seconds of one input.
    """

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    found: list[tuple[bytes, str]] = field(default_factory=list)
    slowest_s: float = 0.0

    @property
    def inputs(self) -> int:
        """How many were read."""
        return self.accepted + self.refused.total() + len(self.found)


def try_input(target: Target, data: bytes, outcome: Outcome) -> None:
    """Read one input and note what became of it."""
    started = time.process_time()
    fault = ""
    try:
        target.read(data)
    except target.errors as error:
        outcome.refused[type(error).__name__] += 1
        if len(str(error)) > MOST_TEXT:
            fault = f"{type(error).__name__} of {len(str(error))} characters"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        fault = "".join(traceback.format_exception(error))[-3000:]
    else:
        outcome.accepted += 1
    seconds = time.process_time() - started
    outcome.slowest_s = max(outcome.slowest_s, seconds)
    if seconds > MOST_CPU_S:
        fault = fault or f"{seconds:.1f} s of CPU"
    if fault:
        outcome.found.append((data, fault))


def cases(target: Target, seed: str, seconds: float) -> Iterator[bytes]:
    """Inputs 0, 1, 2, ... of a seed, until the time is over."""
    deadline, number = time.monotonic() + seconds, 0
    while time.monotonic() < deadline:
        yield target.case(seed, number)
        number += 1


def fuzz(target: Target, inputs: Iterable[bytes], current: Path) -> Outcome:
    """Read the inputs, each after it was written to `current`, under a limit of memory. A hang ends the process."""
    outcome = Outcome()
    for data in target.seeds():  # loads what is loaded once, so that the limit below counts inputs alone
        try_input(target, data, outcome)
    _limit_memory()
    for data in inputs:
        current.write_bytes(data)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try_input(target, data, outcome)
    faulthandler.cancel_dump_traceback_later()
    return outcome


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def keep(name: str, data: bytes, folder: Path) -> Path:
    """Store an input that was found."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}.bin"
    path.write_bytes(data)
    return path
