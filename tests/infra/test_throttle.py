"""A slow network is as slow as it says, for all who share it."""

import asyncio
import time

import pytest

from infra.throttle import Link, Pace


def seconds_for(link: Link | None, pieces: int, size: int, sharers: int = 1) -> float:
    async def one(pace: Pace) -> None:
        for _ in range(pieces):
            await pace.take(size)

    async def all_of_them() -> float:
        pace = Pace(link)
        start = time.monotonic()
        await asyncio.gather(*(one(pace) for _ in range(sharers)))
        return time.monotonic() - start

    return asyncio.run(all_of_them())


def test_bytes_share_one_rate() -> None:
    assert 0.4 <= seconds_for(Link(100_000), 10, 4_000) < 2
    assert 0.4 <= seconds_for(Link(100_000), 5, 4_000, sharers=2) < 2
    assert seconds_for(None, 10, 10**9) < 0.5


def test_pauses_come_on_top() -> None:
    assert 0.4 + 3 * 0.2 <= seconds_for(Link(100_000, open_s=0.1, pause_s=0.2), 40, 1_000) < 3


def test_a_dead_network_passes_nothing() -> None:
    async def wait() -> None:
        await asyncio.wait_for(Pace(Link(0)).take(1), 0.1)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(wait())
