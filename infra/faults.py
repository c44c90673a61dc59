"""What `infra.fault_proxy` injects, and the rules that say which requests meet it.

`at` is a place in a body: bytes from its start (int), or a share of its length (float).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Reset:
    """The connection is reset.

    At a place of the answer's or of the request's body, or when all is done but the answer's first byte is not sent
    (the client cannot know whether the server did it).
    """

    at: int | float = 0.5
    where: Literal["body", "request", "answer"] = "body"


@dataclass(frozen=True)
class Truncate:
    """The answer promises its whole length, ends at `at`, and the connection closes in good order."""

    at: int | float = 0.5


@dataclass(frozen=True)
class Flip:
    """`count` bytes of the answer's body (of this range, for a ranged GET) from `at` on are inverted."""

    at: int | float = 0.5
    count: int = 1


@dataclass(frozen=True)
class Drip:
    """The answer's body comes at this rate."""

    bytes_per_s: float = 100.0


@dataclass(frozen=True)
class Delay:
    """The request reaches the server this much later."""

    seconds: float = 1.0


@dataclass(frozen=True)
class Status:
    """The request is taken whole and answered with an S3 error; it never reaches the server."""

    code: int = 503
    error: str = "SlowDown"
    message: str = "Please reduce your request rate."


@dataclass(frozen=True)
class Refuse:
    """The server is down for some seconds: every connection is reset, and new ones are refused."""

    seconds: float = 1.0


Fault = Reset | Truncate | Flip | Drip | Delay | Status | Refuse
SLOW_DOWN = Status()
INTERNAL_ERROR = Status(500, "InternalError", "We encountered an internal error, please try again.")
DISK_FULL = Status(500, "InternalError", "No writable volumes: no space left on device")
INSUFFICIENT_STORAGE = Status(507, "InsufficientStorage", "There is not enough space on the disk.")
_KINDS: dict[str, Callable[..., Fault]] = {
    kind.__name__: kind for kind in (Reset, Truncate, Flip, Drip, Delay, Status, Refuse)
}


@dataclass(frozen=True)
class Rule:
    """Which requests meet a fault. A fault of the answer's body counts only good answers (2xx) that reach its place."""

    fault: Fault
    method: str = ".*"
    """Regular expression for the whole method."""
    path: str = ""
    """Regular expression found anywhere in the path with its query."""
    skip: int = 0
    """Matching requests that pass before the first fault."""
    times: int | None = 1
    """Faults at most; None for no end."""
    share: float = 1.0
    """Chance of a fault for each matching request after `skip`."""
    seed: int = 0
    """Seed of that chance."""

    @property
    def in_body(self) -> bool:
        """Whether the fault lies in the answer's body, so that its length decides."""
        return isinstance(self.fault, Truncate | Flip | Drip) or (
            isinstance(self.fault, Reset) and self.fault.where == "body"
        )


@dataclass(frozen=True)
class Injected:
    """One fault that a request met; `time` is in seconds since the epoch."""

    rule: Rule
    method: str
    path: str
    time: float


@dataclass
class RuleCount:
    """How often a rule has matched and struck."""

    rule: Rule
    matched: int = 0
    struck: int = 0
    random: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        self.random.seed(self.rule.seed)

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request meets the fault; it is counted either way."""
        rule = self.rule
        if not re.fullmatch(rule.method, method) or not re.search(rule.path, path):
            return False
        self.matched += 1
        if self.matched <= rule.skip or (rule.times is not None and self.struck >= rule.times):
            return False
        if self.random.random() >= rule.share:
            return False
        self.struck += 1
        return True


def place(at: int | float, length: int) -> int:
    """The byte that `at` means in a body of `length` bytes."""
    return at if isinstance(at, int) else int(at * length)


def rules_from_json(text: str) -> list[Rule]:
    """Rules from a JSON list of objects. Raises ValueError for an unknown fault, TypeError for an unknown field."""
    rules = []
    for record in json.loads(text):
        fault = dict(record.pop("fault"))
        kind = fault.pop("kind")
        if kind not in _KINDS:
            raise ValueError(f"unknown fault {kind!r}; there are {', '.join(_KINDS)}")
        rules.append(Rule(_KINDS[kind](**fault), **record))
    return rules
