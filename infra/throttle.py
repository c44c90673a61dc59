"""A slow network, for `infra.fault_proxy`: bytes of all connections share one rate, steadily or in jerks."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """One direction of a network.

    Attributes:
        bytes_per_s: that pass while it is open; 0: none, ever.
        open_s: seconds for which bytes pass before each pause; 0: there are no pauses.
        pause_s: seconds in which nothing passes.
    """

    bytes_per_s: float
    open_s: float = 0.0
    pause_s: float = 0.0


class Pace:
    """Holds up whoever would pass more bytes than a link takes."""

    def __init__(self, link: Link | None) -> None:
        self.link = link
        self._begun = time.monotonic()
        self._free = self._begun

    async def take(self, count: int) -> None:
        """Return when `count` bytes may pass."""
        link = self.link
        if link is not None:
            if not link.bytes_per_s:
                await asyncio.Event().wait()
            begin = self._after_pause(max(time.monotonic(), self._free))
            self._free = begin + count / link.bytes_per_s
            await asyncio.sleep(self._free - time.monotonic())

    def _after_pause(self, at: float) -> float:
        """The next moment from `at` on in which the link is open."""
        link = self.link
        if link is None or not link.open_s:
            return at
        into = (at - self._begun) % (link.open_s + link.pause_s)
        return at if into < link.open_s else at - into + link.open_s + link.pause_s
